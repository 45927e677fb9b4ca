"""Encoded picture to uint8 pixels, exactly as the public release preprocesses.

RGB; halve with BOX while the short side is at least twice the target; BICUBIC so that the short side is
the target; centre crop. Raises :class:`DecodeError` with the kind of fault.
"""

import io
from typing import Any

import numpy as np
from PIL import Image


class DecodeError(ValueError):
    """A picture that cannot be used; ``kind`` is what the counters name it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def decode(encoded: bytes, resolution: int, max_pixels: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Square picture ``(resolution, resolution, 3)``."""
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise DecodeError("too_large", f"{width}x{height} is over {max_pixels} pixels")
            if min(width, height) < resolution:
                raise DecodeError("too_small", f"{width}x{height} is under {resolution} pixels")
            image = opened.convert("RGB")
    except DecodeError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError("undecodable", f"{type(error).__name__}: {error}") from error
    return np.asarray(centre_crop(image, resolution))


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The release's resize and crop of an RGB image."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))

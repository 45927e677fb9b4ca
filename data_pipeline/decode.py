"""Encoded image to uint8 pixels, as the public release preprocesses ("exact") or near it and faster ("fast").

Exact: RGB; halve with BOX while the image covers twice the size; BICUBIC to the smallest image that covers
the size; centre crop. Fast: the same, but JPEG is halved by its decoder in the DCT domain, other formats by one
averaging over blocks, and the BICUBIC is a vectorised one. Where the sides halve evenly the two agree to 45 dB
PSNR (``benchmarks/data/decode_quality.py``); elsewhere the release's BOX displaces pixels by up to half of one.

Unlike the release, both turn the image as its EXIF orientation says, show what is transparent over white
(the release shows the colours hidden below) and scale 16-bit grey to 8 bits (the release clips it to white).
Sizes are (height, width); Pillow's own are (width, height).
"""

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

# The plug-ins of FORMATS register when imported; Pillow would otherwise import all it has to find WebP.
from PIL import ExifTags, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

DecodeMode = Literal["exact", "fast"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_SIDE = 65_535
"""Longest side in pixels that a header may claim: the limit of JPEG, and of the index's columns."""
PILLOW_PIXELS = 179_000_000
"""Pixels of the largest image that Pillow opens, rounded up."""
KEPT_BLOCKS = 16
"""Blocks of at most 16 MiB that Pillow keeps for the next images of this process."""
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TURN = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS.split(), start=2)}
"""EXIF orientation to what turns the stored image upright; 5 to 8 swap width and height."""
_OPAQUE = 255
_PILLOW_MODULES = re.compile(r"PIL\.")
_START_OF_SCAN = b"\xff\xda"
_BYTES_PER_CHANCE_SCAN = 16_384
_MAX_SCANNED_PIXELS = 2**31
"""Pixels times scans of a JPEG: under 10 s of decoding, and 12 scans of the largest image Pillow opens."""


class DecodeError(ValueError):
    """An image or caption that cannot be used; ``kind`` is what the counters name it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return type(self), (self.kind, str(self))


def decode(
    encoded: bytes, size: tuple[int, int], *, mode: DecodeMode, max_pixels: int, upscale: bool = False
) -> Pixels:
    """Pixels ``(height, width, 3)`` of the first frame.

    With ``upscale`` a smaller image is resized to cover the size, if that takes no more than ``max_pixels``.
    Raises :class:`DecodeError`: ``too_large`` for over ``max_pixels`` (by the header, before decoding),
    ``too_small`` for an image that does not cover the size, ``undecodable`` for anything else.
    """
    with _open(encoded) as opened:
        orientation = _orientation(opened)
        width, height = _upright(opened.size, orientation)
        if width * height > max_pixels:
            raise DecodeError("too_large", f"{width}x{height} is over {max_pixels} pixels")
        if height < size[0] or width < size[1]:
            if not upscale:
                raise DecodeError("too_small", f"{width}x{height} does not cover {size[1]}x{size[0]} pixels")
            covering = _plan((width, height), size)[1]
            if covering[0] * covering[1] > max_pixels:
                raise DecodeError("too_large", f"{width}x{height} upscaled is over {max_pixels} pixels")
        _refuse_scan_bomb(opened, encoded)
        with _faults():
            if mode == "fast":
                return _fast(opened, orientation, size)
            image = _to_rgb(opened)
            if orientation in _TURN:
                image = image.transpose(_TURN[orientation])
            return np.asarray(cover_and_crop(image, size))


def image_size(encoded: bytes) -> tuple[int, int]:
    """``(height, width)`` as seen after EXIF orientation; reads the header only.

    Raises :class:`DecodeError`: ``too_large`` for more pixels than Pillow opens, else ``undecodable``.
    """
    with _open(encoded) as opened:
        width, height = _upright(opened.size, _orientation(opened))
    return height, width


def cover_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The release's resize and crop of an RGB image, for any size ``(height, width)``."""
    halvings, covering = _plan(image.size, size)
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    top, left = _corner(covering[::-1], size)
    return image.resize(covering, Image.Resampling.BICUBIC).crop((left, top, left + size[1], top + size[0]))


def _corner(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """(Top, left) of the centre of a (height, width), as the release rounds it."""
    return (shape[0] - size[0]) // 2, (shape[1] - size[1]) // 2


def _plan(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """How often the release halves an image (width, height), and the covering (width, height) it then makes."""
    (width, height), halvings = image, 0
    while height >= 2 * size[0] and width >= 2 * size[1]:
        width, height, halvings = width // 2, height // 2, halvings + 1
    scale = max(size[0] / height, size[1] / width)
    return halvings, (round(width * scale), round(height * scale))


def _fast(opened: Image.Image, orientation: int, size: tuple[int, int]) -> Pixels:
    """The halvings are the JPEG decoder's or one averaging, and the resize is vectorised."""
    stored = opened.size
    halvings, covering = _plan(_upright(stored, orientation), size)
    # Takes effect for JPEG only: 1/8 at most.
    drafted = opened.draft(None, _upright((size[1], size[0]), orientation))
    shrunk = round(stored[0] / drafted[1][2]) if drafted else 1
    image = _to_rgb(opened)
    blocks = 2**halvings // shrunk
    if blocks > 1:
        image = image.reduce(blocks)
    # Sides that do not divide leave a last, partly filled row or column: the image is a little smaller than
    # its pixels.
    sides = (stored[0] / 2**halvings, stored[1] / 2**halvings)
    pixels = _bicubic(np.array(image), sides, _upright(covering, orientation))
    if orientation in _TURN:
        pixels = np.asarray(Image.fromarray(pixels).transpose(_TURN[orientation]))
    top, left = _corner(pixels.shape, size)
    return pixels[top : top + size[0], left : left + size[1]]


def _bicubic(pixels: Pixels, sides: tuple[float, float], size: tuple[int, int]) -> Pixels:
    """Pillow's BICUBIC (antialiased, within one of 255), in a quarter of its time by vector instructions.

    ``sides`` (width, height) are what of ``pixels`` becomes ``size`` (width, height).
    """
    import torch

    # With a full stride for the batch's axis: else one image is not known to have its channels last.
    (width, height), image_1CYX = size, torch.from_numpy(pixels.reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    # The output is as long as the factor gives, rounded down: a hair more, so that it is never short.
    factors = ((height + 1e-4) / sides[1], (width + 1e-4) / sides[0])
    resized = torch.nn.functional.interpolate(image_1CYX, scale_factor=factors, mode="bicubic", antialias=True)
    return resized[0, :, :height, :width].permute(1, 2, 0).numpy()


def _upright(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(Width, height) after turning; its own inverse."""
    return (stored[1], stored[0]) if orientation >= 5 else stored


def _to_rgb(opened: Image.Image) -> Image.Image:
    """First frame as 8-bit RGB, what is transparent over white."""
    opened.load()
    if opened.mode.startswith("I"):
        # Pillow gives 16-bit grey as it is, but keeps only the high byte of 16-bit colours: the same here.
        grey = np.asarray(opened).astype(np.int64).clip(0, 65_535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not opened.has_transparency_data:
        return opened.convert("RGB")
    image = opened.convert("RGBA")
    if image.getchannel("A").getextrema() != (_OPAQUE, _OPAQUE):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Whatever Pillow raises becomes a :class:`DecodeError`."""
    try:
        yield
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from error
    # Pillow's parsers run into what damaged files lead them to: struct.error, KeyError, EOFError, MemoryError.
    except Exception as error:
        raise DecodeError("undecodable", f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _open(encoded: bytes) -> Iterator[Image.Image]:
    """Opened image, its header read and its sides plausible."""
    # Pillow reuses memory: fresh pages cost up to a third of the decoding.
    if Image.core.get_blocks_max() < KEPT_BLOCKS:
        Image.core.set_blocks_max(KEPT_BLOCKS)
    # Not by catch_warnings, which swaps the filters of the whole process while other threads decode.
    if not any(entry[3] == _PILLOW_MODULES for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES.pattern)
    with _faults():
        opened = Image.open(io.BytesIO(encoded), formats=FORMATS)
    with opened:
        width, height = opened.size
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            raise DecodeError("undecodable", f"a header that claims {width}x{height} pixels")
        yield opened


def _orientation(opened: Image.Image) -> int:
    """EXIF orientation 1 to 8, 1 where there is none, of EXIF data that stand before the pixels.

    Not by Pillow: ``getexif`` decodes a whole PNG to look for EXIF data after the pixels, and ``Exif.load`` copies
    what each of up to 65,535 entries points to, which may be all of a large chunk.
    """
    exif = opened.info.get("exif")
    # A PNG's text chunk named "exif" gives a str.
    tiff = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    # What is cut off is as good as absent.
    with contextlib.suppress(struct.error):
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == ExifTags.Base.Orientation:
                # A 16-bit number (type 3), by some writers a 32-bit one (type 4).
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, at + 8)
                return value if value in _TURN else 1
    return 1


def _refuse_scan_bomb(opened: Image.Image, encoded: bytes) -> None:
    """Refuse a progressive JPEG of many scans: 400 KB took 140 s. Encoders write some 10 scans, at most 70.

    The marker's two bytes also stand by chance in data that are no pixels, once in 65,536 bytes.
    """
    if isinstance(opened, JpegImagePlugin.JpegImageFile):
        scans = encoded.count(_START_OF_SCAN) - len(encoded) // _BYTES_PER_CHANCE_SCAN
        if scans * opened.width * opened.height > _MAX_SCANNED_PIXELS:
            raise DecodeError("undecodable", f"a JPEG of {scans} scans of {opened.width}x{opened.height} pixels")

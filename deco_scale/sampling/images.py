"""What images are made from and with: velocities over images, seeded noise, uint8, grids.

Shape letters: P images, C channels, Y X pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data_pipeline.storage.files import atomic_path
from deco_scale.errors import RunError
from deco_scale.models import patchify, unpatchify
from deco_scale.objectives.config import Prediction
from deco_scale.objectives.flow_matching import velocity_from_image
from deco_scale.sampling.guidance import VelocityFn

PredictFn = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""``predict(patches, t, condition, grid)``, as of an engine or a plain denoiser."""


def velocity_of(
    predict: PredictFn, patch_size: int, *, prediction: Prediction = "velocity", t_eps: float = 0.05
) -> VelocityFn:
    """Velocity over images from a network's output over patches, which is the velocity or the clean image.

    ``t_eps`` is that of :func:`deco_scale.objectives.flow_matching.velocity_from_image`, for images.
    """

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        grid = (x.shape[-2] // patch_size, x.shape[-1] // patch_size)
        output = unpatchify(predict(patchify(x, patch_size), t, condition, grid).float(), grid, patch_size)
        return output if prediction == "velocity" else velocity_from_image(output, x, t, t_eps)

    return velocity


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Noise ``(P, C, Y, X)``, each image from a CPU generator of its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def to_uint8(x_PCYX: Tensor) -> Any:
    """[-1, 1] to uint8 (P, Y, X, C), rounded to the nearest."""
    pixels = ((x_PCYX.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images: Sequence[Any], path: Path, *, labels: Sequence[str], columns: int = 8) -> None:
    """One PNG with all uint8 images (Y, X, 3), row by row, each with its label below; small ones are enlarged.

    Written atomically; raises :class:`RunError` if the disk refuses.
    """
    height, width, _ = images[0].shape
    scale, columns = max(1, 96 // max(height, width)), min(columns, len(images))
    height, width, text = height * scale, width * scale, 14
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + 2), rows * (height + text + 2)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        left, top = (i % columns) * (width + 2), (i // columns) * (height + text + 2)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        draw.text((left + 1, top + height), label[: max(1, width // 6)], fill="black")
    try:
        with atomic_path(path, durable=False) as partial:
            grid.save(partial, format="PNG")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error

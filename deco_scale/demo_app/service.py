"""Generates the images of a visitor's request: the page without its user interface.

Images are PNG files in a temporary folder; the oldest are deleted when there are too many. Each has its settings
as text, under the key ``deco``.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deco_scale.demo_app.validation import MAX_SEED, GenerationLimits, ImageRequest, RequestError, check_request
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.generate import ImageGenerator, SampleRequest

RETAINED_REQUESTS = 16
"""Files are retained for this number of requests of the maximum size."""


class GeneratedImage(NamedTuple):
    """An image's file, and the settings that reproduce it."""

    path: Path
    settings: dict[str, Any]


class DemoService:
    """One generator and one folder; not thread-safe: the caller runs one request at a time."""

    def __init__(
        self,
        generator: ImageGenerator,
        default: SamplerConfig,
        folder: Path,
        *,
        limits: GenerationLimits,
        batch: int,
        max_seconds: float,
    ) -> None:
        self.generator, self.default, self.folder, self.limits = generator, default, folder, limits
        self._batch, self._max_seconds = batch, max_seconds

    @property
    def is_text(self) -> bool:
        return self.generator.kind == "t2i_deco"

    def generate(self, raw: Mapping[str, Any], on_step: Callable[[int, int], None]) -> list[GeneratedImage]:
        """Images of a request's raw values; ``on_step(done, total)`` is called after each solver step.

        Raises :class:`RequestError` for an invalid request, or one that takes too much time or memory.
        """
        request = check_request(
            raw,
            self.limits,
            patch_size=self.generator.patch_size,
            num_classes=0 if self.is_text else self.generator.num_classes,
        )
        seed = secrets.randbelow(MAX_SEED - request.count) if request.seed is None else request.seed
        samples = [SampleRequest(request.condition, n, seed + n, request.negative) for n in range(request.count)]
        sampler = replace(
            self.default, solver=request.solver, num_steps=request.num_steps, guidance=request.guidance
        )
        deadline = time.monotonic() + self._max_seconds

        def step(done: int, total: int) -> None:
            if time.monotonic() > deadline:
                raise RequestError(
                    f"This took longer than {self._max_seconds:g} seconds; use fewer images, pixels or steps."
                )
            on_step(done, total)

        target = self.folder / secrets.token_hex(16)
        target.mkdir(parents=True)
        images = []
        try:
            for sample, pixels in self.generator.images(
                samples, size=(request.height, request.width), sampler=sampler, batch=self._batch, on_step=step
            ):
                settings = self._settings(sample, request, sampler)
                images.append(GeneratedImage(target / settings["file"], settings))
                text = PngInfo()
                text.add_itxt("deco", json.dumps(settings))
                Image.fromarray(pixels).save(images[-1].path, format="PNG", pnginfo=text)
        except torch.OutOfMemoryError:
            raise RequestError("Out of memory; use smaller images.") from None
        finally:
            self._prune(keep=target if images else None)
        return images

    def _settings(self, sample: SampleRequest, request: ImageRequest, sampler: SamplerConfig) -> dict[str, Any]:
        """As in the JSON lines of ``deco sample``."""
        return {
            "file": f"{sample.index:04d}_{sample.seed}.png",
            "prompt" if self.is_text else "class": sample.condition,
            "negative": sample.negative,
            "index": sample.index,
            "seed": sample.seed,
            "height": request.height,
            "width": request.width,
            "sampler": asdict(sampler),
            "checkpoint_step": self.generator.step,
            "checkpoint_digest": self.generator.digest,
        }

    def _prune(self, keep: Path | None) -> None:
        """Delete the oldest requests' folders except ``keep``, as long as there are too many images."""
        folders = sorted((p for p in self.folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
        counts = {folder: sum(1 for _ in folder.iterdir()) for folder in folders}
        total = sum(counts.values())
        for folder in folders:
            if folder != keep and (total > RETAINED_REQUESTS * self.limits.max_images or not counts[folder]):
                shutil.rmtree(folder)
                total -= counts[folder]

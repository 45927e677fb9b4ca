"""Draws a visitor's order and keeps its pictures for a while: the page without its looks.

Pictures are PNG files in a folder of their own that is emptied when the page ends; the oldest go when there are
more than a fixed number. Each carries its settings as text, under the key ``deco``.
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

from deco_scale.demo_app.validation import MAX_SEED, CheckError, ImageRequest, Limits, check_request
from deco_scale.sampling import SamplerConfig
from deco_scale.sampling.generate import Generator, SampleRequest

KEPT_ORDERS = 16
"""Orders of the largest number of pictures whose files are kept."""


class Drawn(NamedTuple):
    """A picture's file, and the settings that draw it again."""

    path: Path
    settings: dict[str, Any]


class _TooLong(Exception):
    """The time of an order is up."""


class DemoService:
    """One generator, one folder; orders are drawn one at a time, which is the caller's part."""

    def __init__(
        self,
        generator: Generator,
        default: SamplerConfig,
        folder: Path,
        *,
        limits: Limits,
        batch: int,
        max_seconds: float,
    ) -> None:
        self.generator, self.default, self.folder, self.limits = generator, default, folder, limits
        self._batch, self._max_seconds = batch, max_seconds

    @property
    def is_text(self) -> bool:
        return self.generator.kind == "t2i_deco"

    def draw(self, raw: Mapping[str, Any], on_step: Callable[[int, int], None]) -> list[Drawn]:
        """Pictures of the raw values of an order; ``on_step(done, total)`` after each step of the solver.

        Raises :class:`CheckError`, for the visitor, where the order cannot be, takes too long or too much memory.
        """
        order = check_request(
            raw,
            self.limits,
            patch_size=self.generator.patch_size,
            num_classes=0 if self.is_text else self.generator.num_classes,
        )
        seed = secrets.randbelow(MAX_SEED - order.count) if order.seed is None else order.seed
        jobs = [SampleRequest(order.condition, n, seed + n, order.negative) for n in range(order.count)]
        sampler = replace(self.default, solver=order.solver, num_steps=order.num_steps, guidance=order.guidance)
        end = time.monotonic() + self._max_seconds

        def step(done: int, total: int) -> None:
            if time.monotonic() > end:
                raise _TooLong
            on_step(done, total)

        target = self.folder / secrets.token_hex(16)
        target.mkdir(parents=True)
        drawn = []
        try:
            for job, pixels in self.generator.images(
                jobs, size=(order.height, order.width), sampler=sampler, batch=self._batch, on_step=step
            ):
                settings = self._settings(job, order, sampler)
                drawn.append(Drawn(target / settings["file"], settings))
                _save(drawn[-1], pixels)
        except _TooLong:
            raise CheckError(
                f"This took longer than {self._max_seconds:g} seconds; ask for fewer, smaller or rougher pictures."
            ) from None
        except torch.OutOfMemoryError:
            raise CheckError("There is not enough memory for this; ask for smaller pictures.") from None
        finally:
            self._prune(keep=target if drawn else None)
        return drawn

    def _settings(self, job: SampleRequest, order: ImageRequest, sampler: SamplerConfig) -> dict[str, Any]:
        """As a line of ``deco sample``'s ``pictures.jsonl``."""
        return {
            "file": f"{job.index:04d}_{job.seed}.png",
            "prompt" if self.is_text else "class": job.condition,
            "negative": job.negative,
            "index": job.index,
            "seed": job.seed,
            "height": order.height,
            "width": order.width,
            "sampler": asdict(sampler),
            "checkpoint_step": self.generator.step,
            "checkpoint_digest": self.generator.digest,
        }

    def _prune(self, keep: Path | None) -> None:
        """Remove the oldest orders' folders, all but ``keep`` if need be, until few enough pictures are left."""
        folders = sorted((p for p in self.folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
        counts = {folder: sum(1 for _ in folder.iterdir()) for folder in folders}
        left = sum(counts.values())
        for folder in folders:
            if folder != keep and (left > KEPT_ORDERS * self.limits.max_pictures or not counts[folder]):
                shutil.rmtree(folder)
                left -= counts[folder]


def _save(picture: Drawn, pixels: Any) -> None:
    text = PngInfo()
    text.add_itxt("deco", json.dumps(picture.settings))
    Image.fromarray(pixels).save(picture.path, format="PNG", pnginfo=text)

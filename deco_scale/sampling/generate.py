"""Pictures from jobs: one trained model with its text encoder, whatever computes behind it.

Commands, evaluations and the grids of a training run all draw with :class:`Generator`. A picture depends on its
job, the size and the sampler; not on the other jobs of a call, their order, the batch or the processes, up to the
order in which floating-point sums are taken.

Shape letters: B batch, L text tokens, T text width, Y X pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deco_scale.models import ModelConfig
from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.guidance import VelocityFn
from deco_scale.sampling.images import generate_images

EncodeFn = Callable[[Sequence[str]], Tensor]
"""Text states ``(B, L, T)`` of captions."""

MAX_PATCHES = 16_384
"""Patches of a picture, 2048 x 2048 pixels at patch 16: attention's time grows with their square."""


class SampleRequest(NamedTuple):
    """One picture to draw.

    ``condition`` is a prompt or a class number, ``index`` the picture's number among those of the prompt (for its
    name; nothing is drawn from it), ``seed`` the seed of its noise. ``negative`` takes the place of the empty
    prompt in the guidance of this picture.
    """

    condition: str | int
    index: int = 0  # type: ignore[assignment]  # a tuple's method of this name is not needed
    seed: int = 0
    negative: str = ""


def check_size(size: tuple[int, int], patch_size: int) -> None:
    """Raise ``ValueError`` for a (height, width) in pixels that a model of this patch size cannot draw."""
    height, width = size
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"size {height}x{width}: both sides must be positive multiples of {patch_size}")
    patches = (height // patch_size) * (width // patch_size)
    if patches > MAX_PATCHES:
        raise ValueError(f"size {height}x{width} has {patches} patches of {patch_size}, at most {MAX_PATCHES} fit")


def check_requests(jobs: Iterable[SampleRequest], model: ModelConfig) -> None:
    """Raise ``ValueError`` naming the first job that the model cannot draw."""
    for job in jobs:
        if model.kind == "t2i_deco":
            if not isinstance(job.condition, str):
                raise ValueError(f"a {model.kind} model draws prompts, not {job.condition!r}")
        elif not isinstance(job.condition, int) or not 0 <= job.condition < model.num_classes:
            raise ValueError(
                f"a {model.kind} model draws classes from 0 to {model.num_classes - 1}, not {job.condition!r}"
            )
        elif job.negative:
            raise ValueError(f"a {model.kind} model takes no negative prompt, got {job.negative!r}")


class Generator:
    """A model as something that draws jobs.

    ``velocity`` maps (images, times, conditions) to velocities on ``device``. Text models give ``encode`` and the
    ``null`` states (L, T) of the empty prompt, class models the null class as a 0-dim ``null`` and no ``encode``.
    ``digest`` and ``step`` say which weights these are.
    """

    def __init__(
        self,
        velocity: VelocityFn,
        model: ModelConfig,
        *,
        encode: EncodeFn | None,
        null: Tensor,
        device: torch.device,
        digest: str = "",
        step: int = 0,
    ) -> None:
        if (encode is None) == (model.kind == "t2i_deco"):
            raise ValueError(f"a {model.kind} model {'needs' if encode is None else 'takes no'} text encoder")
        self.model = model
        self.kind, self.patch_size, self.num_classes = model.kind, model.patch_size, model.num_classes
        self.velocity, self.device = velocity, device
        self.digest, self.step = digest, step
        self._encode = encode
        self._null = null.to(device)

    @property
    def null(self) -> Tensor:
        """What stands for no condition, (L, T) or a 0-dim class; a copy, so that no caller can change it."""
        return self._null.clone()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """States ``(B, L, T)`` in fp32; raises ``ValueError`` for a class model."""
        if self._encode is None:
            raise ValueError(f"a {self.kind} model draws classes and encodes no text")
        return self._encode(texts).to(self.device).float()

    def images(
        self,
        jobs: Sequence[SampleRequest],
        *,
        size: tuple[int, int],
        sampler: SamplerConfig,
        batch: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[SampleRequest, Any]]:
        """Each job with its picture, uint8 (Y, X, 3), in the order of the jobs, ``batch`` at a time.

        ``size`` is (height, width) in pixels. Each different text of the call is encoded once, with the first
        batch that needs it, and let go after the last. ``on_step(done, total)`` is called after each step of the
        solver, counted over all batches. Raises ``ValueError`` at once for a job, size or batch that cannot be.
        """
        check_requests(jobs, self.model)
        check_size(size, self.patch_size)
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        return self._draw(jobs, size, sampler, batch, on_step)

    def _draw(
        self,
        jobs: Sequence[SampleRequest],
        size: tuple[int, int],
        sampler: SamplerConfig,
        batch: int,
        on_step: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[SampleRequest, Any]]:
        texts = _Texts(self, jobs)
        total = -(-len(jobs) // batch) * sampler.num_steps
        done = 0

        def stepped() -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, total)

        for start in range(0, len(jobs), batch):
            part = jobs[start : start + batch]
            condition, null = texts.conditions(part)
            images = generate_images(
                self.velocity,
                condition,
                null,
                [job.seed for job in part],
                size=size,
                cfg=sampler,
                batch=len(part),
                channels=self.model.channels,
                on_step=stepped,
            )
            yield from zip(part, images, strict=True)


class _Texts:
    """Conditions of batches; states of texts are kept as long as a later job of the call needs them."""

    def __init__(self, generator: Generator, jobs: Sequence[SampleRequest]) -> None:
        self._generator, self._null = generator, generator.null
        self._states: dict[str, Tensor] = {}
        self._left: Counter[str] = Counter()
        if generator.kind == "t2i_deco":
            self._left.update(text for job in jobs for text in _texts_of(job))

    def conditions(self, jobs: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        """Conditions of the jobs and what guidance leads away from, of the same shape."""
        if self._generator.kind != "t2i_deco":
            labels = torch.tensor([job.condition for job in jobs], device=self._generator.device)
            return labels, self._null.expand_as(labels)
        wanted = Counter(text for job in jobs for text in _texts_of(job))
        new = [text for text in wanted if text not in self._states]
        if new:
            self._states.update(zip(new, self._generator.encode(new), strict=True))
        condition = torch.stack([self._states[str(job.condition)] for job in jobs])
        null = torch.stack([self._states[job.negative] if job.negative else self._null for job in jobs])
        self._left -= wanted
        self._states = {text: states for text, states in self._states.items() if self._left[text] > 0}
        return condition, null.to(condition.dtype)


def _texts_of(job: SampleRequest) -> list[str]:
    """What has to be encoded for a job; the empty negative prompt is the null condition."""
    return [str(job.condition), job.negative] if job.negative else [str(job.condition)]

"""Images from requests: one trained model with its text encoder, whatever computes behind it.

Commands, evaluations and the sample images of a training run all use :class:`ImageGenerator`. An image depends on
its request, the size and the sampler; not on the other requests of a call, their order, the batch or the number of
processes, up to the order of floating-point sums.

Shape letters: B batch, L text tokens, T text width, Y X pixels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deco_scale.models import ModelConfig
from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.guidance import VelocityFn
from deco_scale.sampling.images import seeded_noise, to_uint8
from deco_scale.sampling.samplers import integrate

EncodeFn = Callable[[Sequence[str]], Tensor]
"""Text embeddings ``(B, L, T)`` of captions; those of the empty caption are the null condition."""

MAX_PATCHES = 16_384
"""Patches of an image, 2048 x 2048 pixels at patch 16: the time of attention grows with their square."""


class SampleRequest(NamedTuple):
    """One image to generate.

    ``condition`` is a prompt or a class number, ``index`` the image's number among those of the prompt (for names
    only), ``seed`` the seed of its noise. ``negative`` takes the place of the empty prompt in the guidance.
    """

    condition: str | int
    index: int = 0  # type: ignore[assignment]  # a tuple's method of this name is not needed
    seed: int = 0
    negative: str = ""


GenerateFn = Callable[[Sequence[SampleRequest]], Iterator[tuple[SampleRequest, Any]]]
"""Requests to (request, uint8 image (Y, X, 3)), in order: :meth:`ImageGenerator.images` with its options set."""


def check_size(size: tuple[int, int], patch_size: int) -> None:
    """Raise ``ValueError`` for a (height, width) in pixels that a model of this patch size cannot generate."""
    height, width = size
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"size {height}x{width}: both sides must be positive multiples of {patch_size}")
    patches = (height // patch_size) * (width // patch_size)
    if patches > MAX_PATCHES:
        raise ValueError(
            f"size {height}x{width} has {patches} patches of {patch_size}, the maximum is {MAX_PATCHES}"
        )


def check_requests(requests: Iterable[SampleRequest], model: ModelConfig) -> None:
    """Raise ``ValueError`` naming the first request that does not fit the model."""
    for request in requests:
        if model.kind == "t2i_deco":
            if not isinstance(request.condition, str):
                raise ValueError(f"a {model.kind} model takes prompts, not {request.condition!r}")
        elif not isinstance(request.condition, int) or not 0 <= request.condition < model.num_classes:
            raise ValueError(
                f"a {model.kind} model takes classes from 0 to {model.num_classes - 1}, not {request.condition!r}"
            )
        elif request.negative:
            raise ValueError(f"a {model.kind} model takes no negative prompt, got {request.negative!r}")


class ImageGenerator:
    """A model with its conditions, which turns requests into images.

    ``velocity`` maps (images, times, conditions) to velocities on ``device``. Text models need ``encode`` and, as
    ``null``, the embedding (L, T) of the empty prompt; class models no ``encode`` and the 0-dim null class.
    ``digest`` and ``step`` identify the weights.
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
        """The null condition, (L, T) or a 0-dim class; a copy, so that no caller can change it."""
        return self._null.clone()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings ``(B, L, T)`` in fp32; raises ``ValueError`` for a class model."""
        if self._encode is None:
            raise ValueError(f"a {self.kind} model takes classes and encodes no text")
        return self._encode(texts).to(self.device).float()

    def images(
        self,
        requests: Sequence[SampleRequest],
        *,
        size: tuple[int, int],
        sampler: SamplerConfig,
        batch: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[SampleRequest, Any]]:
        """Each request with its image, uint8 (Y, X, 3), in order, ``batch`` at a time.

        ``size`` is (height, width) in pixels. Each distinct text of the call is encoded once, with the first batch
        that needs it, and freed after the last. ``on_step(done, total)`` is called after each solver step, counted
        over all batches. An impossible request, size or batch raises ``ValueError`` before anything is generated.
        """
        check_requests(requests, self.model)
        check_size(size, self.patch_size)
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        total = -(-len(requests) // batch) * sampler.num_steps

        @torch.no_grad()
        def generate() -> Iterator[tuple[SampleRequest, Any]]:
            embeddings: dict[str, Tensor] = {}
            done = itertools.count(1)
            last_use = {text: i for i, request in enumerate(requests) for text in self._texts_of(request)}
            for start in range(0, len(requests), batch):
                part = requests[start : start + batch]
                condition, null = self._conditions(part, embeddings)
                for text in [text for text in embeddings if last_use[text] < start + batch]:
                    del embeddings[text]
                x = seeded_noise([request.seed for request in part], (self.model.channels, *size)).to(self.device)
                for state in integrate(self.velocity, x, condition, null, sampler):
                    x = state
                    if on_step is not None:
                        on_step(next(done), total)
                yield from zip(part, to_uint8(x), strict=True)

        return generate()

    def _texts_of(self, request: SampleRequest) -> list[str]:
        """The texts to encode for a request; the empty negative prompt is the null condition."""
        if self._encode is None:
            return []
        return [str(request.condition), request.negative] if request.negative else [str(request.condition)]

    def _conditions(
        self, requests: Sequence[SampleRequest], embeddings: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Conditions of the requests and the null conditions of their guidance; encodes what is new."""
        if self._encode is None:
            labels = torch.tensor([request.condition for request in requests], device=self.device)
            return labels, self._null.expand_as(labels)
        texts = dict.fromkeys(text for request in requests for text in self._texts_of(request))
        new = [text for text in texts if text not in embeddings]
        if new:
            embeddings.update(zip(new, self.encode(new), strict=True))
        condition = torch.stack([embeddings[str(request.condition)] for request in requests])
        null = torch.stack([embeddings[r.negative] if r.negative else self._null for r in requests])
        return condition, null.to(condition.dtype)

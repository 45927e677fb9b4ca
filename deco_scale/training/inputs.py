"""From a batch of uint8 images and captions to the inputs of the objective.

Shape letters: B batch, Y X pixels, L text tokens, T text width, N patches, F encoder width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.objectives import ObjectiveConfig, drop_condition
from deco_scale.objectives.flow_matching import base_time, shift_time
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.training.noise import draw


@dataclass(frozen=True, slots=True)
class Batch:
    """A rank's share of a global batch, or a part of it; what the loader yields has the same fields.

    ``images`` are uint8 (B, Y, X, 3); ``labels`` are for class models; ``sample_ids`` count a run's samples.
    Precomputed ``text_embeddings`` are (tokens, T) of each caption as bfloat16 bits, or packed.
    """

    images: Any
    captions: Sequence[str]
    labels: Sequence[int]
    sample_ids: Sequence[int]
    text_embeddings: Any


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Consecutive micro-batches of equal size."""
    size = len(batch.sample_ids) // parts
    for start in range(0, size * parts, size):
        cut = slice(start, start + size)
        embeddings = None if batch.text_embeddings is None else batch.text_embeddings[cut]
        yield Batch(batch.images[cut], batch.captions[cut], batch.labels[cut], batch.sample_ids[cut], embeddings)


def packed_text_embeddings(embeddings: Sequence[Any], shape: Sequence[int], *, pin: bool = False) -> Tensor:
    """Text embeddings ``(B, L, T)`` in bfloat16 from their bits (tokens, T) each; zero behind the last token.

    ``shape`` is (L, T); ``pin`` page-locks the memory, which needs CUDA. Raises :class:`RunError` for embeddings
    of another width or too many tokens.
    """
    length, width = shape
    packed = torch.zeros(len(embeddings), length, width, dtype=torch.bfloat16, pin_memory=pin)
    for row, bits in zip(packed, embeddings, strict=True):
        if bits.shape[0] > length or bits.shape[1] != width:
            raise RunError(f"text embeddings of {bits.shape}, the model takes {length} tokens of {width}")
        row[: len(bits)] = torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16)
    return packed


def pinned(batch: Batch, null_shape: Sequence[int]) -> Batch:
    """The batch in page-locked memory, from which copies to the device do not hold up the host; needs CUDA.

    Text embeddings are packed to ``null_shape`` (L, T) on the way.
    """
    images = torch.as_tensor(batch.images).pin_memory()
    embeddings = batch.text_embeddings
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.pin_memory()
    elif embeddings is not None:
        embeddings = packed_text_embeddings(embeddings, null_shape, pin=True)
    return Batch(images, batch.captions, batch.labels, batch.sample_ids, embeddings)


class EncoderOutputs(NamedTuple):
    """What frozen encoders made of a micro-batch: ``text`` (B, L, T), ``features`` (B, N, F); None if not yet."""

    text: Tensor | None = None
    features: Tensor | None = None


NOT_ENCODED = EncoderOutputs()


@dataclass(frozen=True, kw_only=True)
class InputBuilder:
    """Builds the objective's inputs; encoders are callables and run without gradients.

    ``encode_text`` maps captions to (B, L, T) and ``null`` is the null text (L, T), or the 0-dim null
    label of a class model; ``encode_image`` maps images in [-1, 1] to (B, N, F).
    """

    seed: int
    device: torch.device
    objective: ObjectiveConfig
    null: Tensor
    num_classes: int = 0
    encode_text: Callable[[Sequence[str]], Tensor] | None = None
    encode_image: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, batch: Batch, timestep_shift: float, encoded: EncoderOutputs = NOT_ENCODED
    ) -> ObjectiveInputs:
        """``encoded`` has what is encoded already; the rest is encoded here."""
        image = self._image(batch)
        _, channels, height, width = image.shape
        draws = draw(self.seed, list(batch.sample_ids), (channels, height, width), self.device)
        law = self.objective.time_law
        t = base_time(draws.normal if law == "logit_normal" else draws.uniform, law)
        if encoded.text is not None:
            condition = encoded.text
        elif batch.text_embeddings is not None:
            condition = self._embeddings(batch.text_embeddings)
        elif self.encode_text is not None:
            condition = self.encode_text(batch.captions)
        else:
            condition = self._labels(batch.labels)
        condition = drop_condition(condition, self.null, draws.dropout < self.objective.condition_dropout)
        features = encoded.features
        if features is None and self.encode_image is not None:
            features = self.encode_image(image)
        return ObjectiveInputs(image, draws.noise, shift_time(t, timestep_shift), condition, features)

    def encode(self, batch: Batch, *, text: bool, image: bool) -> EncoderOutputs:
        """What the encoders that are asked for make of a micro-batch."""
        return EncoderOutputs(
            self.encode_text(batch.captions) if text and self.encode_text is not None else None,
            self.encode_image(self._image(batch)) if image and self.encode_image is not None else None,
        )

    def _image(self, batch: Batch) -> Tensor:
        """Images (B, C, Y, X) in [-1, 1]."""
        pixels = torch.as_tensor(batch.images).to(self.device, non_blocking=True)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def _embeddings(self, embeddings: Any) -> Tensor:
        """(B, L, T) in fp32 on the device; they travel in bfloat16."""
        if not isinstance(embeddings, Tensor):
            embeddings = packed_text_embeddings(embeddings, self.null.shape, pin=self.device.type == "cuda")
        return embeddings.to(self.device, non_blocking=True).float()

    def _labels(self, labels: Sequence[int]) -> Tensor:
        if max(labels) >= self.num_classes:
            raise RunError(f"the data have class {max(labels)}, the model {self.num_classes} classes")
        # From page-locked memory: else the host waits for the device here.
        pinned_labels = torch.tensor(list(labels), pin_memory=self.device.type == "cuda")
        return pinned_labels.to(self.device, non_blocking=True)

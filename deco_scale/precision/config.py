"""Settings of mixed precision, and autocast."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

Compute = Literal["fp32", "bf16", "fp8"]
Fp8Recipe = Literal["auto", "delayed", "current", "block"]
Fp8Backend = Literal["auto", "te", "torchao"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """``bf16`` is the release's recipe: autocast, fp32 master weights, moments, EMA and losses.

    ``fp8`` is bf16 except for the linears of attention and MLP. ``fp8_recipe`` is how tensors are scaled:
    ``current`` by their own largest value, ``delayed`` by that of previous steps, ``block`` in blocks; ``auto``
    depends on the GPU (:func:`deco_scale.precision.recipe.resolve_fp8`). ``fp8_backend`` is Transformer Engine
    (``te``) or ``torchao``; ``auto`` takes the first that is installed. ``fp8_emulate`` rounds to FP8 and
    multiplies in fp32 with torchao, on any device, for tests. ``fp8_decoder_condition`` adds the pixel decoder's
    condition projection; its speed-up is not measured yet. The ``fp8_`` settings have no effect with the others.
    """

    compute: Compute = "bf16"
    fp8_recipe: Fp8Recipe = "auto"
    fp8_backend: Fp8Backend = "auto"
    fp8_emulate: bool = False
    fp8_decoder_condition: bool = False

    def __post_init__(self) -> None:
        if self.fp8_emulate and self.fp8_backend == "te":
            raise ValueError("fp8_emulate=true needs fp8_backend: torchao or auto; te has no emulation")
        torchao = self.fp8_emulate or self.fp8_backend == "torchao"
        if torchao and self.fp8_recipe not in ("auto", "current"):
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} needs fp8_backend: te; possible with torchao: auto, current"
            )


def autocast(cfg: PrecisionConfig, device: torch.device) -> AbstractContextManager[object]:
    """Context of a forward pass; in training :func:`deco_scale.precision.fp8.fp8_context` goes inside of it."""
    if cfg.compute == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

"""Which number format computes: fp32, bf16 by autocast over fp32 weights, or FP8 in the linears of the blocks.

``choice`` finds backend and recipe of FP8 for a machine, ``modules`` which linears it takes and what is left in
bf16, ``fp8`` swaps them in from outside, ``te`` holds what only Transformer Engine needs.
"""

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

    ``fp8`` is bf16 but for the linears of attention and MLP. ``fp8_recipe`` says how tensors are scaled:
    ``current`` by their own largest value, ``delayed`` by that of the steps before, ``block`` in blocks; ``auto``
    goes by the chip (:func:`deco_scale.precision.recipe.resolve_fp8`). ``fp8_backend`` is Transformer Engine
    (``te``) or ``torchao``; ``auto`` takes the first that is installed. ``fp8_emulate`` rounds to FP8 and
    multiplies in fp32, on any device, by torchao: for tests. ``fp8_decoder_condition`` adds the pixel decoder's
    condition projection; whether that pays is not yet measured. Settings of FP8 mean nothing under the others.
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
    """The context of a forward pass; one of training adds :func:`deco_scale.precision.fp8.fp8_context`."""
    if cfg.compute == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

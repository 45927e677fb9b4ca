"""Which number format computes: fp32, or bf16 by autocast over fp32 weights."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

Compute = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """``bf16`` is the release's recipe: autocast, fp32 master weights, moments, EMA and losses."""

    compute: Compute = "bf16"


def autocast(cfg: PrecisionConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context that a forward pass runs in."""
    if cfg.compute == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)

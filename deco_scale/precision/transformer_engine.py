"""Transformer Engine's FP8 linear and context, and the state of its delayed scaling; imports that package.

Written to the API and source of Transformer Engine 2.20. Not yet run on a GPU.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common import recipe as recipes

from deco_scale.errors import ConfigError
from deco_scale.precision.fp8 import Fp8Forward
from deco_scale.precision.recipe import TE_INSTALL, Recipe

HISTORY = 1024
"""Length of the amax history (Transformer Engine's default)."""
KINDS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
# One product: input, weight and output forward; gradients of output and input backward.
_SIZES = {"fwd": 3, "bwd": 2}


class TeLinear(Fp8Forward, te.Linear):  # type: ignore[misc]
    """Computes in FP8 inside of Transformer Engine's context.

    Version 2.20 registers its product as an operator, which compiled blocks trace.
    """


def te_context(recipe: Recipe) -> AbstractContextManager[object]:
    """Context in which linears of Transformer Engine compute in FP8."""
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=te_recipe(recipe))  # type: ignore[no-any-return]
    return te.fp8_autocast(enabled=True, fp8_recipe=te_recipe(recipe))  # type: ignore[no-any-return]


def te_recipe(recipe: Recipe) -> Any:
    """Transformer Engine's recipe object, with its default formats (:attr:`Fp8Choice.formats`)."""
    if recipe == "delayed":
        return recipes.DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="max", reduce_amax=True)
    name = {"current": "Float8CurrentScaling", "block": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}[recipe]
    made = getattr(recipes, name, None)
    if made is None:
        raise ConfigError(f"this Transformer Engine has no {name}; {TE_INSTALL}")
    return made()


def get_scaling(linear: nn.Module) -> dict[str, Tensor]:
    """Delayed scaling of a linear by :data:`KINDS`, fp32 copies on the CPU; initial values before its first pass.

    Reads ``fp8_meta``, where Transformer Engine keeps it: its extra state is a pickle, which 2.20 refuses to load.
    """
    scaling: dict[str, Tensor] = {}
    for way, size in _SIZES.items():
        live = linear.fp8_meta.get(f"scaling_{way}")  # type: ignore[operator,union-attr]
        scale, history = (
            (torch.ones(size), torch.zeros(HISTORY, size)) if live is None else (live.scale, live.amax_history)
        )
        scaling |= {f"scale_{way}": scale, f"amax_history_{way}": history}
    return {kind: scaling[kind].detach().to("cpu", torch.float32, copy=True) for kind in KINDS}


def set_scaling(linear: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore scales and histories of a linear, before its first pass or after.

    Values are copied into Transformer Engine's tensors, because its quantizers and the buffers that it reduces
    over ranks are views of them.
    """
    meta: dict[str, Any] = linear.fp8_meta  # type: ignore[assignment]
    if "scaling_fwd" not in meta:
        meta["num_gemms"] = 1
        linear.init_fp8_meta_tensors(te_recipe("delayed"))  # type: ignore[operator]
    # Scales saved for recomputing an earlier pass are stale.
    meta.pop("global_fp8_buffer_pos_fwd_recompute", None)
    with torch.no_grad():
        for way in _SIZES:
            meta[f"scaling_{way}"].scale.copy_(tensors[f"scale_{way}"])
            meta[f"scaling_{way}"].amax_history.copy_(tensors[f"amax_history_{way}"])

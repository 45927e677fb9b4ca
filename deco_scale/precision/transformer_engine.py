"""What only Transformer Engine needs: its context, and the state of delayed scaling.

Written to the API and source of Transformer Engine 2.20. Not yet run on a GPU.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.errors import ConfigError
from deco_scale.precision.recipe import TE_INSTALL, Recipe

HISTORY = 1024
"""Passes whose largest values delayed scaling remembers (Transformer Engine's default)."""
KINDS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
# One product: input, weight and output forward; gradients of output and input backward.
_SIZES = {"fwd": 3, "bwd": 2}


def import_te() -> Any:
    """``transformer_engine.pytorch``; raises :class:`ConfigError` that says how to get it."""
    try:
        import transformer_engine.pytorch as te
    except (ImportError, RuntimeError, OSError) as error:
        # A build for another PyTorch or CUDA fails with any of the three.
        raise ConfigError(f"Transformer Engine cannot be imported ({error}); {TE_INSTALL}") from error
    return te


def te_context(recipe: Recipe) -> AbstractContextManager[object]:
    """Linears of Transformer Engine compute in FP8 inside of it."""
    te = import_te()
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=te_recipe(recipe))  # type: ignore[no-any-return]
    return te.fp8_autocast(enabled=True, fp8_recipe=te_recipe(recipe))  # type: ignore[no-any-return]


def te_recipe(recipe: Recipe) -> Any:
    """The recipe object; its formats are Transformer Engine's defaults, those of :attr:`Fp8Choice.formats`."""
    import_te()
    from transformer_engine.common import recipe as recipes

    if recipe == "delayed":
        return recipes.DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="max", reduce_amax=True)
    name = {"current": "Float8CurrentScaling", "block": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}[recipe]
    made = getattr(recipes, name, None)
    if made is None:
        raise ConfigError(f"this Transformer Engine has no {name}; {TE_INSTALL}")
    return made()


def get_scaling(linear: nn.Module) -> dict[str, Tensor]:
    """Delayed scaling of a linear by :data:`KINDS`, fp32 copies on the CPU; before its first pass a fresh start's.

    Reads ``fp8_meta``, where Transformer Engine keeps it: its extra state is a pickle, which 2.20 refuses to load.
    """
    found: dict[str, Tensor] = {}
    for way, size in _SIZES.items():
        live = linear.fp8_meta.get(f"scaling_{way}")  # type: ignore[operator,union-attr]
        scale, history = (
            (torch.ones(size), torch.zeros(HISTORY, size)) if live is None else (live.scale, live.amax_history)
        )
        found |= {f"scale_{way}": scale, f"amax_history_{way}": history}
    return {kind: found[kind].detach().to("cpu", torch.float32, copy=True) for kind in KINDS}


def set_scaling(linear: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a linear its scales and histories back, before its first pass or after.

    They are copied into the tensors that Transformer Engine has or makes here, never put in their place: its
    quantizers and the buffers that it reduces over ranks hold views of them.
    """
    meta: dict[str, Any] = linear.fp8_meta  # type: ignore[assignment]
    if "scaling_fwd" not in meta:
        meta["num_gemms"] = 1
        linear.init_fp8_meta_tensors(te_recipe("delayed"))  # type: ignore[operator]
    # Scales of a pass before, kept for its recomputing, are not those of what is loaded.
    meta.pop("global_fp8_buffer_pos_fwd_recompute", None)
    with torch.no_grad():
        for way in _SIZES:
            meta[f"scaling_{way}"].scale.copy_(tensors[f"scale_{way}"])
            meta[f"scaling_{way}"].amax_history.copy_(tensors[f"amax_history_{way}"])

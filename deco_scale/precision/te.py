"""What only Transformer Engine needs: its linear, its context, and the state of delayed scaling.

Written to the API of Transformer Engine 2.x (documentation of 2.20). Not yet run on a GPU.
"""

import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.errors import ConfigError
from deco_scale.precision.choice import TE_INSTALL, Recipe

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


def te_linear(in_features: int, out_features: int, *, bias: bool) -> nn.Module:
    """``te.Linear`` without storage, whose parameters are called ``weight`` and ``bias`` as in ``nn.Linear``."""
    linear: nn.Module = import_te().Linear(
        in_features, out_features, bias=bias, params_dtype=torch.float32, device="meta"
    )
    return linear


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
    """Delayed scaling of a linear by :data:`KINDS`; before its first pass that of a fresh start.

    Reads the linear's extra state, which Transformer Engine pickles; the bytes come from this process.
    """
    packed = linear.get_extra_state()
    if packed is None or packed.numel() == 0:
        fresh: dict[str, Tensor] = {}
        for way, size in _SIZES.items():
            fresh |= {f"scale_{way}": torch.ones(size), f"amax_history_{way}": torch.zeros(HISTORY, size)}
        return {kind: fresh[kind] for kind in KINDS}
    state = pickle.loads(packed.cpu().numpy().tobytes())  # noqa: S301 - made by this process
    return {kind: state[kind].float().cpu() for kind in KINDS}


def set_scaling(linear: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Hand scales and histories to a linear through its extra state; nothing unpickled comes from a file."""
    recipe = te_recipe("delayed")
    formats = recipe.fp8_format.value
    extra = {
        "fp8_checkpoint": True,
        "num_gemms": 1,
        "fp8_max_fwd": formats.max_fwd,
        "fp8_max_bwd": formats.max_bwd,
    }
    state = {
        "recipe": recipe,
        **{kind: tensors[kind].float().cpu() for kind in KINDS},
        "extra_fp8_variables": extra,
    }
    linear.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8))

"""Replaces linears by FP8 ones, whose weights keep their names, shapes and fp32."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deco_scale.errors import ConfigError
from deco_scale.precision.fp8_plan import Fp8Linear, Fp8Plan
from deco_scale.precision.linears import Fp8Forward
from deco_scale.precision.scaling import STATE_PREFIX

LINEAR_CLASSES = {
    "te": "deco_scale.precision.linear_te.TeLinear",
    "torchao": "deco_scale.precision.linear_torchao.TorchaoLinear",
}
"""Import paths of the FP8 linears, by backend."""


def apply_fp8(denoiser: nn.Module, plan: Fp8Plan, *, bias_share: int = 1, release_weights: bool = False) -> None:
    """Replace the plan's linears in place (any device, meta and ZeRO-3's partitions included).

    ``bias_share``: number of ranks whose results of a row-split linear are summed; each adds its share of the
    bias. ``release_weights``: save no gathered weight for backward but look it up again, as ZeRO-3 needs (torchao
    only; Transformer Engine saves the parameter itself and its FP8 copies). Raises :class:`ConfigError` if the
    backend cannot be imported.
    """
    make = _te_linear if plan.choice.backend == "te" else _torchao_linear
    for linear in plan.linears:
        old = denoiser.get_submodule(linear.name)
        new = make(linear, plan)
        # The same parameter objects, because DeepSpeed's have attributes.
        new.weight = old.weight
        if linear.has_bias:
            new.bias = old.bias
        new.has_bias = linear.has_bias
        new.bias_share = bias_share if linear.split == "row" and linear.has_bias else 1
        new.release_weight = release_weights and plan.choice.backend == "torchao"
        parent, _, name = linear.name.rpartition(".")
        setattr(denoiser.get_submodule(parent), name, new)


def fp8_context(plan: Fp8Plan | None) -> AbstractContextManager[object]:
    """Context of a training forward pass, inside of :func:`deco_scale.precision.config.autocast`."""
    if plan is None or plan.choice.backend != "te":
        return nullcontext()
    from deco_scale.precision.transformer_engine import te_context

    return te_context(plan.choice.recipe)


def checkpoint_function(plan: Fp8Plan | None) -> Callable[..., Any]:
    """The activation checkpointing function, to be used with ``use_reentrant=False``.

    Transformer Engine's own re-enters its FP8 context in backward, where PyTorch's would recompute in bf16, and
    recomputes with the scales of the first pass under delayed scaling (NVIDIA/TransformerEngine issue 415).
    """
    if plan is None or plan.choice.backend != "te":
        return checkpoint
    from deco_scale.precision.transformer_engine import import_te

    return import_te().checkpoint  # type: ignore[no-any-return]


def scaling_state(denoiser: nn.Module, plan: Fp8Plan | None) -> dict[str, Tensor]:
    """Amax history and scales of delayed scaling, fp32 copies on the CPU; empty for other recipes.

    Names are ``fp8.denoiser.<linear>.<kind>``. Values are the same on every rank, because amax is reduced over all
    ranks.
    """
    if plan is None or plan.choice.recipe != "delayed":
        return {}
    from deco_scale.precision.transformer_engine import get_scaling

    return {
        f"{STATE_PREFIX}denoiser.{linear.name}.{kind}": tensor
        for linear in plan.linears
        for kind, tensor in get_scaling(denoiser.get_submodule(linear.name)).items()
    }


def load_scaling_state(denoiser: nn.Module, plan: Fp8Plan | None, state: Mapping[str, Tensor]) -> None:
    """Restore the scaling of linears; a linear whose tensors are missing from ``state`` starts afresh."""
    if plan is None or plan.choice.recipe != "delayed":
        return
    from deco_scale.precision.transformer_engine import KINDS, set_scaling

    for linear in plan.linears:
        names = {kind: f"{STATE_PREFIX}denoiser.{linear.name}.{kind}" for kind in KINDS}
        if all(name in state for name in names.values()):
            set_scaling(denoiser.get_submodule(linear.name), {kind: state[name] for kind, name in names.items()})


def _torchao_linear(linear: Fp8Linear, plan: Fp8Plan) -> Fp8Forward:
    try:
        from deco_scale.precision.linear_torchao import torchao_linear
    except ImportError as error:
        raise ConfigError(f"precision.fp8_backend=torchao needs torchao: pip install torchao ({error})") from error
    return torchao_linear(linear.in_features, linear.out_features, emulate=plan.choice.emulate)


def _te_linear(linear: Fp8Linear, plan: Fp8Plan) -> Fp8Forward:
    from deco_scale.precision.transformer_engine import import_te

    import_te()
    from deco_scale.precision.linear_te import te_linear

    return te_linear(linear.in_features, linear.out_features, bias=linear.has_bias)

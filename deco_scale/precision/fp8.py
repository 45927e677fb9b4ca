"""Replaces linears by FP8 ones, whose weights keep their names, shapes and fp32; their scaling in a checkpoint."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deco_scale.errors import ConfigError
from deco_scale.precision.fp8_plan import Fp8Linear, Fp8Plan
from deco_scale.precision.recipe import import_te

LINEAR_CLASSES = {
    "te": "deco_scale.precision.transformer_engine.TeLinear",
    "torchao": "deco_scale.precision.linear_torchao.TorchaoLinear",
}
"""Import paths of the FP8 linears, by backend."""
STATE_PREFIX = "fp8."
"""Of the names of scaling state in a checkpoint, which only delayed scaling has."""


class Fp8Forward(nn.Module):
    """Mixin before a backend's linear class, whose ``forward`` it calls.

    Without gradients (sampling between steps) it computes in autocast's dtype like any linear, because a sampler's
    batches have shapes that FP8 may not take. ``bias_share`` and ``release_weight``: see :func:`apply_fp8`.

    A class, because ``torch.compile`` shares one graph between modules that run the same code. A ``forward`` set
    on each instance would need a graph in each block, and blocks beyond Dynamo's limit would run eagerly.
    """

    has_bias: bool
    bias_share: int = 1
    release_weight: bool = False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # torchao looks at CUDA's autocast only.
            x = x.to(torch.get_autocast_dtype(device))
        return self._with_bias_share(x) if self.bias_share > 1 else self._linear(x)

    def _with_bias_share(self, x: Tensor) -> Tensor:
        # Takes precedence over the parameter of the same name.
        self.__dict__["bias"] = self._parameters["bias"] / self.bias_share  # type: ignore[operator]
        try:
            return self._linear(x)
        finally:
            del self.__dict__["bias"]

    def _linear(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias if self.has_bias else None)  # type: ignore[arg-type]
        return self._without_kept_weight(x) if self.release_weight else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """The backend's linear."""
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def _without_kept_weight(self, x: Tensor) -> Tensor:
        """Save None in place of a view of the weight, which would keep the gathered weight alive."""

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor._is_view() and tensor._base is self.weight else tensor

        def unpack(packed: Tensor | None) -> Tensor:
            # torchao saves the transposed weight.
            return self.weight.detach().t() if packed is None else packed  # type: ignore[operator,union-attr]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self._product(x)


def apply_fp8(denoiser: nn.Module, plan: Fp8Plan, *, bias_share: int = 1, release_weights: bool = False) -> None:
    """Replace the plan's linears in place (any device, meta and ZeRO-3's partitions included).

    ``bias_share``: number of ranks whose results of a row-split linear are summed; each adds its share of the
    bias. ``release_weights``: save no gathered weight for backward but look it up again, as ZeRO-3 needs (torchao
    only; Transformer Engine saves the parameter itself and its FP8 copies). Raises :class:`ConfigError` if the
    backend cannot be imported.
    """
    for linear in plan.linears:
        old, new = denoiser.get_submodule(linear.name), _linear_of(linear, plan)
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
    from deco_scale.precision.transformer_engine import te

    return te.checkpoint  # type: ignore[no-any-return]


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


def unmatched_scaling(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Names of scaling state that only the checkpoint or only the run has, and log lines about them.

    A checkpoint fits a run without it, because scaling is not part of the model.
    """
    only_run = {n for n in expected if n.startswith(STATE_PREFIX)} - set(stored)
    only_checkpoint = {n for n in stored if n.startswith(STATE_PREFIX)} - set(expected)
    lines = []
    if only_run:
        lines.append(
            f"FP8: {_linears_of(only_run)} linears start with fresh scaling; the checkpoint has none of theirs"
        )
    if only_checkpoint:
        lines.append(f"FP8: the checkpoint's scaling of {_linears_of(only_checkpoint)} linears is not used")
    return only_run | only_checkpoint, lines


def _linears_of(names: set[str]) -> int:
    return len({name.rpartition(".")[0] for name in names})


def _linear_of(linear: Fp8Linear, plan: Fp8Plan) -> Fp8Forward:
    if plan.choice.backend == "te":
        make = import_te().TeLinear
        sizes = linear.in_features, linear.out_features
        return make(*sizes, bias=linear.has_bias, params_dtype=torch.float32, device="meta")  # type: ignore[no-any-return]
    try:
        from deco_scale.precision.linear_torchao import torchao_linear
    except ImportError as error:
        raise ConfigError(f"precision.fp8_backend=torchao needs torchao: pip install torchao ({error})") from error
    return torchao_linear(linear.in_features, linear.out_features, emulate=plan.choice.emulate)

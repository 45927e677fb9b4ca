"""Tensor and sequence parallelism applied to a finished objective, from outside.

Between blocks each rank holds its own tokens. Attention and MLP gather tokens at their entry, compute on local
heads or hidden units, and scatter the sum of the partial results (:mod:`deco_scale.parallel.token_routing`, which
Megatron's linears use as well); everything else (norms, modulation, pixel decoder, losses) works on the rank's own
tokens without communication. Parameters are DTensors, which FSDP2 and checkpoints understand; modules see the
local part of each weight, as a plain tensor, while they run.

PyTorch's ``parallelize_module`` does not fit: it cuts 9 tokens over 4 ranks as 3, 3, 3, 0, where here parts differ
by at most one token (3, 2, 2, 2); the pixel decoder folds weights of linears that it never calls, and would meet
DTensors, which Triton kernels, FP8 linears and compiled blocks do not take either; and the gradients of weights
that no style names would not be summed over tp.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from deco_scale.models.stored_names import stored_names
from deco_scale.models.tp_plan import split_dim
from deco_scale.objectives import Objective
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.parallel.token_routing import route_tokens


def apply_tensor_parallel(objective: Objective, mesh: DeviceMesh) -> TokenShard:
    """Split parameters over the one-dimensional ``mesh`` (meta device or real), and install the collectives.

    Transformer blocks and decoder need :func:`show_local_weights` as well.
    """
    shard = TokenShard(mesh.get_group())
    for path, module in objective.named_modules():
        for name, parameter in dict(module.named_parameters(recurse=False)).items():
            setattr(module, name, _distribute(f"{path}.{name}", parameter, mesh))
    route_tokens(objective, shard)
    inside = {module for unit in objective.denoiser.units for module in unit.modules()}
    for module in objective.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda m, args: _show_local_weights(m))
            module.register_forward_hook(lambda m, args, output: _hide_local_weights(m), always_call=True)
    return shard


def show_local_weights(unit: nn.Module) -> None:
    """Wrap ``unit.forward`` so that it sees local weights: around compiled code, which must not see DTensors, and
    beneath activation checkpointing, which calls it again."""
    unit.forward = functools.partial(_with_local_weights, unit, unit.forward)  # type: ignore[method-assign]


def _with_local_weights(unit: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    for module in unit.modules():
        _show_local_weights(module)
    try:
        return forward(*args)
    finally:
        for module in unit.modules():
            _hide_local_weights(module)


def tp_part(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """The tp rank's slice of a full tensor, or of each of the stored tensors that it holds."""
    dim, count = split_dim(name), len(stored_names(name))
    if dim is None or size == 1:
        return full
    slices = [stored.chunk(size, dim)[rank] for stored in full.chunk(count)]
    return torch.cat(slices) if count > 1 else slices[0]


def tp_placement(name: str) -> Placement:
    """How a parameter lies on the tp axis of a mesh."""
    dim = split_dim(name)
    return Replicate() if dim is None else Shard(dim)


def _distribute(name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    local = tp_part(name, parameter.detach(), mesh.get_local_rank(), mesh.size()).contiguous()
    return nn.Parameter(DTensor.from_local(local, mesh, [tp_placement(name)], run_check=False))


def _show_local_weights(module: nn.Module) -> None:
    """Put the local part of each weight where the module will look it up first.

    Each rank computes a replicated weight's gradient from its own tokens or heads only, so the ranks' results
    are parts of a sum. A row-split linear is followed by a sum over ranks: its bias goes in once.
    """
    weight = getattr(module, "weight", None)
    row_split = isinstance(weight, DTensor) and weight.placements == (Shard(1),)
    for name, parameter in module.named_parameters(recurse=False):
        if not isinstance(parameter, DTensor):
            continue
        placements = [Partial() if p == Replicate() else p for p in parameter.placements]
        local = parameter.to_local(grad_placements=placements)
        if row_split and name == "bias":
            local = local / parameter.device_mesh.size()
        module.__dict__[name] = local


def _hide_local_weights(module: nn.Module) -> None:
    for name, _ in module.named_parameters(recurse=False):
        module.__dict__.pop(name, None)

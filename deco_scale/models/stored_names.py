"""Names and shapes of stored tensors, where one parameter holds several of them.

Gate and up of a SwiGLU are one parameter, so that they are one GEMM. Checkpoints, exports and digests keep them
apart, with the same names and shapes for any layout. A parameter holds its parts one after another along dimension
0. A tp rank's parameter holds the rank's slice of each part, so that it computes like a whole one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FUSED = {"mlp.gate_up.weight": ("mlp.gate.weight", "mlp.up.weight")}
"""Ends of the names of parameters and of the tensors that they hold."""


def stored_names(parameter: str) -> tuple[str, ...]:
    """Names of the tensors that a parameter holds, in their order; its own where it is stored as it is."""
    for end, parts in FUSED.items():
        if parameter.endswith(end):
            return tuple(parameter.removesuffix(end) + part for part in parts)
    return (parameter,)


def part_of(name: str) -> tuple[str, int, int]:
    """The parameter that holds a stored tensor, the tensor's index among its parts, and their number."""
    for end, parts in FUSED.items():
        for index, part in enumerate(parts):
            if name.endswith(part):
                return name.removesuffix(part) + end, index, len(parts)
    return name, 0, 1


def to_stored(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors of whole parameters (or their gradients, moments), as views."""
    stored: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        names = stored_names(name)
        stored |= {name: tensor} if len(names) == 1 else dict(zip(names, tensor.chunk(len(names)), strict=True))
    return stored


def from_stored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of stored tensors, in their order; the parts of an incomplete parameter stay as they are."""
    parameters: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        parameter, _, _ = part_of(name)
        names = stored_names(parameter)
        if len(names) == 1 or not all(n in stored for n in names):
            parameters[name] = tensor
        elif name == names[0]:
            parameters[parameter] = torch.cat([stored[n] for n in names])
    return parameters

"""Every parameter of a denoiser with its part on a rank, for a mesh that need not exist."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.tp_plan import Split, check_tp, split_dim, split_of
from deco_scale.parallel.mesh import ParallelDims

UNITS = ("blocks.", "text_blocks.", "decoder.")
"""Prefixes of the parameters that FSDP shards module by module; the rest is the root's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of the layout table; ``local_bytes`` is a rank's share in fp32."""

    name: str
    global_shape: tuple[int, ...]
    split: Split
    tp_shape: tuple[int, ...]
    local_bytes: int

    @property
    def tp_numel(self) -> int:
        """Elements of a tp rank's part."""
        return math.prod(self.tp_shape)


@lru_cache(maxsize=32)
def _parameters(cfg: ModelConfig) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
    """Name and shape of every parameter, and whether a linear owns it."""
    with torch.device("meta"):
        model = Denoiser(cfg)
    linears = tuple(path + "." for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return tuple(
        (name, tuple(parameter.shape), name[: name.rfind(".") + 1] in linears)
        for name, parameter in model.named_parameters()
    )


def weights_of_linears(cfg: ModelConfig) -> frozenset[str]:
    """Names of the denoiser's parameters that linears own, biases included."""
    return frozenset(name for name, _, of_linear in _parameters(cfg) if of_linear)


@lru_cache(maxsize=512)
def layout_rows(cfg: ModelConfig, dims: ParallelDims) -> tuple[Row, ...]:
    """The plan of each parameter of the denoiser for a mesh; FSDP and ZeRO-3 cut ``tp_shape`` over dp_shard."""
    check_tp(cfg, dims.tp)
    rows = []
    for name, global_shape, _ in _parameters(cfg):
        shape, dim = list(global_shape), split_dim(name)
        if dim is not None:
            shape[dim] //= dims.tp
        local_numel = -(-shape[0] // dims.dp_shard) * math.prod(shape[1:])
        rows.append(Row(name, global_shape, split_of(name), tuple(shape), 4 * local_numel))
    return tuple(rows)

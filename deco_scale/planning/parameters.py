"""Every parameter of a denoiser with its part on a rank, for a mesh that need not exist."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.tp_plan import Split, check_tp, split_dim, split_of
from deco_scale.parallel.mesh import ParallelDims


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
    return tuple(_rows(cfg, dims))


def _rows(cfg: ModelConfig, dims: ParallelDims) -> Iterator[Row]:
    check_tp(cfg, dims.tp)
    for name, whole, _ in _parameters(cfg):
        shape = list(whole)
        dim = split_dim(name)
        if dim is not None:
            shape[dim] //= dims.tp
        local = -(-shape[0] // dims.dp_shard) * int(torch.Size(shape[1:]).numel())
        yield Row(name, whole, split_of(name), tuple(shape), 4 * local)

"""The parallel plan: for every parameter, how it is split over the tp axis. One table for every engine.

Linears inside attention and MLP are split by heads or hidden units; all else is replicated, and its gradient,
of which each rank computes the part of its own tokens, is summed over tp.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import nn

from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.parallel.mesh import ParallelDims

Split = Literal["column", "row", "replicated"]
COLUMN = ("attn.qkv", "attn.context_kv", "mlp.gate", "mlp.up")
"""Outputs split: dimension 0 of the weight; whole heads, since their rows are ordered by head."""
ROW = ("attn.proj", "mlp.down")
"""Inputs split: dimension 1 of the weight; outputs are partial sums, the bias is replicated."""


def split_of(name: str) -> Split:
    """How the parameter ``name`` (canonical, with or without prefix) is split over tp."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module.endswith(COLUMN):
        return "column"
    if kind == "weight" and module.endswith(ROW):
        return "row"
    return "replicated"


def split_dim(name: str) -> int | None:
    """Dimension that is cut over tp, or None."""
    return {"column": 0, "row": 1, "replicated": None}[split_of(name)]


def check_tp(cfg: ModelConfig, tp: int) -> None:
    """Raise :class:`ConfigError` with the possible degrees where ``tp`` does not fit the model."""
    possible = [n for n in range(1, cfg.num_heads + 1) if _fits(cfg, n)]
    if not _fits(cfg, tp):
        raise ConfigError(
            f"parallel.tp={tp} must divide model.num_heads={cfg.num_heads} and the MLP's "
            f"{cfg.mlp_hidden_dim} hidden units; possible: {possible}"
        )
    if tp > 1 and cfg.patch_size % 8:
        raise ConfigError(
            f"parallel.tp={tp} needs model.patch_size={cfg.patch_size} to be a multiple of 8: DCT blocks of "
            "the frequency loss must lie inside patches, which are spread over ranks"
        )


def _fits(cfg: ModelConfig, tp: int) -> bool:
    return cfg.num_heads % tp == 0 and cfg.mlp_hidden_dim % tp == 0


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
def layout_rows(cfg: ModelConfig, layout: ParallelDims) -> tuple[Row, ...]:
    """The plan of each parameter of the denoiser for a mesh; FSDP and ZeRO-3 cut ``tp_shape`` over dp_shard."""
    return tuple(_rows(cfg, layout))


def _rows(cfg: ModelConfig, layout: ParallelDims) -> Iterator[Row]:
    check_tp(cfg, layout.tp)
    for name, whole, _ in _parameters(cfg):
        shape = list(whole)
        dim = split_dim(name)
        if dim is not None:
            shape[dim] //= layout.tp
        local = -(-shape[0] // layout.dp_shard) * int(torch.Size(shape[1:]).numel())
        yield Row(name, whole, split_of(name), tuple(shape), 4 * local)

"""The tensor-parallel plan: how each parameter is split over tp, for engines, FP8 and checkpoints.

A table of names beside the model, like Hugging Face's ``base_model_tp_plan``. Linears of attention and MLP are
split by heads or hidden units. Everything else is replicated: each rank computes the part of the gradient that
comes from its own tokens, and the parts are summed over tp.
"""

from typing import Literal

from deco_scale.errors import ConfigError
from deco_scale.models.config import ModelConfig

Split = Literal["column", "row", "replicated"]
COLUMN = ("attn.qkv", "attn.context_kv", "mlp.gate_up", "mlp.gate", "mlp.up")
"""Outputs are split: dimension 0 of the weight, by whole heads, because its rows are ordered by head; of
``mlp.gate_up`` both halves, which are stored as ``mlp.gate`` and ``mlp.up``."""
ROW = ("attn.proj", "mlp.down")
"""Inputs are split: dimension 1 of the weight; outputs are partial sums, the bias is replicated."""


def split_of(name: str) -> Split:
    """How the parameter ``name`` (canonical, with or without prefix) is split over tp."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and module.endswith(COLUMN):
        return "column"
    if kind == "weight" and module.endswith(ROW):
        return "row"
    return "replicated"


def split_dim(name: str) -> int | None:
    """Dimension that is split over tp, or None."""
    return {"column": 0, "row": 1, "replicated": None}[split_of(name)]


def check_tp(cfg: ModelConfig, tp: int) -> None:
    """Raise :class:`ConfigError` with the possible degrees if ``tp`` does not fit the model."""
    possible = [n for n in range(1, cfg.num_heads + 1) if not (cfg.num_heads % n or cfg.mlp_hidden_dim % n)]
    if tp not in possible:
        raise ConfigError(
            f"parallel.tp={tp} must divide model.num_heads={cfg.num_heads} and the MLP's "
            f"{cfg.mlp_hidden_dim} hidden units; possible: {possible}"
        )
    if tp > 1 and cfg.patch_size % 8:
        raise ConfigError(
            f"parallel.tp={tp} needs model.patch_size={cfg.patch_size} to be a multiple of 8: DCT blocks of "
            "the frequency loss must lie inside patches, which are spread over ranks"
        )


def part_sizes(count: int, parts: int) -> list[int]:
    """Sizes of ``parts`` consecutive parts of ``count`` that differ by at most one; longer ones come first."""
    short, longer = divmod(count, parts)
    return [short + (i < longer) for i in range(parts)]

"""Settings of parallelism."""

from dataclasses import dataclass, field
from typing import Any, Literal

from deco_scale.models.config import ActivationCheckpointing

EngineName = Literal["fsdp", "deepspeed"]
ZeroStage = Literal[0, 1, 2, 3]
ReduceDtype = Literal["fp32", "bf16"]
BLOCKS_GATHERED = 4
"""Transformer blocks whose weights fsdp gathers together, and whose gradients it reduces together, where weights
stay gathered after forward: each gather and reduction takes host time. Elsewhere each block is a unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Engine and degrees of parallelism; ``dp_shard`` -1 takes all remaining ranks.

    ``activation_checkpointing`` recomputes blocks in backward, fully or without matrix products and attention
    (``selective``). ``reshard_after_forward`` false keeps gathered weights through forward, backward and
    accumulation (fsdp and ZeRO-3); ``auto`` does where the plan's memory allows. ``reduce_dtype`` is what fsdp
    reduces gradients in; DeepSpeed reduces those of linears in the compute type.
    """

    engine: EngineName = "fsdp"
    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1
    activation_checkpointing: ActivationCheckpointing = "none"
    reshard_after_forward: Literal["auto"] | bool = "auto"
    reduce_dtype: ReduceDtype = "fp32"
    zero_stage: ZeroStage = 3
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard={self.dp_shard} must be positive, or -1 for all other ranks")
        if self.engine == "fsdp":
            return
        if self.tp > 1 and self.zero_stage == 0:
            raise ValueError(f"zero_stage=0 does not work with tp={self.tp}; possible: 1, 2, 3")
        if self.zero_stage == 3 and self.activation_checkpointing == "selective":
            # ZeRO-3 gathers weights inside the block, and those operations differ between the two passes.
            raise ValueError(
                "activation_checkpointing=selective does not work with zero_stage=3; possible: none, full, "
                "or selective with zero_stage 0, 1, 2 or engine: fsdp"
            )
        if self.reduce_dtype != "fp32":
            raise ValueError(
                f"reduce_dtype={self.reduce_dtype} needs engine: fsdp; possible: fp32, which leaves to DeepSpeed "
                "that it reduces gradients of linears in the compute type"
            )
        if self.dp_replicate > 1:
            raise ValueError("dp_replicate > 1 (HSDP) needs engine: fsdp")

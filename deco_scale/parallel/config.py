"""Settings of parallelism."""

from dataclasses import dataclass, field
from typing import Any, Literal

from deco_scale.models.config import ActivationCheckpointing

EngineName = Literal["fsdp", "deepspeed"]
ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Engine and degrees of parallelism; ``dp_shard`` -1 takes all remaining ranks.

    ``activation_checkpointing`` recomputes blocks in backward, fully or without matrix products and attention
    (``selective``).
    """

    engine: EngineName = "fsdp"
    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1
    activation_checkpointing: ActivationCheckpointing = "none"
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
        if self.dp_replicate > 1:
            raise ValueError("dp_replicate > 1 (HSDP) needs engine: fsdp")

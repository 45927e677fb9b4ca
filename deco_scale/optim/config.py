"""Settings of AdamW and the EMA."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with gradient clipping by global norm, and the EMA of the denoiser's weights."""

    weight_decay: float = 0.0
    eps: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1)")

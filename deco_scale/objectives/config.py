"""Settings of the losses."""

from dataclasses import dataclass
from typing import Literal

TimeDistribution = Literal["logit_normal", "uniform"]
Prediction = Literal["velocity", "image"]
"""What the network predicts."""
FrequencyMode = Literal["inv_gamma", "inv"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Losses of DeCo; a loss with weight 0 is not computed.

    ``time_law`` is the distribution of times. ``prediction`` is what the network predicts: the velocity, or the
    clean image as in JiT (arXiv 2511.13720), whose velocity is (image - x_t) / max(1 - t, ``t_eps``). The losses
    compare velocities in both cases.
    """

    time_law: TimeDistribution = "logit_normal"
    prediction: Prediction = "velocity"
    t_eps: float = 0.05
    freq_weight: float = 1.0
    freq_quality: int = 85
    freq_gamma: float = 1.0
    freq_mode: FrequencyMode = "inv_gamma"
    repa_weight: float = 0.5
    repa_layer: int = 6
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.freq_weight < 0 or self.repa_weight < 0:
            raise ValueError("freq_weight and repa_weight must not be negative")
        if not 0 < self.t_eps <= 1:
            raise ValueError(f"t_eps={self.t_eps} must be above 0 and at most 1")
        if not 1 <= self.freq_quality <= 100:
            raise ValueError(f"freq_quality={self.freq_quality} must be 1..100")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout={self.condition_dropout} must be in [0, 1)")
        if self.repa_layer < 1:
            raise ValueError(f"repa_layer={self.repa_layer} counts DiT blocks from 1")

"""Settings of sampling: how to integrate, and the images that training draws."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Solver = Literal["euler", "heun", "adams"]
MAX_ORDER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How to integrate; the defaults are the release's text-to-image settings.

    ``order`` is that of ``adams``, 1 to 4; ``euler`` and ``heun`` have no choice. Guidance acts for times above
    ``guidance_min`` and up to ``guidance_max``. ``guidance_rescale``, 0 to 1, keeps strong guidance from raising
    the contrast (:func:`deco_scale.sampling.guidance.rescaled`).
    """

    solver: Solver = "adams"
    num_steps: int = 25
    order: int = 2
    guidance: float = 4.0
    guidance_min: float = 0.0
    guidance_max: float = 1.0
    guidance_rescale: float = 0.0
    timestep_shift: float = 3.0

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("solver", self.solver in get_args(Solver), f"one of {get_args(Solver)}"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("order", 1 <= self.order <= MAX_ORDER, f"1..{MAX_ORDER}"),
            ("guidance", math.isfinite(self.guidance), "a finite number"),
            ("timestep_shift", 0 < self.timestep_shift < math.inf, "positive and finite"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "in [0, 1]"),
        ):
            if not is_valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {expected}")
        if not 0 <= self.guidance_min <= self.guidance_max <= 1:
            raise ValueError(f"guidance interval ({self.guidance_min}, {self.guidance_max}) must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleImagesConfig:
    """Images drawn with EMA weights while training, one per prompt or class, each ``every`` steps (0: never)."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every={self.every} must not be negative")
        if self.every and bool(self.prompts) == bool(self.classes):
            raise ValueError("give prompts (text models) or classes (class models) to draw images of")

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
    the contrast (:func:`deco_scale.sampling.samplers.rescaled`).
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
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver={self.solver!r} is none of {get_args(Solver)}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order={self.order} must be 1..{MAX_ORDER}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance} must be a finite number")
        if not 0 < self.timestep_shift < math.inf:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive and finite")
        if not 0 <= self.guidance_min <= self.guidance_max <= 1:
            raise ValueError(f"guidance interval ({self.guidance_min}, {self.guidance_max}) must lie in [0, 1]")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale={self.guidance_rescale} must lie in [0, 1]")


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

"""Learning rate of a step: warmup, a schedule, and scaling with the batch.

Pure functions of the step: nothing is stored, so that a resume, a rollback or a skipped update changes no rate.
The factors are those of ``torch.optim.lr_scheduler``: ``SequentialLR`` of ``LinearLR`` (warmup), a constant or
``CosineAnnealingLR``, and for ``wsd`` a second ``LinearLR`` (decay), in closed form.
"""

import math
from dataclasses import dataclass
from typing import Literal

LrScaling = Literal["none", "sqrt", "linear"]
_EXPONENTS: dict[LrScaling, float] = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class LrScheduleConfig:
    """Course of the learning rate over a stage.

    It rises linearly over the first ``warmup_steps``. ``constant`` then stays; ``cosine`` falls over the rest of
    the stage; ``wsd`` (warmup-stable-decay, arXiv 2404.06395) stays and falls linearly over the last
    ``decay_steps``. Both fall towards ``min_lr_ratio`` times the stage's rate, which the step after the last would
    have.
    """

    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps={self.decay_steps} with kind={self.kind}: kind wsd needs decay_steps of at least 1, "
                "the others take none (cosine falls from the end of the warmup to the end of the stage)"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must be in [0, 1]")

    def factor(self, step: int, *, steps: int) -> float:
        """What multiplies the stage's learning rate in its step ``step`` of ``steps`` (counted from 1)."""
        done = step - 1
        if done < self.warmup_steps:
            return step / self.warmup_steps
        falling = 1 - self.min_lr_ratio
        if self.kind == "cosine":
            share = (done - self.warmup_steps) / (steps - self.warmup_steps)
            return self.min_lr_ratio + falling * (1 + math.cos(math.pi * share)) / 2
        if self.kind == "wsd":
            return 1 - falling * max(0, done - (steps - self.decay_steps)) / self.decay_steps
        return 1.0


def batch_factor(scaling: LrScaling, *, batch: int, reference_batch: int) -> float:
    """What multiplies the learning rate of ``reference_batch`` for another global batch, both in images.

    ``linear``: Goyal et al., arXiv 1706.02677, for SGD. ``sqrt``: Malladi et al., arXiv 2205.10287, for Adam.
    """
    return (batch / reference_batch) ** _EXPONENTS[scaling]

"""Classifier-free guidance: one batched call for the conditional and the unconditional velocity.

Shape letters: B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``velocity(x, t_B, condition)`` of a plain conditional model, of x's shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """v_null + scale * (v_cond - v_null) for times in the interval, scale 1 outside.

    The interval is open below; above it is closed for one-step solvers and open for multistep ones,
    as in the release. Times are compared in fp32.
    """

    scale: float
    interval_min: float = 0.0
    interval_max: float = 1.0
    closed_above: bool = True

    def scale_at(self, t: Tensor) -> float:
        """Guidance weight at the 0-dim time ``t``, compared in fp32 as the release does."""
        low, high = torch.tensor([self.interval_min, self.interval_max], dtype=torch.float32)
        now = t.float().cpu()
        below = now <= high if self.closed_above else now < high
        return self.scale if bool((now > low) & below) else 1.0


def guided_velocity(
    velocity: VelocityFn, x: Tensor, t: Tensor, condition: Tensor, null: Tensor, scale: float
) -> Tensor:
    """Guided velocity at the 0-dim time ``t``; without guidance only the conditional half is computed."""
    t_B = t.expand(x.shape[0])
    if scale == 1.0:
        return velocity(x, t_B, condition)
    both = velocity(torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([null, condition]))
    v_null, v_cond = both.chunk(2)
    return v_null + scale * (v_cond - v_null)

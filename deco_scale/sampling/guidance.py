"""Classifier-free guidance of velocities (Ho and Salimans 2022), within an interval of times.

Shape letters: B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deco_scale.sampling.config import SamplerConfig

VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``velocity(x, t_B, condition)`` of a plain conditional model, of x's shape."""


def guidance_at(cfg: SamplerConfig, t: Tensor) -> float:
    """Guidance weight at the 0-dim time ``t``: that of ``cfg`` within its interval, 1 outside.

    The interval is open below; above it is closed for one-step solvers and open for multistep ones. Times are
    compared in fp32. All of this is as in the release.
    """
    low, high = torch.tensor([cfg.guidance_min, cfg.guidance_max], dtype=torch.float32)
    now = t.float().cpu()
    below = now < high if cfg.solver == "adams" else now <= high
    return cfg.guidance if bool((now > low) & below) else 1.0


def guided_velocity(
    velocity: VelocityFn,
    x: Tensor,
    t: Tensor,
    condition: Tensor,
    null: Tensor,
    scale: float,
    *,
    rescale: float = 0.0,
) -> Tensor:
    """Guided velocity at the 0-dim time ``t`` < 1; without guidance only the conditional half is computed."""
    t_B = t.expand(x.shape[0])
    if scale == 1.0:
        return velocity(x, t_B, condition)
    both = velocity(torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([null, condition]))
    v_null, v_cond = both.chunk(2)
    guided = v_null + scale * (v_cond - v_null)
    return rescaled(guided, v_cond, x, t, rescale) if rescale > 0 else guided


def rescaled(guided: Tensor, v_cond: Tensor, x: Tensor, t: Tensor, amount: float) -> Tensor:
    """Velocity whose predicted image has partly the standard deviation of the one without guidance.

    Lin et al. 2023 (arXiv 2305.08891, section 3.4): image * (amount * std_cond / std_guided + 1 - amount), each
    deviation over all values of an image. They rescale the network's output; here it is the image
    x + (1 - t) * v that a velocity predicts, since overexposure is of the image, and a velocity's own deviation is
    in large part that of the noise, which guidance does not change.
    """
    remaining = 1.0 - t
    image, unguided = x + remaining * guided, x + remaining * v_cond
    std, std_unguided = image.flatten(1).std(1), unguided.flatten(1).std(1)
    # An image of one colour has no deviation to match.
    factor = torch.where(std > 0, std_unguided / std, 1.0)
    factor = (amount * factor + 1.0 - amount).reshape(-1, *([1] * (x.ndim - 1)))
    return (factor * image - x) / remaining

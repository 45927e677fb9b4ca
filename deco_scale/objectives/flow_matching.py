"""Flow matching: the straight path between noise and image, the distribution of times, the velocity loss.

Path x_t = t * x + (1 - t) * eps, velocity v = x - eps: DeCo (arXiv 2511.19365), section 3.1. Image prediction: JiT
(arXiv 2511.13720).
Shape letters: B batch.
"""

import torch
from torch import Tensor

from deco_scale.objectives.config import TimeDistribution


def base_time(draw_B: Tensor, distribution: TimeDistribution) -> Tensor:
    """Times in (0, 1) from one draw per sample: standard normal for ``logit_normal``, else uniform."""
    return draw_B.float().sigmoid() if distribution == "logit_normal" else draw_B.float()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Shift times towards noise (0) for ``shift`` > 1; 0 and 1 stay fixed."""
    return t / (t + (1.0 - t) * shift)


def noised(image: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t at times ``t_B``, in fp32; image and noise may have any dimensions after the first."""
    t = _spread(t_B, image.ndim)
    return t * image.float() + (1.0 - t) * noise.float()


def velocity_from_image(image: Tensor, x_t: Tensor, t_B: Tensor, t_eps: float) -> Tensor:
    """Velocity (image - x_t) / max(1 - t, t_eps), in fp32; ``t_eps`` > 0.

    For t below 1 - ``t_eps`` and the true image this is x - eps; above, it falls to zero, so that errors of a
    predicted image are multiplied by at most 1 / t_eps.
    """
    remaining = (1.0 - _spread(t_B, image.ndim)).clamp_min(t_eps)
    return (image.float() - x_t.float()) / remaining


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, in fp32."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def _spread(t_B: Tensor, ndim: int) -> Tensor:
    """Times in fp32, shaped (B, 1, ...) with ``ndim`` dimensions."""
    return t_B.float().reshape(-1, *([1] * (ndim - 1)))

"""Flow matching: the straight path between noise and image, the law of times, the velocity loss.

Sources: DeCo (arXiv 2511.19365), section 3.1; path x_t = t * x + (1 - t) * eps, velocity v = x - eps. A network
that predicts the image: JiT (arXiv 2511.13720).
Shape letters: B batch.
"""

import torch
from torch import Tensor

from deco_scale.objectives.config import TimeLaw


def base_time(draw_B: Tensor, law: TimeLaw) -> Tensor:
    """Times in (0, 1) from one draw per sample: a standard normal or a uniform, as ``law`` says."""
    return draw_B.float().sigmoid() if law == "logit_normal" else draw_B.float()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise end for ``shift`` > 1; 0 and 1 stay where they are."""
    return t / (t + (1.0 - t) * shift)


def noised(image: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """Point of the path at times ``t_B``, in fp32; all trailing dimensions are the sample's."""
    t = _spread(t_B, image.ndim)
    return t * image.float() + (1.0 - t) * noise.float()


def velocity_from_image(image: Tensor, x_t: Tensor, t_B: Tensor, t_eps: float) -> Tensor:
    """Velocity that leads from ``x_t`` at times ``t_B`` towards ``image``, in fp32 and of their shape.

    (image - x_t) / max(1 - t, t_eps); ``t_eps`` is positive. Before 1 - ``t_eps`` the velocity of the image on
    whose path ``x_t`` lies is x - eps; from there on it falls to zero, so that errors of a predicted image are
    never multiplied by more than 1 / t_eps.
    """
    remaining = (1.0 - _spread(t_B, image.ndim)).clamp_min(t_eps)
    return (image.float() - x_t.float()) / remaining


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, in fp32."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())


def _spread(t_B: Tensor, ndim: int) -> Tensor:
    """Times in fp32 with ``ndim`` dimensions, all but the first of size one."""
    return t_B.float().reshape(-1, *([1] * (ndim - 1)))

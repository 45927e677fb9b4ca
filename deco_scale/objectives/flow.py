"""Flow matching: the straight path between noise and image, the law of times, the velocity loss.

Source: DeCo (arXiv 2511.19365), section 3.1; path x_t = t * x + (1 - t) * eps, velocity v = x - eps.
Shape letters: B batch.
"""

from typing import Literal

import torch
from torch import Tensor

TimeLaw = Literal["logit_normal", "uniform"]


def base_time(draw_B: Tensor, law: TimeLaw) -> Tensor:
    """Times in (0, 1) from one draw per sample: a standard normal or a uniform, as ``law`` says."""
    return draw_B.float().sigmoid() if law == "logit_normal" else draw_B.float()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise end for ``shift`` > 1; 0 and 1 stay where they are."""
    return t / (t + (1.0 - t) * shift)


def noised(image: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """Point of the path at times ``t_B``, in fp32; all trailing dimensions are the sample's."""
    t = t_B.float().reshape(-1, *([1] * (image.ndim - 1)))
    return t * image.float() + (1.0 - t) * noise.float()


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, in fp32."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())

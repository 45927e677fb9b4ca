"""AdamW and the exponential moving average of what it updates, in one pass over the tensors.

Five numbers an element (parameter, gradient, two moments, average) are read and four written; everything else of
an optimizer step is small. Source of the formula: Loshchilov and Hutter, arXiv 1711.05101, as
``torch.optim.AdamW`` computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.kernels.select import Kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWTensors:
    """Lists of equal length: fp32, contiguous, on one device, none empty; an average may be missing.

    Raises ``ValueError`` where that does not hold.
    """

    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    averages: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        device = self.parameters[0].device
        rows = zip(self.parameters, self.grads, self.exp_avgs, self.exp_avg_sqs, self.averages, strict=True)
        for parameter, *others in rows:
            for tensor in (parameter, *(t for t in others if t is not None)):
                same = tensor.shape == parameter.shape and tensor.device == device
                if not same or tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.numel():
                    raise ValueError(
                        f"AdamW takes contiguous fp32 tensors of one shape on {device}, got {tuple(tensor.shape)} "
                        f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}, for a parameter of "
                        f"{tuple(parameter.shape)}"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWStep:
    """Numbers of one update; the tensors are 0-dim, fp32, on the parameters' device.

    ``count`` is the number of the update, from 1; ``factor`` multiplies gradients; where ``skipped`` is 1.0, all
    tensors keep their values. Without ``factor`` and ``skipped`` the gradients are taken as they are.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_decay: float
    count: Tensor
    factor: Tensor | None
    skipped: Tensor | None


def averaged_adamw(tensors: AdamWTensors, step: AdamWStep, *, kernels: Kernels) -> None:
    """Update parameters, moments and averages in place; the gradients may be scaled in place."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adamw import averaged_adamw_triton

        averaged_adamw_triton(tensors, step)
    else:
        averaged_adamw_torch(tensors, step)


def averaged_adamw_torch(tensors: AdamWTensors, step: AdamWStep) -> None:
    """The twin: PyTorch's fused AdamW between a multiplication of the gradients and an interpolation."""
    parameters, grads = list(tensors.parameters), list(tensors.grads)
    if step.factor is not None:
        torch._foreach_mul_(grads, step.factor)
    torch._fused_adamw_(
        parameters,
        grads,
        list(tensors.exp_avgs),
        list(tensors.exp_avg_sqs),
        [],
        [step.count] * len(parameters),
        lr=step.lr,
        beta1=step.betas[0],
        beta2=step.betas[1],
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
        # The fused kernel reads this tensor on the device and leaves everything alone where it is 1.
        found_inf=step.skipped,
    )
    pairs = [(a, p) for a, p in zip(tensors.averages, parameters, strict=True) if a is not None]
    if pairs:
        weight = step.count.new_full((), 1.0 - step.ema_decay)
        if step.skipped is not None:
            weight = weight * (1.0 - step.skipped)
        averages, averaged = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(averages, averaged, [weight] * len(pairs))

"""Fused AdamW and EMA update: one pass over the tensors.

Each element costs five reads (parameter, gradient, two moments, EMA) and four writes.
Formula: Loshchilov and Hutter, arXiv 1711.05101, as ``torch.optim.AdamW`` computes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.kernels.select import Kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWTensors:
    """Lists of equal length of contiguous, non-empty fp32 tensors on one device; an EMA may be None.

    Raises ``ValueError`` for any other tensors.
    """

    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    emas: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        device = self.parameters[0].device
        rows = zip(self.parameters, self.grads, self.exp_avgs, self.exp_avg_sqs, self.emas, strict=True)
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
    """Scalars of one update; the tensors are 0-dim, fp32, on the parameters' device.

    ``count`` numbers updates from 1; ``factor`` multiplies the gradients (None: 1); no tensor changes if
    ``skipped`` is 1.0 (None: never).
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_decay: float
    count: Tensor
    factor: Tensor | None
    skipped: Tensor | None


def adamw_ema(tensors: AdamWTensors, step: AdamWStep, *, kernels: Kernels) -> None:
    """Update parameters, moments and EMAs in place; the gradients may be scaled in place."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adamw import adamw_ema_triton

        adamw_ema_triton(tensors, step)
    else:
        adamw_ema_torch(tensors, step)


def adamw_ema_torch(tensors: AdamWTensors, step: AdamWStep) -> None:
    """The torch twin: scale the gradients, run PyTorch's fused AdamW, interpolate the EMAs."""
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
        # The fused kernel reads this tensor on the device and changes nothing if it is 1.
        found_inf=step.skipped,
    )
    pairs = [(a, p) for a, p in zip(tensors.emas, parameters, strict=True) if a is not None]
    if pairs:
        weight = step.count.new_full((), 1.0 - step.ema_decay)
        if step.skipped is not None:
            weight = weight * (1.0 - step.skipped)
        emas, tracked = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(emas, tracked, [weight] * len(pairs))

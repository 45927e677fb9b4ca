"""The one training step: micro-batches in, one update, named scalars out."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.objectives import LOSS_NAMES
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.parallel.engines.base import Engine


class StepResult(NamedTuple):
    """Device tensors, so that nothing waits for the device: losses (mean over the global batch),
    gradient norm before clipping, and 1.0 where the update was skipped."""

    losses: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor


def train_step(
    engine: Engine,
    micro_batches: Iterable[ObjectiveInputs],
    *,
    num_micro_batches: int,
    lr: float,
    betas: tuple[float, float],
    should_skip: Callable[[Tensor], Tensor | None] | None = None,
) -> StepResult:
    """Accumulate gradients over the micro-batches and update once.

    ``should_skip`` takes the mean loss of the global batch and returns 1.0 (0-dim) where to skip the update.
    """
    totals: dict[str, Tensor] = {}
    for index, inputs in enumerate(micro_batches):
        last = index == num_micro_batches - 1
        parts = engine.forward_backward(inputs, scale=1.0 / num_micro_batches, last=last)
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value / num_micro_batches
    losses = _mean_over_ranks(totals)
    skip = should_skip(losses["loss"]) if should_skip is not None else None
    update = engine.update(lr=lr, betas=betas, should_skip=skip)
    return StepResult(losses, update.grad_norm, update.skipped)


def _mean_over_ranks(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    names: Sequence[str] = [n for n in LOSS_NAMES if n in losses]
    stacked = torch.stack([losses[n].detach().float() for n in names])
    dist.all_reduce(stacked)
    return dict(zip(names, stacked / dist.get_world_size(), strict=True))

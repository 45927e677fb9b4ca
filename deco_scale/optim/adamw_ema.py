"""AdamW with a finite gate and an EMA, without waiting for the device; one optimizer for both engines.

Works on plain tensors: local shards of parameters under FSDP, flat partitions or whole parameters under DeepSpeed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.kernels.adamw import AdamWStep, AdamWTensors, averaged_adamw
from deco_scale.kernels.select import Kernels
from deco_scale.optim.config import OptimizerConfig

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as PyTorch and DeepSpeed both do."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss itself where finite; else NaN gradients, so that the gradient norm shows it everywhere."""
    healthy = torch.isfinite(loss.detach())
    return loss * torch.where(healthy, 1.0, float("nan"))


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of global norm ``norm`` are multiplied by."""
    return (clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)


class AdamWWithEMA(torch.optim.Optimizer):
    """AdamW and the EMA of what it updates, in one pass over the tensors.

    An update is :meth:`begin`, :meth:`step` (DeepSpeed calls it itself, group by group or not at all), and
    :meth:`end`. State is kept for the tensors given to :meth:`track`: moments, and the average of some.
    """

    def __init__(self, parameters: Iterable[Tensor], cfg: OptimizerConfig, *, kernels: Kernels) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._cfg, self._kernels = cfg, kernels
        self._tracked: dict[str, Tensor] = {}
        self._count = torch.zeros(())
        self._lr, self._betas = 0.0, (0.0, 0.0)
        self._measures = False
        self._unwanted: Tensor | None = None
        self.norm: Tensor | None = None
        """Of the whole gradient before clipping, in the update at hand."""
        self.skipped: Tensor | None = None
        """1.0 where the update at hand leaves everything alone; None if only the caller knows."""

    def track(self, tensors: Mapping[str, Tensor], *, averaged: Collection[str]) -> None:
        """Start moments at zero, and averages of the named ones at the present values.

        Empty tensors (a rank without rows) have state and are left out of the kernels.
        """
        for name, tensor in tensors.items():
            values = tensor.detach()
            self._tracked[name] = tensor
            self.state[tensor] = {kind: torch.zeros_like(values) for kind in MOMENTS}
            if name in averaged:
                self.state[tensor]["ema"] = values.clone()
            self._count = torch.zeros((), device=tensor.device)

    def begin(
        self,
        *,
        lr: float,
        betas: tuple[float, float],
        norm: Tensor | None = None,
        measure_norm: bool = False,
        should_skip: Tensor | None = None,
    ) -> None:
        """Settle the numbers of the next update.

        ``norm`` (0-dim) is that of the whole gradient: it is clipped by, and skips the update where not finite.
        With ``measure_norm`` the gradients in hand are whole and :meth:`step` takes their norm. With neither,
        the caller has clipped and checked. Where ``unwanted`` (0-dim) is 1.0, everything is left alone as well.
        """
        self._lr, self._betas, self._measures, self._unwanted = lr, betas, measure_norm, should_skip
        self._gate(norm)

    def _gate(self, norm: Tensor | None) -> None:
        self.norm = norm
        self.skipped = self._unwanted
        if norm is not None:
            bad = (~torch.isfinite(norm)).float()
            self.skipped = bad if self._unwanted is None else torch.maximum(bad, self._unwanted)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the tensors of ``param_groups`` that have a gradient; gradients may be scaled in place."""
        assert closure is None
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        if not held:
            return
        if self._measures:
            self._gate(nn.utils.get_total_norm([p.grad for p in held]))
        device = held[0].device
        factor = None if self.norm is None else clip_factor(self.norm, self._cfg.clip_norm)
        states = [self.state[p] for p in held]
        tensors = AdamWTensors(
            parameters=[p.detach() for p in held],
            grads=[p.grad for p in held],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            averages=[state.get("ema") for state in states],
        )
        step = AdamWStep(
            lr=self._lr,
            betas=self._betas,
            eps=self._cfg.eps,
            weight_decay=self._cfg.weight_decay,
            ema_decay=self._cfg.ema_decay,
            # Elsewhere only where DeepSpeed keeps some groups in host memory.
            count=(self._count + 1.0).to(device),
            factor=factor if factor is None else factor.to(device),
            skipped=self.skipped if self.skipped is None else self.skipped.to(device),
        )
        averaged_adamw(tensors, step, kernels=self._kernels)

    def end(self, skipped: Tensor) -> None:
        """Count the update unless ``skipped`` (0-dim) is 1.0."""
        self._count += 1.0 - skipped.to(self._count.device)

    @property
    def steps(self) -> int:
        """Updates taken, skipped ones aside; waits for the device."""
        return int(self._count.item())

    def set_steps(self, steps: int) -> None:
        self._count.fill_(steps)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Live state of one kind (``ema``, ``exp_avg``, ``exp_avg_sq``) by the name that was tracked."""
        states = ((name, self.state[tensor]) for name, tensor in self._tracked.items())
        return {name: state[kind] for name, state in states if kind in state}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange averages and parameters in place; the parameters come back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors("ema").items():
            held = average.clone()
            average.copy_(self._tracked[name])
            self._tracked[name].copy_(held)

"""AdamW with gradient clipping, EMA and a gate that skips non-finite updates; the host never waits for the device.

Serves both engines with plain tensors: FSDP's local shards, DeepSpeed's flat partitions or whole parameters.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.kernels.adamw import AdamWStep, AdamWTensors, adamw_ema
from deco_scale.kernels.select import Kernels
from deco_scale.optim.config import OptimizerConfig

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as PyTorch and DeepSpeed both do."""

MOMENTS = ("exp_avg", "exp_avg_sq")


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """A non-finite loss gets NaN gradients, which make the gradient norm NaN on every rank."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


class AdamWWithEMA(torch.optim.Optimizer):
    """AdamW and EMA in one pass over the tensors.

    An update is :meth:`begin`, :meth:`step` (which DeepSpeed calls, group by group, or not if it skips) and
    :meth:`end`. Tensors given to :meth:`track` have state: moments, and some an EMA.
    """

    def __init__(self, parameters: Iterable[Tensor], cfg: OptimizerConfig, *, kernels: Kernels) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._cfg, self._kernels = cfg, kernels
        self._tracked: dict[str, Tensor] = {}
        self._count = torch.zeros(())
        self._lr, self._betas = 0.0, (0.0, 0.0)
        self._measure_norm = False
        self._should_skip: Tensor | None = None
        self.norm: Tensor | None = None
        """Gradient norm of the current update, before clipping."""
        self.skipped: Tensor | None = None
        """1.0 if the current update changes nothing; None if only the caller knows."""

    def track(self, tensors: Mapping[str, Tensor], *, ema: Collection[str]) -> None:
        """Create state: moments of zero, and for the names in ``ema`` an EMA that starts at the present values.

        Empty tensors (a rank without rows) have state but are left out of the kernels.
        """
        for name, tensor in tensors.items():
            values = tensor.detach()
            self._tracked[name] = tensor
            self.state[tensor] = {kind: torch.zeros_like(values) for kind in MOMENTS}
            if name in ema:
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
        """Set learning rate, betas and gate of the next update.

        ``norm`` (0-dim) is the global gradient norm, which clips, and skips the update if it is not finite. With
        ``measure_norm``, gradients are not sharded and :meth:`step` computes their norm. With neither, the caller
        has clipped and checked. ``should_skip`` (0-dim) of 1.0 skips the update, too.
        """
        self._lr, self._betas, self._measure_norm, self._should_skip = lr, betas, measure_norm, should_skip
        self._gate(norm)

    def _gate(self, norm: Tensor | None) -> None:
        self.norm = norm
        self.skipped = self._should_skip
        if norm is not None:
            nonfinite = (~torch.isfinite(norm)).float()
            self.skipped = nonfinite if self._should_skip is None else torch.maximum(nonfinite, self._should_skip)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the tensors of ``param_groups`` that have a gradient; gradients may be scaled in place."""
        assert closure is None
        parameters = [
            p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()
        ]
        if not parameters:
            return
        if self._measure_norm:
            self._gate(nn.utils.get_total_norm([p.grad for p in parameters]))
        device = parameters[0].device
        factor = None
        if self.norm is not None:
            factor = (self._cfg.clip_norm / (self.norm + CLIP_EPS)).clamp(max=1.0)
        states = [self.state[p] for p in parameters]
        tensors = AdamWTensors(
            parameters=[p.detach() for p in parameters],
            grads=[p.grad for p in parameters],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            emas=[state.get("ema") for state in states],
        )
        step = AdamWStep(
            lr=self._lr,
            betas=self._betas,
            eps=self._cfg.eps,
            weight_decay=self._cfg.weight_decay,
            ema_decay=self._cfg.ema_decay,
            # On another device only if DeepSpeed offloads some groups to host memory.
            count=(self._count + 1.0).to(device),
            factor=factor if factor is None else factor.to(device),
            skipped=self.skipped if self.skipped is None else self.skipped.to(device),
        )
        adamw_ema(tensors, step, kernels=self._kernels)

    def end(self, skipped: Tensor) -> None:
        """Count the update unless ``skipped`` (0-dim) is 1.0."""
        self._count += 1.0 - skipped.to(self._count.device)

    @property
    def steps(self) -> int:
        """Updates so far, without skipped ones; waits for the device."""
        return int(self._count.item())

    def set_steps(self, steps: int) -> None:
        self._count.fill_(steps)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Live state of one kind (``ema``, ``exp_avg``, ``exp_avg_sq``) by the name that was tracked."""
        states = ((name, self.state[tensor]) for name, tensor in self._tracked.items())
        return {name: state[kind] for name, state in states if kind in state}

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Exchange EMA and parameters in place within the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, ema in self.tensors("ema").items():
            saved = ema.clone()
            ema.copy_(self._tracked[name])
            self._tracked[name].copy_(saved)

"""AdamW over local shards with a finite gate and an EMA, without waiting for the device.

Works on plain tensors: an engine hands over the local part of each parameter and of its gradient.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from deco_scale.training.settings import OptimizerConfig

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as PyTorch and DeepSpeed both do."""


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself where finite; else NaN gradients, so that the gradient norm shows it everywhere."""
    healthy = torch.isfinite(loss.detach())
    return loss * torch.where(healthy, 1.0, float("nan"))


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients of global norm ``norm`` are multiplied by."""
    return (clip_norm / (norm + CLIP_EPS)).clamp(max=1.0)


class Ema:
    """Exponential moving average of some tensors, kept in fp32 beside them."""

    def __init__(self, sources: Mapping[str, Tensor], decay: float) -> None:
        self._sources = dict(sources)
        self._decay = decay
        self.tensors = {name: source.detach().clone() for name, source in sources.items()}

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """Move towards the sources; ``taken`` (0-dim) is 1.0, or 0.0 for a skipped step."""
        weight = (1.0 - self._decay) * taken
        for name, average in self.tensors.items():
            average.lerp_(self._sources[name], weight.to(average.device))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange averages and sources in place; the original sources come back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            held = average.clone()
            average.copy_(self._sources[name])
            self._sources[name].copy_(held)


class AveragedAdamW:
    """AdamW and EMA of named local shards; empty shards (a rank without rows) are left out of the kernels."""

    def __init__(self, parameters: Mapping[str, Tensor], cfg: OptimizerConfig, *, averaged: Iterable[str]) -> None:
        self._cfg = cfg
        self._parameters = dict(parameters)
        self._adamw = torch.optim.AdamW(
            [p for p in parameters.values() if p.numel()] or [torch.zeros(1)],
            lr=0.0,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,
        )
        self._ema = Ema({name: parameters[name] for name in averaged}, cfg.ema_decay)
        self._moments: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for name, parameter in parameters.items():
            moments = {kind: torch.zeros_like(parameter) for kind in self._moments}
            for kind, moment in moments.items():
                self._moments[kind][name] = moment
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self._adamw.state[parameter] = {"step": step, **moments}

    def step(self, grads: Mapping[str, Tensor], norm: Tensor, *, lr: float, betas: tuple[float, float]) -> Tensor:
        """Clip by the global ``norm`` and update; a non-finite norm skips it. Returns 1.0 where skipped."""
        skipped = (~torch.isfinite(norm)).float()
        factor = clip_factor(norm, self._cfg.clip_norm)
        for group in self._adamw.param_groups:
            group["lr"], group["betas"] = lr, betas
        held = [grad for grad in grads.values() if grad.numel()]
        torch._foreach_mul_(held, factor)
        for name, grad in grads.items():
            self._parameters[name].grad = grad
        # The fused kernel reads this tensor on the device and leaves everything alone where it is 1.
        self._adamw.found_inf = skipped  # type: ignore[attr-defined]
        self._adamw.step()
        for parameter in self._parameters.values():
            parameter.grad = None
        self._ema.update(1.0 - skipped)
        return skipped

    @property
    def steps(self) -> int:
        """Updates taken, skipped ones aside; waits for the device."""
        return int(next(iter(self._adamw.state.values()))["step"].item())

    def set_steps(self, steps: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Live local tensors by kind (``ema``, ``exp_avg``, ``exp_avg_sq``) and name."""
        return {"ema": self._ema.tensors, **self._moments}

    def swapped(self) -> AbstractContextManager[None]:
        return self._ema.swapped()

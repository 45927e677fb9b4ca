"""Steps that went wrong: not finite, or a spike of the loss. Detected on the device, read on the host later."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.training.config import FaultsConfig

LAG = 2
"""Steps after which the host reads the outcome of a step, so that it never waits for one in flight."""


class RollbackRequested(Exception):
    """The policy asks to go back to before ``step``; the run stands at ``at_step`` after ``samples``."""

    def __init__(self, step: int, why: str, *, at_step: int, samples: int) -> None:
        super().__init__(f"step {step}: {why}")
        self.step, self.at_step, self.samples = step, at_step, samples


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A bad step, whose update was skipped, the last of ``consecutive`` ones.

    ``kind`` is ``skip`` (not finite) or ``spike``.
    """

    step: int
    loss: float
    kind: str
    consecutive: int

    @property
    def details(self) -> dict[str, float]:
        """What an event says beside kind and step."""
        return {"loss": self.loss} if self.kind == "spike" else {}


class AnomalyDetector:
    """Detects bad steps by numbers that all ranks share, so that they decide alike; see :class:`FaultsConfig`.

    For each step :meth:`should_skip` comes before its update, then :meth:`add`; :meth:`read` gives the bad ones.
    Running mean and variance of the loss weigh older steps less, as averages over about ``spike_window`` steps do.
    They begin anew with each stage and each launch.
    """

    def __init__(self, cfg: FaultsConfig, *, max_bad_steps: int, device: torch.device) -> None:
        self._cfg, self._limit = cfg, max_bad_steps
        self._on_gpu = device.type == "cuda"
        self._mean, self._variance, self._count = (torch.zeros((), device=device) for _ in range(3))
        self._spike = torch.zeros((), device=device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._consecutive = 0
        self.skipped = 0
        """Updates skipped so far, for either reason."""

    def should_skip(self, loss: Tensor) -> Tensor | None:
        """1.0 (0-dim) where the mean loss of all ranks is a spike; None where spikes are ignored."""
        cfg = self._cfg
        if cfg.spike == "ignore":
            return None
        finite = torch.isfinite(loss)
        limit = self._mean + cfg.spike_deviations * self._variance.sqrt()
        self._spike = (finite & (self._count >= cfg.spike_window) & (loss > limit)).float()
        good = finite.float() * (1.0 - self._spike)
        weight = 1.0 / (self._count + 1.0).clamp(max=float(cfg.spike_window))
        # A loss that is not finite times a weight of zero would not be zero.
        delta = torch.where(finite, loss - self._mean, 0.0) * good
        self._mean = self._mean + weight * delta
        variance = (1.0 - weight) * (self._variance + weight * delta * delta)
        self._variance = torch.where(good > 0, variance, self._variance)
        self._count = self._count + good
        return self._spike

    def add(self, step: int, *, loss: Tensor, skipped: Tensor) -> None:
        """Note the outcome of a step (0-dim tensors); it is copied to the host without waiting."""
        values = torch.stack([loss.detach().float(), skipped.float(), self._spike])
        pending = torch.zeros(3, pin_memory=self._on_gpu)
        pending.copy_(values, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self._pending.append((step, pending, copied))

    def read(self, *, everything: bool = False) -> list[Anomaly]:
        """Bad steps up to :data:`LAG` steps ago; with ``everything`` up to now, which waits for the device."""
        found = []
        while self._pending and (everything or len(self._pending) > LAG):
            step, values, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            loss, skipped, spike = values.numpy().tolist()
            self._consecutive = self._consecutive + 1 if skipped else 0
            if skipped:
                self.skipped += 1
                found.append(Anomaly(step, loss, "spike" if spike else "skip", self._consecutive))
        return found

    def apply_policy(self, anomalies: Iterable[Anomaly], at_step: int, samples: int) -> None:
        """Raise :class:`RunError` or :class:`RollbackRequested` where the policy says so."""
        for anomaly in anomalies:
            key, why = "non_finite", "loss or gradient not finite"
            if anomaly.kind == "spike":
                key, why = "spike", f"a spike of the loss to {anomaly.loss:.4g}"
            policy = getattr(self._cfg, key)
            if policy == "stop":
                raise RunError(
                    f"step {anomaly.step}: {why}, and faults.{key}=stop; its update was left out. Check the data "
                    "of this step, or set another policy and start again"
                )
            if policy == "rollback":
                raise RollbackRequested(anomaly.step, why, at_step=at_step, samples=samples)
            if anomaly.consecutive >= self._limit:
                raise RunError(
                    f"step {anomaly.step}: {why} in {anomaly.consecutive} steps in a row "
                    f"(run.max_bad_steps={self._limit}); the weights are those before these steps. Lower the "
                    "learning rate, or check the data of these steps"
                )

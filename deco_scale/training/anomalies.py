"""Steps that went wrong: not finite, or a spike of the loss. Judged on the device, read on the host later."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.training.config import FaultsConfig

LAG = 2
"""Steps after which the host looks at a judgement, so that it waits for no step in flight."""


class RollbackRequested(Exception):
    """The run, at ``at_step`` after ``samples``, shall go back to before ``step``, as the policy says."""

    def __init__(self, step: int, why: str, *, at_step: int, samples: int) -> None:
        super().__init__(f"step {step}: {why}")
        self.step, self.at_step, self.samples = step, at_step, samples


@dataclass(frozen=True, slots=True)
class Anomaly:
    """What was wrong with a step; its update was left out, the last one of ``in_a_row``.

    ``kind`` is ``skip`` (not finite) or ``spike``.
    """

    step: int
    loss: float
    kind: str
    in_a_row: int

    @property
    def details(self) -> dict[str, float]:
        """What an event says beside kind and step."""
        return {"loss": self.loss} if self.kind == "spike" else {}


@dataclass(frozen=True, slots=True)
class _Held:
    step: int
    values: Tensor
    copied: torch.cuda.Event | None


class AnomalyDetector:
    """Judges each step by numbers that all ranks share, so that they judge alike; see :class:`FaultsConfig`.

    A step is :meth:`unwanted` (before its update), then :meth:`add`; :meth:`read` gives what was found. Running
    mean and variance of the loss weigh older steps less, as averages over about ``spike_window`` steps do. They
    begin anew with each stage and each launch.
    """

    def __init__(self, cfg: FaultsConfig, *, max_bad_steps: int, device: torch.device) -> None:
        self._cfg, self._limit = cfg, max_bad_steps
        self._on_gpu = device.type == "cuda"
        self._mean, self._variance, self._count = (torch.zeros((), device=device) for _ in range(3))
        self._spike = torch.zeros((), device=device)
        self._waiting: deque[_Held] = deque()
        self._in_a_row = 0
        self.skipped = 0
        """Updates left out so far, for either reason."""

    def should_skip(self, loss: Tensor) -> Tensor | None:
        """1.0 (0-dim) where the update shall be left out for the mean loss of all ranks; None if it never is."""
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
        held = torch.zeros(3, pin_memory=self._on_gpu)
        held.copy_(values, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self._waiting.append(_Held(step, held, copied))

    def read(self, *, everything: bool = False) -> list[Anomaly]:
        """What was wrong up to :data:`LAG` steps ago; ``everything`` up to now, which waits for the device."""
        found = []
        while self._waiting and (everything or len(self._waiting) > LAG):
            held = self._waiting.popleft()
            if held.copied is not None:
                held.copied.synchronize()
            loss, skipped, spike = held.values.numpy().tolist()
            self._in_a_row = self._in_a_row + 1 if skipped else 0
            if skipped:
                self.skipped += 1
                kind = "spike" if spike else "skip"
                found.append(Anomaly(held.step, loss, kind, self._in_a_row))
        return found

    def act(self, found: Iterable[Anomaly], at_step: int, samples: int) -> None:
        """Do as the policy says, the run being at ``at_step``: nothing, :class:`RunError` or :class:`RollbackRequested`."""
        for one in found:
            self._act(one, at_step, samples)

    def _act(self, one: Anomaly, at_step: int, samples: int) -> None:
        spike = one.kind == "spike"
        policy: str = self._cfg.spike if spike else self._cfg.non_finite
        why = f"a spike of the loss to {one.loss:.4g}" if spike else "loss or gradient not finite"
        if policy == "stop":
            key = "spike" if spike else "non_finite"
            raise RunError(
                f"step {one.step}: {why}, and faults.{key}=stop; its update was left out. Look at the data of "
                "this step, or set another policy and start again"
            )
        if policy == "rollback":
            raise RollbackRequested(one.step, why, at_step=at_step, samples=samples)
        if one.in_a_row >= self._limit:
            raise RunError(
                f"step {one.step}: {why} in {one.in_a_row} steps in a row (run.max_bad_steps={self._limit}); "
                "weights are as before them. Lower the learning rate, or look at the data of these steps"
            )

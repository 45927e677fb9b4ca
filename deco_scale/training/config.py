"""Settings of the training loop, its stages, its optimizer and its checkpoints."""

from dataclasses import dataclass, field, replace
from typing import Literal

from deco_scale.distributed.cpu_binding import CpuBinding
from deco_scale.optim.lr_schedule import LrScaling, LrScheduleConfig, batch_factor
from deco_scale.parallel.mesh import fit_micro_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """``ranks`` profile ``steps`` steps of the run from ``at_step`` on, counted from 1 (None: none)."""

    at_step: int | None = None
    steps: int = 3
    ranks: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if (self.at_step is not None and self.at_step < 1) or self.steps < 1:
            raise ValueError(f"at_step={self.at_step} and steps={self.steps} must be at least 1")
        if not self.ranks or min(self.ranks) < 0:
            raise ValueError(f"ranks={list(self.ranks)} must list at least one rank, counted from 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where a run lives and how it behaves; ``stop_at_step`` ends this launch early, after a checkpoint.

    ``gc_every``: Python's garbage collector runs between steps, every so many on all ranks alike (0: when Python
    likes). ``cpu_binding``: ``numa`` binds each rank to the cores of its GPU's NUMA node, ``auto`` does so under
    SLURM.
    """

    dir: str
    seed: int = 0
    log_every: int = 10
    max_bad_steps: int = 10
    stop_at_step: int | None = None
    gc_every: int = 50
    cpu_binding: CpuBinding = "auto"
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir must name a folder")
        if self.log_every < 1 or self.max_bad_steps < 1:
            raise ValueError("log_every and max_bad_steps must be at least 1")
        if self.stop_at_step is not None and self.stop_at_step < 1:
            raise ValueError(f"stop_at_step={self.stop_at_step} must be at least 1")
        if self.gc_every < 0:
            raise ValueError(f"gc_every={self.gc_every} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of a run; ``data`` overrides where the samples come from.

    ``lr`` is the learning rate before ``lr_schedule``. With ``lr_scaling`` it is that of a global batch of
    ``lr_reference_batch`` images, and is scaled to ``global_batch``.
    """

    name: str
    resolution: int
    steps: int
    global_batch: int
    micro_batch: int
    lr: float
    lr_schedule: LrScheduleConfig = field(default_factory=LrScheduleConfig)
    lr_scaling: LrScaling = "none"
    lr_reference_batch: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    timestep_shift: float = 1.0
    data: str | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "steps", "global_batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.lr < 0 or self.timestep_shift <= 0:
            raise ValueError("lr must not be negative and timestep_shift must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be in [0, 1)")
        ramps = self.lr_schedule.warmup_steps + self.lr_schedule.decay_steps
        if ramps > self.steps:
            raise ValueError(f"lr_schedule: warmup_steps + decay_steps = {ramps} is more than steps={self.steps}")
        if self.lr_reference_batch is None and self.lr_scaling != "none":
            raise ValueError(
                f"lr_scaling={self.lr_scaling} needs lr_reference_batch: the global batch that lr={self.lr} is for"
            )
        if self.lr_reference_batch is not None and self.lr_reference_batch < 1:
            raise ValueError(f"lr_reference_batch={self.lr_reference_batch} must be at least 1")

    def fitted(self, dp: int) -> "StageConfig":
        """With the micro-batch that fits ``dp`` ranks (:func:`fit_micro_batch`); raises :class:`ConfigError`."""
        batches = {"global_batch": self.global_batch, "micro_batch": self.micro_batch}
        return replace(self, micro_batch=fit_micro_batch(**batches, dp=dp, where=f"stages.{self.name}"))

    @property
    def peak_lr(self) -> float:
        """``lr`` scaled to ``global_batch``."""
        if self.lr_reference_batch is None:
            return self.lr
        return self.lr * batch_factor(
            self.lr_scaling, batch=self.global_batch, reference_batch=self.lr_reference_batch
        )

    def lr_at(self, step: int) -> float:
        """Learning rate of the stage's step ``step``, counted from 1 within the stage."""
        return self.peak_lr * self.lr_schedule.factor(step, steps=self.steps)


FaultPolicy = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """How bad steps are detected, and what happens then.

    A step is bad if its loss or gradient norm is not finite; ``run.max_bad_steps`` of them in a row end the run in
    any case. A step is a spike if its loss is more than ``spike_deviations`` standard deviations above the mean
    of about the last ``spike_window`` good steps, after that many since the start.

    ``skip`` leaves the update out. ``rollback`` goes back to the newest checkpoint at least ``rollback_steps``
    before the step, and goes on with the data after it; more than ``max_rollbacks`` of them end the run. ``stop``
    ends the run. Every ``check_replicas_every`` steps (0: never) ranks compare replicated tensors bit by bit.
    A rank is a straggler if its own work takes ``straggler_factor`` times the median rank's.
    """

    non_finite: FaultPolicy = "skip"
    spike: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    spike_deviations: float = 6.0
    spike_window: int = 100
    rollback_steps: int = 1
    max_rollbacks: int = 3
    check_replicas_every: int = 100
    straggler_factor: float = 1.3

    def __post_init__(self) -> None:
        if self.spike_deviations <= 0 or self.spike_window < 2:
            raise ValueError("spike_deviations must be positive and spike_window at least 2")
        if self.rollback_steps < 1 or self.max_rollbacks < 1 or self.check_replicas_every < 0:
            raise ValueError(
                "rollback_steps and max_rollbacks must be at least 1, check_replicas_every not negative"
            )
        if self.straggler_factor <= 1:
            raise ValueError(f"straggler_factor={self.straggler_factor} must be above 1")

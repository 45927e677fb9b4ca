"""Settings of the training loop, its stages, its optimizer and its checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """Where a run lives and how it behaves; ``stop_at_step`` ends this launch early, after a checkpoint."""

    dir: str
    seed: int = 0
    log_every: int = 10
    max_bad_steps: int = 10
    stop_at_step: int | None = None

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("dir must name a folder")
        if self.log_every < 1 or self.max_bad_steps < 1:
            raise ValueError("log_every and max_bad_steps must be at least 1")
        if self.stop_at_step is not None and self.stop_at_step < 1:
            raise ValueError(f"stop_at_step={self.stop_at_step} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of a run; ``data`` overrides where the samples come from."""

    name: str
    resolution: int
    steps: int
    global_batch: int
    micro_batch: int
    lr: float
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


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with gradient clipping by global norm, and the EMA of the denoiser's weights."""

    weight_decay: float = 0.0
    eps: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepBest:
    """Keep the ``count`` checkpoints whose last logged ``metric`` (a name in metrics.jsonl) is best."""

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When and where to save, what to keep, and what a fresh run starts from.

    Kept are the last ``keep_last``, every ``keep_every``-th step (0: none) and ``keep_best``. ``asynchronous``
    saving holds a step up only while this rank's shards are copied. ``url`` (``s3://bucket/prefix``) is where
    checkpoints go instead of the run's folder, which then only holds files on their way. The EMA alone is
    exported every ``ema_every`` steps (0: never) and at ``ema_steps``.

    A run without a checkpoint of its own takes its weights from the checkpoint ``init_from``, with a fresh
    optimizer and the EMA equal to the weights: those of the ``model`` or its ``ema``, except parameters whose
    names match a pattern of ``init_skip`` (shell style, as ``denoiser.decoder.*``).
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    keep_best: KeepBest | None = None
    asynchronous: bool = True
    url: str | None = None
    ema_every: int = 0
    ema_steps: tuple[int, ...] = ()
    init_from: str | None = None
    init_weights: Literal["model", "ema"] = "model"
    init_skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or self.keep_every < 0:
            raise ValueError("every and keep_last must be at least 1, keep_every not negative")
        if self.ema_every < 0 or any(step < 1 for step in self.ema_steps):
            raise ValueError("ema_every must not be negative, ema_steps must be at least 1")
        if self.url is not None and not self.url.startswith("s3://"):
            raise ValueError(f"url={self.url} must look like s3://bucket/prefix; local checkpoints lie in run.dir")
        if self.init_from is None and (self.init_skip or self.init_weights != "model"):
            raise ValueError("init_weights and init_skip need init_from")


FaultPolicy = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """What happens when a step goes wrong, and how that is noticed.

    A step is bad where loss or gradient norm is not finite; ``run.max_bad_steps`` of them in a row end the run in
    any case. A step is a spike where its loss is more than ``spike_deviations`` standard deviations above the mean
    of about the last ``spike_window`` good steps, after that many since the start.

    ``skip`` leaves the update out. ``rollback`` goes back to the newest checkpoint at least ``rollback_steps``
    before the step, and goes on with the data after it; more than ``max_rollbacks`` of them end the run. ``stop``
    ends the run. Every ``check_replicas_every`` steps (0: never) ranks compare what they hold alike, bit by bit.
    A rank is a straggler where its own work takes ``straggler_factor`` times the median rank's.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Experiment tracking; ``auto`` is online where WANDB_API_KEY is set and offline elsewhere."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "deco-scale"
    name: str | None = None

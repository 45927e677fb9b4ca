"""Settings of checkpoints."""

from dataclasses import dataclass
from typing import Literal


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

    The last ``keep_last`` checkpoints, every ``keep_every``-th step (0: none) and ``keep_best`` are kept. An
    ``asynchronous`` save stalls training only while this rank's shards are copied. Checkpoints go to ``url``
    (``s3://bucket/prefix``) if set; the run's folder then only holds files until they are uploaded. The EMA is
    exported every ``ema_every`` steps (0: never) and at ``ema_steps``.

    A run without a checkpoint of its own takes its weights from the checkpoint ``init_from``: its ``model`` or
    ``ema`` weights (``init_weights``), except parameters whose names match a pattern of ``init_skip`` (shell
    style, such as ``denoiser.decoder.*``). The optimizer starts fresh, and the EMA equals the weights.
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
            raise ValueError(
                f"url={self.url} must look like s3://bucket/prefix; local checkpoints are stored in run.dir"
            )
        if self.init_from is None and (self.init_skip or self.init_weights != "model"):
            raise ValueError("init_weights and init_skip need init_from")

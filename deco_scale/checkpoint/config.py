"""Settings of checkpoints, and which of them a run keeps."""

import math
from collections.abc import Callable, Collection, Mapping
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


def retained(
    steps: Collection[int],
    cfg: CheckpointConfig,
    metrics: Callable[[int], Mapping[str, float]],
    *,
    protected: Collection[int] = (),
) -> set[int]:
    """Steps to keep: the last ones, every k-th, the best (of equal ones the newer), and the ``protected`` ones.

    ``metrics`` gives the recorded metrics of a step's checkpoint; one without a finite value is never among the
    best.
    """
    ordered = sorted(steps)
    keep = set(ordered[-cfg.keep_last :]) | (set(protected) & set(ordered))
    if cfg.keep_every:
        keep |= {step for step in ordered if step % cfg.keep_every == 0}
    if cfg.keep_best is not None:
        sign = 1 if cfg.keep_best.mode == "min" else -1
        scores = {step: sign * metrics(step).get(cfg.keep_best.metric, math.nan) for step in ordered}
        finite = [step for step in ordered if math.isfinite(scores[step])]
        keep |= set(sorted(finite, key=lambda step: (scores[step], -step))[: cfg.keep_best.count])
    return keep

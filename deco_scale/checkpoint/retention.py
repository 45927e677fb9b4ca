"""Which checkpoints of a run stay."""

import math
from collections.abc import Callable, Collection, Mapping

from deco_scale.checkpoint.config import CheckpointConfig


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

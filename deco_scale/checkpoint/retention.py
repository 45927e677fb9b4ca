"""Which checkpoints of a run are kept."""

import math
from collections.abc import Callable, Collection, Mapping

from deco_scale.checkpoint.config import CheckpointConfig, KeepBest


def retained(
    steps: Collection[int],
    cfg: CheckpointConfig,
    metrics: Callable[[int], Mapping[str, float]],
    *,
    protected: Collection[int] = (),
) -> set[int]:
    """Steps to keep: the last ones, every k-th, the best, and the ``protected`` ones.

    ``metrics`` gives the recorded metrics of a step's checkpoint; one without a finite value is never among the
    best.
    """
    ordered = sorted(steps)
    keep = set(ordered[-cfg.keep_last :]) | (set(protected) & set(ordered))
    if cfg.keep_every:
        keep |= {step for step in ordered if step % cfg.keep_every == 0}
    if cfg.keep_best is not None:
        keep |= set(_best(ordered, cfg.keep_best, metrics))
    return keep


def _best(steps: list[int], best: KeepBest, metrics: Callable[[int], Mapping[str, float]]) -> list[int]:
    sign = 1 if best.mode == "min" else -1
    scored = [(sign * metrics(step).get(best.metric, math.nan), step) for step in steps]
    # Of equal ones the newer.
    ranked = sorted((entry for entry in scored if math.isfinite(entry[0])), key=lambda e: (e[0], -e[1]))
    return [step for _, step in ranked[: best.count]]

"""Which checkpoints of a run are kept."""

import math
from collections.abc import Callable, Collection, Mapping

from deco_scale.checkpoint.config import CheckpointConfig, KeepBest


def retained(
    steps: Collection[int],
    cfg: CheckpointConfig,
    metrics: Callable[[int], Mapping[str, float]],
    *,
    held: Collection[int] = (),
) -> set[int]:
    """The last ones, every k-th, the best, and those ``held`` for another reason.

    ``metrics`` gives what the checkpoint of a step recorded; one without a finite value is never among the best.
    """
    ordered = sorted(steps)
    keep = set(ordered[-cfg.keep_last :]) | (set(held) & set(ordered))
    if cfg.keep_every:
        keep |= {step for step in ordered if step % cfg.keep_every == 0}
    if cfg.keep_best is not None:
        keep |= set(_best(ordered, cfg.keep_best, metrics))
    return keep


def _best(steps: list[int], best: KeepBest, metrics: Callable[[int], Mapping[str, float]]) -> list[int]:
    sign = 1 if best.mode == "min" else -1
    judged = [(sign * metrics(step).get(best.metric, math.nan), step) for step in steps]
    # Of equals the newer.
    ranked = sorted((entry for entry in judged if math.isfinite(entry[0])), key=lambda e: (e[0], -e[1]))
    return [step for _, step in ranked[: best.count]]

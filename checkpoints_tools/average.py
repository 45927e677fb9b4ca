"""Averages of checkpoints: plain, weighted, or an EMA of another width made after the fact.

**Width.** A power-function EMA (Karras et al. 2024, arXiv 2312.02696) averages the weights of steps t up to T with
the profile p(t) = (g + 1) t^g / T^(g + 1), whose standard deviation is sigma * T, with sigma^2 = (g + 1) / ((g +
2)^2 (g + 3)). Our checkpoints hold one EMA of constant decay b: that of step T_i averages with q_i(t) = l exp(-l
(T_i - t)), l = -ln b, and leaves exp(-l T_i) on the initial weights. The average asked for is approximated by sum
c_i EMA_i, sum c_i = 1, as that paper's post-hoc EMA does with power functions in place of exponentials. The paper
fits the profile by least squares; we fit the cumulative profile, P(t) = (t / T)^(g + 1) against Q_i(t) = exp(-l
max(T_i - t, 0)), because our single width leaves the profile itself a saw-tooth between kept steps. Where steps
move the weights independently of one another, integral (sum c_i Q_i - P)^2 dt is the expected squared distance
from the average asked for, up to a factor.

**Limits.** Only the EMAs of the given checkpoints are there: the steps between kept checkpoints must not be many
times the EMA's own width 1/l, and no average narrower than it can be made. What is lost,
|sum c_i Q_i - P| / |P|, is the distance from the average asked for relative to that between it and the last
weights, under the same assumption; it is printed, and above ``--max-error`` refused.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, Advance, CheckpointReader, TensorSpec, pieces
from checkpoints_tools.formats.canonical import write_canonical
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.errors import ConfigError

PIECE_ELEMENTS = 8 * 2**20
"""Elements that are summed in float64 at a time."""
_GRID = 20_000


@dataclass(frozen=True, slots=True)
class WidthFit:
    """Coefficients of the stored EMAs, and what they make.

    ``error`` is |achieved - expected| / |expected| of the cumulative profiles; ``mean`` and ``width`` are mean and
    standard deviation of the profile that is achieved, as parts of the run, beside ``expected_mean``.
    """

    coefficients: tuple[float, ...]
    error: float
    mean: float
    width: float
    expected_mean: float


def check_alike(sources: Sequence[CheckpointReader]) -> None:
    """All must hold the same model's tensors, moments aside; raises :class:`ConfigError` naming a difference."""
    first = {n: s.shape for n, s in sources[0].specs.items() if n.startswith((MODEL, EMA, REPA))}
    for other in sources[1:]:
        theirs = {n: s.shape for n, s in other.specs.items() if n.startswith((MODEL, EMA, REPA))}
        for name in sorted(set(first) | set(theirs)):
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{other.path} has {name} of shape {theirs.get(name)}, {sources[0].path} of {first.get(name)}"
                )


def shares_of(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Shares that sum to 1 from any positive numbers; equal ones where none are given."""
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints")
    if not all(0 < w < float("inf") for w in weights):
        raise ConfigError(f"--weights {','.join(map(str, weights))}: all must be above 0 and finite")
    return tuple(w / sum(weights) for w in weights)


def fit_width(sigma: float, steps: Sequence[int], decay: float) -> WidthFit:
    """Coefficients, by ascending step, for a power-function EMA of relative width ``sigma`` at the last step.

    Raises :class:`ConfigError` where ``sigma`` is no such width or ``steps`` are not different and positive.
    """
    if not 0 < sigma < 12**-0.5:
        raise ConfigError(f"--ema-width {sigma}: must be above 0 and below {12**-0.5:.4f}, a plain average's")
    if not 0 < decay < 1:
        raise ConfigError(f"optimizer.ema_decay={decay}: a width needs an EMA that averages")
    if len(set(steps)) < len(steps) or min(steps) < 1:
        raise ConfigError(f"--ema-width needs checkpoints of different steps above 0, got {list(steps)}")
    times = np.sort(np.asarray(steps, dtype=np.float64))
    rate, end, power = -log(decay), float(times[-1]), power_of(sigma)
    # Midpoints, finer where the narrowest profile needs it.
    cells = max(_GRID, int(20 * end * rate))
    t = (np.arange(cells) + 0.5) * (end / cells)
    expected = (t / end) ** (power + 1)
    stored = np.exp(-rate * np.maximum(times[:, None] - t, 0.0))
    # The last coefficient is one minus the others.
    others = np.linalg.lstsq((stored[:-1] - stored[-1]).T, expected - stored[-1], rcond=1e-9)[0]
    coefficients = np.append(others, 1.0 - others.sum())
    achieved = coefficients @ stored
    # Moments of a profile on [0, T] from its cumulative form, by parts.
    mean = 1.0 - float(achieved.mean())
    square = 1.0 - 2.0 * float((achieved * t).mean()) / end
    return WidthFit(
        coefficients=tuple(float(c) for c in coefficients),
        error=float(np.linalg.norm(achieved - expected) / np.linalg.norm(expected)),
        mean=mean,
        width=max(square - mean**2, 0.0) ** 0.5,
        expected_mean=(power + 1) / (power + 2),
    )


def power_of(sigma: float) -> float:
    """The exponent g of the power-function profile of relative width ``sigma``, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        wide = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5 > sigma
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2


def average(
    sources: Sequence[CheckpointReader],
    shares: Sequence[float],
    folder: Path,
    *,
    only_ema: bool = False,
    files: int = 1,
    workers: int = 1,
    advance: Advance = lambda name: None,
) -> CheckpointMeta:
    """Write the weighted sum of weights, EMA and REPA head (summed in float64, stored in fp32), without moments.

    Progress and configuration are those of the last source, which must be canonical; ``only_ema`` takes
    weights and REPA head from it unchanged as well.
    """
    last = sources[-1]
    assert last.meta is not None
    specs = {n: TensorSpec(s.shape) for n, s in last.specs.items() if n.startswith((MODEL, EMA, REPA))}

    def read(name: str) -> Tensor:
        if only_ema and not name.startswith(EMA):
            return last.read(name)
        return weighted_sum(sources, shares, name)

    origin = {
        "averaged": [str(s.path.name) for s in sources],
        "shares": list(shares),
        "sets": "ema" if only_ema else "all",
    }
    meta = dataclasses.replace(last.meta, optimizer_steps=0, data_state=origin)
    return write_canonical(folder, specs, read, meta, files=files, workers=workers, advance=advance)


def weighted_sum(sources: Sequence[CheckpointReader], shares: Sequence[float], name: str) -> Tensor:
    """One tensor's weighted sum in fp32, computed in float64 on pieces of :data:`PIECE_ELEMENTS`."""
    spec = sources[0].specs[name]
    out = torch.empty(spec.shape)
    for rows in pieces(spec, max_elements=PIECE_ELEMENTS):
        total = torch.zeros(())
        for source, share in zip(sources, shares, strict=True):
            total = total + share * source.read(name, rows).double()
        out[slice(*rows) if rows is not None else ...] = total.float()
    return out

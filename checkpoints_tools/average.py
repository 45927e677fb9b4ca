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
from functools import partial
from math import log

import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, CheckpointReader, Plan, TensorSpec, pieces
from checkpoints_tools.formats.canonical import write_canonical
from deco_scale.checkpoint.format import check_shapes
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
    """The exponent g of the power-function profile of relative width ``sigma``."""
    square = max(sigma, 1e-9) ** -2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def plan_average(
    sources: Sequence[CheckpointReader],
    *,
    weights: Sequence[float] | None = None,
    ema_width: float | None = None,
    max_error: float = 0.1,
    files: int = 1,
    workers: int = 1,
) -> Plan:
    """Plan a weighted sum of weights, EMA and REPA head (summed in float64, stored in fp32), without moments.

    Progress and configuration are those of the last source. ``weights`` are shares of any sum (default: equal).
    With ``ema_width`` only the EMA is averaged, and the rest is the last step's. Raises :class:`ConfigError` for
    sources that are not canonical or not of one model, and for a width that they do not allow.
    """
    metas = [source.meta for source in sources if source.meta is not None]
    if len(metas) < len(sources):
        raise ConfigError("average takes canonical checkpoints; import others first")
    shapes = [{n: s.shape for n, s in each.specs.items() if n.startswith((MODEL, EMA, REPA))} for each in sources]
    for other, theirs in zip(sources, shapes, strict=True):
        check_shapes(theirs, shapes[0], where=f"{other.path} does not fit {sources[0].path}")
    lines = []
    if ema_width is None:
        shares = _shares(weights, len(sources))
    else:
        if weights is not None:
            raise ConfigError("--weights and --ema-width exclude each other: give one")
        decays = {meta.config.get("optimizer", {}).get("ema_decay") for meta in metas}
        decay = next(iter(decays))
        if len(decays) > 1 or not isinstance(decay, float):
            raise ConfigError(f"--ema-width needs one known optimizer.ema_decay, the checkpoints have {decays}")
        order = sorted(range(len(sources)), key=lambda i: metas[i].optimizer_steps)
        sources, metas = [sources[i] for i in order], [metas[i] for i in order]
        fit = fit_width(ema_width, [meta.optimizer_steps for meta in metas], decay)
        shares = fit.coefficients
        lines.append(
            f"fitted: width {fit.width:.4f} (requested {ema_width:g}), mean at {fit.mean:.4f} of the run "
            f"(expected {fit.expected_mean:.4f}), relative error {fit.error:.4f}"
        )
        if fit.error > max_error:
            raise ConfigError(
                f"--ema-width {ema_width}: these checkpoints allow it only with an error of {fit.error:.4f} "
                f"(allowed: {max_error}); give more of them, or another width"
            )
    lines += [f"{share:+.6f}  {source.path}" for source, share in zip(sources, shares, strict=True)]

    def read(name: str) -> Tensor:
        if ema_width is not None and not name.startswith(EMA):
            return sources[-1].read(name)
        out = torch.empty(specs[name].shape)
        for rows in pieces(specs[name], max_elements=PIECE_ELEMENTS):
            total = torch.zeros(())
            for source, share in zip(sources, shares, strict=True):
                total = total + share * source.read(name, rows).double()
            out[slice(*rows) if rows is not None else ...] = total.float()
        return out

    origin = {
        "averaged": [source.path.name for source in sources],
        "shares": list(shares),
        "sets": "all" if ema_width is None else "ema",
    }
    meta = dataclasses.replace(metas[-1], optimizer_steps=0, data_state=origin)
    specs = {name: TensorSpec(shape) for name, shape in shapes[0].items()}
    run = partial(write_canonical, specs=specs, read=read, meta=meta, files=files, workers=workers)
    return Plan(lines, len(specs), run)


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Shares that sum to 1 from any positive numbers; equal ones where none are given."""
    weights = weights or (1.0,) * count
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints")
    if not all(0 < w < float("inf") for w in weights):
        raise ConfigError(f"--weights {','.join(map(str, weights))}: all must be above 0 and finite")
    return tuple(w / sum(weights) for w in weights)

"""Statistics and differences of tensors, computed in bounded pieces, for ``inspect`` and ``diff``."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isnan, sqrt

import torch
from torch import Tensor

from checkpoints_tools.base import CheckpointReader, pieces

PIECE_ELEMENTS = 4 * 2**20
"""Elements that are in memory in float64 at a time."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Statistics of the finite elements; NaN where there are none of them."""

    minimum: float
    maximum: float
    mean: float
    std: float
    nans: int
    infinities: int
    zero: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest absolute difference, and the same over the largest absolute value of the first tensor.

    A NaN facing a NaN, or an infinity its like, differs by nothing; facing anything else, by infinity.
    """

    absolute: float
    relative: float


def tensor_facts(source: CheckpointReader, name: str) -> TensorFacts:
    """Statistics of one tensor, in float64 (two passes, so that the deviation keeps its digits)."""
    low, high, total, count, nans, infinities, nonzero = inf, -inf, 0.0, 0, 0, 0, 0
    for part in _parts(source, name):
        finite = part[torch.isfinite(part)]
        nans += int(torch.isnan(part).sum())
        infinities += int(torch.isinf(part).sum())
        nonzero += int((part != 0).sum())
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total, count = total + float(finite.sum()), count + finite.numel()
    mean = total / count if count else float("nan")
    squares = 0.0
    if count:
        for part in _parts(source, name):
            squares += float((part[torch.isfinite(part)] - mean).square().sum())
    std = sqrt(squares / count) if count else float("nan")
    low, high = (low, high) if count else (float("nan"), float("nan"))
    numel = source.specs[name].numel
    return TensorFacts(low, high, mean, std, nans, infinities, numel > 0 and nonzero == 0)


def difference(first: CheckpointReader, second: CheckpointReader, name: str) -> Difference:
    """Compare one tensor of two sources; the shapes must be equal."""
    absolute, largest = 0.0, 0.0
    for raw_a, raw_b in zip(_raw_parts(first, name), _raw_parts(second, name), strict=True):
        if raw_a.dtype == raw_b.dtype and torch.equal(raw_a, raw_b) and bool(torch.isfinite(raw_a).all()):
            # Only its size can matter.
            largest = max(largest, float(raw_a.abs().max()) if raw_a.numel() else 0.0)
            continue
        a, b = raw_a.double(), raw_b.double()
        same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=inf, posinf=inf)
        if gap.numel():
            absolute = max(absolute, float(gap.max()))
            largest = max(largest, float(a.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    if absolute == 0.0:
        return Difference(0.0, 0.0)
    relative = absolute / largest if largest > 0 else inf
    return Difference(absolute, inf if isnan(relative) else relative)


def _parts(source: CheckpointReader, name: str) -> Iterator[Tensor]:
    return (part.double() for part in _raw_parts(source, name))


def _raw_parts(source: CheckpointReader, name: str) -> Iterator[Tensor]:
    for rows in pieces(source.specs[name], max_elements=PIECE_ELEMENTS):
        yield source.read(name, rows).flatten()

"""Statistics and differences of tensors in bounded pieces, and the tables of ``inspect`` and ``diff``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt

import torch
from rich.table import Table
from torch import Tensor

from checkpoints_tools.base import SETS, CheckpointReader, pieces
from data_pipeline.console import cell
from data_pipeline.text import human_bytes, shape_text

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
    low, high, total, squares, count, nans, infinities, nonzero = inf, -inf, 0.0, 0.0, 0, 0, 0, 0
    for raw in _parts(source, name):
        part = raw.double()
        finite = part[torch.isfinite(part)]
        nans += int(torch.isnan(part).sum())
        infinities += int(torch.isinf(part).sum())
        nonzero += int((part != 0).sum())
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total, count = total + float(finite.sum()), count + finite.numel()
    zero = source.specs[name].numel > 0 and nonzero == 0
    if not count:
        return TensorFacts(nan, nan, nan, nan, nans, infinities, zero)
    mean = total / count
    for raw in _parts(source, name):
        part = raw.double()
        squares += float((part[torch.isfinite(part)] - mean).square().sum())
    return TensorFacts(low, high, mean, sqrt(squares / count), nans, infinities, zero)


def difference(first: CheckpointReader, second: CheckpointReader, name: str) -> Difference:
    """Compare one tensor of two sources; the shapes must be equal."""
    absolute, largest = 0.0, 0.0
    for raw_a, raw_b in zip(_parts(first, name), _parts(second, name), strict=True):
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
    for rows in pieces(source.specs[name], max_elements=PIECE_ELEMENTS):
        yield source.read(name, rows).flatten()


def facts_table(source: CheckpointReader) -> Table:
    """Format, progress of the run, sizes, files."""
    table = Table("quantity", "value", title=cell(str(source.path)))

    def add(name: str, value: str) -> None:
        table.add_row(cell(name), cell(value))

    add("format", source.format)
    if source.meta is not None:
        meta = source.meta
        add("step", f"{meta.step:,} (stage {meta.stage}, {meta.samples:,} samples, seed {meta.seed})")
        add("optimizer steps", f"{meta.optimizer_steps:,}")
        add("parameter digest", meta.parameter_digest)
        parallel = meta.config.get("parallel")
        if isinstance(parallel, dict):
            add("written by", ", ".join(f"{k} {v}" for k, v in parallel.items() if k != "deepspeed"))
        add("data", str(meta.data_state))
    for name, value in source.facts.items():
        add(str(name), str(value)[:200])
    model = source.model
    add("model", ", ".join(f"{k} {getattr(model, k)}" for k in model.__slots__ if getattr(model, k)))
    for kind in SETS:
        specs = [s for n, s in source.specs.items() if n.startswith(f"{kind}.")]
        if specs:
            types = ", ".join(sorted({str(s.dtype).removeprefix("torch.") for s in specs}))
            count, size = sum(s.numel for s in specs), sum(s.nbytes for s in specs)
            add(kind, f"{len(specs)} tensors, {count:,} elements, {types}, {human_bytes(size)}")
    folder = source.path
    for file in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]:
        add("file", f"{file.relative_to(folder.parent)}, {human_bytes(file.stat().st_size)}")
    return table


def tensors_table(source: CheckpointReader, facts: Mapping[str, TensorFacts]) -> Table:
    """A line per tensor with its statistics."""
    table = Table(title="tensors")
    for column in ("tensor", "shape", "type"):
        table.add_column(column, overflow="fold")
    for column in ("min", "max", "mean", "std", "NaN", "inf", "zero"):
        table.add_column(column, justify="right")
    for name, spec in source.specs.items():
        one = facts[name]
        numbers = (f"{x:.4g}" for x in (one.minimum, one.maximum, one.mean, one.std))
        flags = (str(one.nans), str(one.infinities), "all" if one.zero else "")
        table.add_row(cell(name), shape_text(spec.shape), str(spec.dtype).removeprefix("torch."), *numbers, *flags)
    return table


def differences_table(differences: Mapping[str, Difference]) -> Table:
    """A line per tensor, largest absolute difference first."""
    table = Table(title="differences")
    table.add_column("tensor", overflow="fold")
    for column in ("max absolute", "max relative"):
        table.add_column(column, justify="right")
    for name, one in sorted(differences.items(), key=lambda item: (-item[1].absolute, item[0])):
        table.add_row(cell(name), f"{one.absolute:.6g}", f"{one.relative:.6g}")
    return table

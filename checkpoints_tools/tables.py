"""Tables of ``inspect`` and ``diff``."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from checkpoints_tools.base import SETS, CheckpointReader
from checkpoints_tools.tensor_stats import Difference, TensorFacts
from data_pipeline.console import cell
from data_pipeline.text import human_bytes, shape_text


def facts_table(source: CheckpointReader) -> Table:
    """Format, progress of the run, sizes, files."""
    table = Table("quantity", "value", title=cell(str(source.path)))
    for name, value in _rows(source):
        table.add_row(name, cell(value))
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
        table.add_row(cell(name), shape_text(spec.shape), dtype_text(spec.dtype), *numbers, *flags)
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


def dtype_text(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(source: CheckpointReader) -> Iterator[tuple[str, str]]:
    yield "format", source.format
    if source.meta is not None:
        meta = source.meta
        yield "step", f"{meta.step:,} (stage {meta.stage}, {meta.samples:,} samples, seed {meta.seed})"
        yield "optimizer steps", f"{meta.optimizer_steps:,}"
        yield "parameter digest", meta.parameter_digest
        parallel = meta.config.get("parallel")
        if isinstance(parallel, dict):
            yield "written by", ", ".join(f"{k} {v}" for k, v in parallel.items() if k != "deepspeed")
        yield "data", str(meta.data_state)
    for name, value in source.facts.items():
        yield str(name), str(value)[:200]
    model = source.model
    yield "model", ", ".join(f"{k} {getattr(model, k)}" for k in model.__slots__ if getattr(model, k))
    for kind in SETS:
        specs = [s for n, s in source.specs.items() if n.startswith(f"{kind}.")]
        if specs:
            types = ", ".join(sorted({dtype_text(s.dtype) for s in specs}))
            count, size = sum(s.numel for s in specs), sum(s.nbytes for s in specs)
            yield kind, f"{len(specs)} tensors, {count:,} elements, {types}, {human_bytes(size)}"
    for file in _files(source.path):
        yield "file", f"{file.relative_to(source.path.parent)}, {human_bytes(file.stat().st_size)}"


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]

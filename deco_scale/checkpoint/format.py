"""The files of a canonical checkpoint: their names, their checksums, and reading them without trusting them.

A folder ``step_XXXXXXXX`` holds PyTorch DCP files with single-device names and shapes (fp32), ``meta.json`` (the
run's progress, its configuration, a digest of the weights), and ``COMPLETE`` (size and CRC32C of each other file),
which is written last. A folder without ``COMPLETE`` is never read.
"""

import dataclasses
import errno
import fcntl
import json
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from deco_scale.checkpoint.dcp_metadata import read_index, to_dcp
from deco_scale.checkpoint.integrity import FileChecksums, check_file, write_checksummed
from deco_scale.errors import ConfigError, Damaged
from deco_scale.observability.run_dir import COMPLETE, complete_checkpoints

SCHEMA_VERSION = 2
META, METADATA = "meta.json", ".metadata"
_LISTED = 5
_MAX_COMPLETE_BYTES = 64 * 2**20

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without locks."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeta:
    """The run's progress and configuration.

    ``data_state`` is the loader's state (samples seen, digests, seed); ``metrics`` holds the last logged value of
    the metric by which the best checkpoints are chosen.
    """

    step: int
    stage: str
    samples: int
    seed: int
    optimizer_steps: int
    data_state: dict[str, Any]
    parameter_digest: str
    config: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    metrics: dict[str, float] = field(default_factory=dict)


def read_meta(path: Path) -> CheckpointMeta:
    """``meta.json`` of a complete checkpoint; raises :class:`ConfigError` (:class:`Damaged`) naming the file."""
    if not (path / COMPLETE).is_file():
        raise ConfigError(f"{path} is not a complete checkpoint (no {COMPLETE} file)")
    try:
        fields = json.loads((path / META).read_text())
        version = fields.get("schema_version")
        if version == SCHEMA_VERSION:
            return CheckpointMeta(**fields)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path / META} is damaged: {error}") from error
    raise ConfigError(f"{path / META}: schema version {version}, this program reads {SCHEMA_VERSION}")


def write_markers(folder: Path, meta: CheckpointMeta, checksums: FileChecksums) -> FileChecksums:
    """Write ``meta.json`` and then ``COMPLETE``, durably; returns the checksums of all files, these included."""
    text = json.dumps(dataclasses.asdict(meta), indent=1).encode()
    checksums = checksums | {META: write_checksummed(folder / META, text)}
    listing = encode_checksums(dict(sorted(checksums.items())))
    return checksums | {COMPLETE: write_checksummed(folder / COMPLETE, listing)}


def encode_checksums(checksums: FileChecksums) -> bytes:
    """Content of ``COMPLETE``. There is only one encoding, so that any changed byte is detected."""
    return json.dumps(checksums, indent=1).encode()


def read_checksums(path: Path) -> FileChecksums:
    """Content of ``COMPLETE``; raises :class:`Damaged` naming it."""
    try:
        with (path / COMPLETE).open("rb") as file:
            # What is longer is cut off, and no JSON then.
            raw = file.read(_MAX_COMPLETE_BYTES)
        table = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path / COMPLETE} is damaged: {error}") from error
    checksums = parse_checksums(table, path / COMPLETE)
    if encode_checksums(checksums) != raw or any("/" in name for name in checksums):
        raise Damaged(f"{path / COMPLETE} is damaged: it is not as it was written")
    return checksums


def parse_checksums(table: Any, listing: Path) -> FileChecksums:
    """Sizes and checksums of files of a folder, from ``listing``'s JSON; raises :class:`Damaged` naming it."""
    try:
        checksums = {name: (operator.index(size), operator.index(crc)) for name, (size, crc) in table.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise Damaged(f"{listing} is damaged: it is no table of files ({error})") from error
    outside = [name for name in checksums if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise Damaged(f"{listing} is damaged: it names {outside[0]!r}")
    return checksums


def verify(path: Path, *, rank: int = 0, world: int = 1) -> None:
    """Check size and CRC32C of this rank's share of the files; raises :class:`Damaged` naming a bad one."""
    for name, (size, crc) in sorted(read_checksums(path).items())[rank::world]:
        check_file(path / name, size, crc, listing=COMPLETE)


def find_checkpoint(path: Path) -> Path | None:
    """``path`` itself if it is a complete checkpoint, or the newest one of a run's folder; None without any."""
    if (path / COMPLETE).is_file():
        return path
    return next(reversed(complete_checkpoints(path / "checkpoints").values()), None)


def check_shapes(actual: Shapes, expected: Shapes, *, where: object) -> None:
    """Raise :class:`ConfigError` naming missing, unexpected and misshapen tensors."""
    problems = [f"missing {n}" for n in sorted(set(expected) - set(actual))]
    problems += [f"unexpected {n}" for n in sorted(set(actual) - set(expected))]
    problems += [
        f"{n} has shape {actual[n]}, expected {expected[n]}"
        for n in sorted(set(expected) & set(actual))
        if expected[n] != actual[n]
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConfigError(f"{where}: {'; '.join(problems[:_LISTED])}{more}")


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint, read without running any code that the index might name."""
    return {name: tensor.shape for name, tensor in read_index(path / METADATA).items()}


class Reader(FileSystemReader):
    """DCP's reader with our index reader; ``fetch`` is called with a file's name before it is read."""

    def __init__(self, path: Path, fetch: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(path)
        self._fetch = fetch

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = to_dcp(read_index(Path(self.path) / METADATA))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
            self._fetch(name)
        return super().read_data(plan, planner)


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Full CPU tensors whose names start with ``prefix`` (removed), in one process, checked."""
    read_meta(path)
    with shared_lock(path):
        verify(path)
        shapes = {n: s for n, s in stored_shapes(path).items() if n.startswith(prefix)}
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=Reader(path), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


@contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Keep a run from deleting this checkpoint while it is read, where the file system has locks."""
    with (path / COMPLETE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"{path / COMPLETE} cannot be locked: {error.strerror}") from error
        yield


@contextmanager
def without_record_checksums() -> Iterator[None]:
    """``torch.save`` without its archives' own CRC-32, which ``torch.load`` never compares.

    Computing it takes longer than our checksums and copies together. It is a setting of the whole process, so
    only one writer may run at a time.
    """
    from torch.utils.serialization import config

    before = config.save.compute_crc32
    config.save.compute_crc32 = False
    try:
        yield
    finally:
        config.save.compute_crc32 = before

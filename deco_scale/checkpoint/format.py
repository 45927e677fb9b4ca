"""The files of a canonical checkpoint: their names, their checksums, and reading them without trust.

A folder ``step_XXXXXXXX`` holds PyTorch DCP files with single-device names and shapes (fp32), ``meta.json`` (where
the run stands, its configuration, a digest of the weights), and ``COMPLETE`` (size and CRC32C of each other file),
which is written last. Without ``COMPLETE`` it is never read.
"""

import errno
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from deco_scale.checkpoint import dcp_metadata
from deco_scale.errors import ConfigError, Damaged

SCHEMA_VERSION = 2
META, COMPLETE, METADATA = "meta.json", "COMPLETE", ".metadata"
STEP = "step_"
_READ_BYTES = 2 * 2**20
WRITE_BYTES = 2**20
"""Bytes that one call writes: for more, recent kernels look for large pages and may take ten times as long."""
FLUSH_BYTES = 32 * 2**20
"""Bytes after which the disk is set to work."""
_LISTED = 5

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems without locks."""

FileSums = dict[str, tuple[int, int]]
"""Size and CRC32C of files by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeta:
    """Where the run stood.

    ``data_state`` is what the loader says of its place (samples seen, digests, seed), ``metrics`` holds the last
    logged value of what the best checkpoints are chosen by.
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
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{path / META}: schema version {fields.get('schema_version')}, "
                f"this program reads {SCHEMA_VERSION}"
            )
        return CheckpointMeta(**fields)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise Damaged(f"{path / META} is damaged: {error}") from error


def sums_text(sums: Mapping[str, tuple[int, int]]) -> bytes:
    """Content of ``COMPLETE``; the only way to write these sums, so that a changed byte is always found."""
    return json.dumps(sums, indent=1).encode()


def read_sums(path: Path) -> FileSums:
    """Content of ``COMPLETE``; raises :class:`Damaged` naming it."""
    try:
        text = (path / COMPLETE).read_bytes()
        found = {str(n): (int(e[0]), int(e[1])) for n, e in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise Damaged(f"{path / COMPLETE} is damaged: {error}") from error
    if sums_text(found) != text or any("/" in name for name in found):
        raise Damaged(f"{path / COMPLETE} is damaged: it is not as it was written")
    return found


def verify(path: Path, *, rank: int = 0, world: int = 1) -> None:
    """Check size and CRC32C of this rank's share of the files; names the first one that differs."""
    for name, (size, crc) in sorted(read_sums(path).items())[rank::world]:
        check_file(path / name, size, crc)


def check_file(file: Path, size: int, crc: int) -> None:
    """Compare a file with what ``COMPLETE`` says of it; raises :class:`ConfigError` naming both."""
    try:
        if file.stat().st_size == size and crc32c_of(file) == crc:
            return
    except FileNotFoundError:
        raise Damaged(f"{file} is missing, {COMPLETE} names it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    raise Damaged(f"{file} is damaged: size or checksum differ from {COMPLETE}")


def check_fit(path: object, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare stored names and shapes with the wanted; raises :class:`ConfigError` naming what differs."""
    problems = [f"missing {n}" for n in sorted(set(wanted) - set(found))]
    problems += [f"unexpected {n}" for n in sorted(set(found) - set(wanted))]
    problems += [
        f"{n} has shape {found[n]}, the model {wanted[n]}"
        for n in sorted(set(wanted) & set(found))
        if wanted[n] != found[n]
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "; ".join(problems[:_LISTED])
        raise ConfigError(f"{path} does not fit the configured model: {listed}{more}")


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint, read without running anything that its index could hold."""
    return {name: tensor.shape for name, tensor in dcp_metadata.read_index(path / METADATA).items()}


def _metadata(file: Path) -> Metadata:
    """DCP's own form of an index that was read as data."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in dcp_metadata.read_index(file).items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in tensor.pieces]
        properties = TensorProperties(dtype=tensor.dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for piece in tensor.pieces:
            index = MetadataIndex(name, torch.Size(piece.offsets))
            places[index] = _StorageInfo(piece.file, piece.start, piece.length)
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


class Reader(FileSystemReader):
    """DCP's reader with our index reader; ``fetch`` is called with a file's name before it is read."""

    def __init__(self, path: Path, fetch: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(path)
        self._fetch = fetch

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _metadata(Path(self.path) / METADATA)
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
    """Keep a checkpoint from being retired by a run that saves beside it, where the file system has locks."""
    with (path / COMPLETE).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"{path / COMPLETE} cannot be locked: {error.strerror}") from error
        yield


@contextmanager
def without_record_sums() -> Iterator[None]:
    """``torch.save`` without its archives' own CRC-32, which ``torch.load`` never compares.

    It takes longer than our checksums and the copying together. A setting of the whole process, so writers come
    one after another.
    """
    from torch.utils.serialization import config

    before = config.save.compute_crc32
    config.save.compute_crc32 = False
    try:
        yield
    finally:
        config.save.compute_crc32 = before


def start_flush(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with what was just written, so that there is less to wait for in the end."""
    if length > 0:
        # Linux begins to write dirty pages that are said to be needed no more.
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


class ChecksummedFile:
    """An open file that is only appended to, with the size and CRC32C of what was written."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._checksum, self._flushed = raw, google_crc32c.Checksum(), 0
        self.size = 0

    @property
    def crc(self) -> int:
        return int.from_bytes(self._checksum.digest(), "big")

    def write(self, data: Any) -> int:
        """Write all of ``data``, and let the disk begin after every ``FLUSH_BYTES``; returns its bytes."""
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), WRITE_BYTES):
            # The checksum takes bytes only. A piece at a time bounds the copy, and the time that the
            # interpreter is held; what is written then comes from the cache as well.
            piece = bytes(whole[start : start + WRITE_BYTES])
            self._raw.write(piece)
            self._checksum.update(piece)
            self.size += len(piece)
            if self.size - self._flushed >= FLUSH_BYTES:
                self._raw.flush()
                start_flush(self._raw.fileno(), self._flushed, self.size - self._flushed)
                self._flushed = self.size
        return len(whole)

    def flush(self) -> None:
        self._raw.flush()


def crc32c_of(path: Path) -> int:
    checksum = google_crc32c.Checksum()
    # Unbuffered, and pieces that the allocator reuses: several times as fast as larger ones.
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            checksum.update(piece)
    return int.from_bytes(checksum.digest(), "big")

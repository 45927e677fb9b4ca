"""The canonical folder, read and written tensor by tensor: no more than one tensor a worker is in memory.

Written folders are what :class:`deco_scale.training.checkpoint.Checkpoints` writes and reads: DCP files,
``meta.json``, ``COMPLETE``. PyTorch's own ``FileSystemWriter`` keeps every tensor of a file in memory until the
file is done, so the files are written here, in the same format (archives of ``torch.save`` one after another).
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from checkpoints_tools.base import SETS, Advance, TensorSpec
from checkpoints_tools.formats.torch_zip import Archive, StoredTensor
from checkpoints_tools.infer_config import model_of
from checkpoints_tools.memory_budget import SYNC_THREADS, Budget, held_bytes, in_threads, tensor_budget
from data_pipeline.storage.files import make_durable, write_durably
from deco_scale.checkpoint.dcp_metadata import IndexedTensor, Piece, read_index
from deco_scale.checkpoint.format import (
    COMPLETE,
    META,
    METADATA,
    CheckpointMeta,
    ChecksummedFile,
    crc32c_of,
    read_meta,
    shared_lock,
    sums_text,
    without_record_sums,
)
from deco_scale.errors import ConfigError, RunError
from deco_scale.models import ModelConfig

_TEMPORARY = ".saving_"


class CanonicalReader:
    """A complete canonical folder; implements :class:`checkpoints_tools.base.Source`.

    Checksums are not compared here (``deco-ckpt verify`` and the commands that write do that); the index and the
    sizes of all files are. A tensor made of several pieces is assembled from those that hold the wanted rows.
    """

    format = "canonical"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: CheckpointMeta = read_meta(path)
        # As long as this reader lives, a run that saves beside it does not retire the folder.
        self._held = ExitStack()
        self._held.enter_context(shared_lock(path))
        self._index = read_index(path / METADATA)
        sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
        for name, tensor in self._index.items():
            _check_pieces(path, name, tensor, sizes)
        self.specs = {n: TensorSpec(t.shape, t.dtype) for n, t in sorted(self._index.items())}
        strangers = [n for n in self.specs if n.split(".")[0] not in SETS]
        if strangers:
            raise ConfigError(f"{path / METADATA}: {strangers[0]} is none of {', '.join(SETS)}")

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    @cached_property
    def model(self) -> ModelConfig:
        stated = self.meta.config.get("model")
        return model_of(self.specs, stated, where=str(self.path))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._index[name]
        first, end = rows if rows is not None else (0, tensor.shape[0] if tensor.shape else 1)
        wanted = [p for p in tensor.pieces if _overlap(p, first, end) or not tensor.shape]
        if len(wanted) == 1 and (rows is None or wanted[0].sizes[1:] == tensor.shape[1:]):
            return self._read_piece(name, tensor, wanted[0], (first, end) if tensor.shape else None)
        out = torch.empty((end - first, *tensor.shape[1:]), dtype=tensor.dtype)
        for piece in wanted:
            start = max(piece.offsets[0], first)
            part = self._read_piece(name, tensor, piece, (first, end))
            box = [slice(start - first, start - first + part.shape[0])]
            box += [slice(o, o + s) for o, s in zip(piece.offsets[1:], piece.sizes[1:], strict=True)]
            out[tuple(box)] = part
        return out

    def check_tensor(self, name: str) -> None:
        """Parse the headers of all pieces of a tensor; raises :class:`ConfigError` naming file and tensor."""
        for piece in self._index[name].pieces:
            self._stored(name, self._index[name], piece)

    def _read_piece(self, name: str, tensor: IndexedTensor, piece: Piece, rows: tuple[int, int] | None) -> Tensor:
        """The rows of the whole tensor that ``piece`` has of ``rows``."""
        stored = self._stored(name, tensor, piece)
        if rows is None:
            return stored.read()
        start, end = (min(max(r - piece.offsets[0], 0), piece.sizes[0]) for r in rows)
        return stored.read() if (start, end) == (0, piece.sizes[0]) else stored.read((start, end))

    def _stored(self, name: str, tensor: IndexedTensor, piece: Piece) -> StoredTensor:
        file = self.path / piece.file
        archive = Archive(file, start=piece.start, length=piece.length, what=name)
        stored = archive.stored(archive.content, name)
        if stored.shape != piece.sizes or stored.dtype != tensor.dtype:
            raise ConfigError(
                f"{file}: {name} is {stored.dtype} of shape {stored.shape}, "
                f"{METADATA} says {tensor.dtype} of shape {piece.sizes}"
            )
        return stored


@dataclass(frozen=True, slots=True)
class _Written:
    """What one worker wrote: a file with its checksum, its tensors' places, and the weights' word sums."""

    file: str
    size: int
    crc: int
    results: list[WriteResult]
    word_sums: dict[str, int]


def write_canonical(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    meta: CheckpointMeta,
    *,
    files: int = 1,
    workers: int = 1,
    memory: int | None = None,
    advance: Advance = lambda name: None,
) -> CheckpointMeta:
    """Write a canonical folder; ``read`` is called for one name after another, by each of ``workers`` threads.

    ``memory`` bounds the bytes of tensors that are held (by default a quarter more than the largest tensor).

    ``meta.parameter_digest`` is computed while writing; the completed meta is returned. All tensors are stored in
    fp32. The folder is made under a temporary name, made durable and renamed. Raises :class:`ConfigError` where
    ``folder`` exists or ``read`` gives a misshapen tensor, :class:`RunError` where the disk refuses; then nothing
    is left behind.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder")
    temporary = folder.parent / f"{_TEMPORARY}{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        shares = [names for names in _shares(specs, files) if names]
        budget = Budget(tensor_budget(specs.values(), memory))

        def work(number: int) -> _Written:
            return _write_file(temporary, f"__0_{number}.distcp", shares[number], specs, read, budget, advance)

        with without_record_sums(), ThreadPoolExecutor(max(1, workers)) as pool:
            written = list(pool.map(work, range(len(shares))))
        in_threads(make_durable, [temporary / w.file for w in written], SYNC_THREADS)
        meta = dataclasses.replace(
            meta, parameter_digest=digest_of_sums({n: s for w in written for n, s in w.word_sums.items()})
        )
        _finish(temporary, folder, specs, written, meta)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def word_sum(tensor: Tensor) -> int:
    """Sum of the 32-bit words of a tensor's fp32 values, a part of :func:`digest_of_sums`."""
    words = tensor.float().contiguous().view(-1).view(torch.int32).numpy()
    # The sum wraps around as one of the whole would.
    return int(words.sum(dtype=np.int64))


def digest_of_sums(sums: Mapping[str, int]) -> str:
    """The weights' digest, as ``deco_scale.training.checkpoint.parameter_digest`` makes it of live tensors."""
    parts = [f"{name}:{sums[name]}" for name in sorted(sums)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write_file(
    folder: Path,
    file: str,
    names: list[str],
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    budget: Budget,
    advance: Advance,
) -> _Written:
    results: list[WriteResult] = []
    sums: dict[str, int] = {}
    with (folder / file).open("wb") as raw:
        out = ChecksummedFile(raw)
        for name in names:
            with budget.hold(held_bytes(specs[name])):
                start = out.size
                words = _append(out, name, specs[name], read)
            if name.startswith("model."):
                sums[name] = words
            index = MetadataIndex(name, [0] * len(specs[name].shape), 0)
            info = _StorageInfo(file, start, out.size - start)
            results.append(WriteResult(index=index, size_in_bytes=out.size - start, storage_data=info))
            advance(name)
    return _Written(file, out.size, out.crc, results, sums)


def _append(out: ChecksummedFile, name: str, spec: TensorSpec, read: Callable[[str], Tensor]) -> int:
    """Read one tensor, append its archive, and return the sum of its words."""
    tensor = read(name)
    if tuple(tensor.shape) != spec.shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected {spec.shape}")
    tensor = tensor.detach().float().contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        # torch.save writes a tensor's whole storage.
        tensor = tensor.clone()
    torch.save(tensor, out)  # type: ignore[arg-type]
    return word_sum(tensor) if name.startswith("model.") else 0


def _finish(
    temporary: Path,
    folder: Path,
    specs: Mapping[str, TensorSpec],
    written: list[_Written],
    meta: CheckpointMeta,
) -> None:
    index = Metadata(
        state_dict_metadata={n: _entry(spec) for n, spec in specs.items()},
        planner_data={n: (n,) for n in specs},
    )
    dcp.FileSystemWriter(temporary, sync_files=True).finish(index, [w.results for w in written])
    sums = {w.file: (w.size, w.crc) for w in written}
    text = json.dumps(dataclasses.asdict(meta), indent=1).encode()
    write_durably(temporary / META, text)
    for name in (METADATA, META):
        sums[name] = ((temporary / name).stat().st_size, crc32c_of(temporary / name))
    write_durably(temporary / COMPLETE, sums_text(sums))
    make_durable(temporary)
    os.rename(temporary, folder)
    make_durable(folder.parent)


def _entry(spec: TensorSpec) -> TensorStorageMetadata:
    whole = ChunkStorageMetadata(torch.Size([0] * len(spec.shape)), torch.Size(spec.shape))
    return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(spec.shape), [whole])


def _shares(specs: Mapping[str, TensorSpec], files: int) -> list[list[str]]:
    """Names for each file: largest first to the file with the least, so that files are of about one size."""
    shares: list[list[str]] = [[] for _ in range(max(1, files))]
    loads = [0] * len(shares)
    for name in sorted(specs, key=lambda n: (-specs[n].numel, n)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += specs[name].numel
    return shares


def _check_pieces(path: Path, name: str, tensor: IndexedTensor, sizes: Mapping[str, int]) -> None:
    """Pieces lie in files that are there, hold enough bytes, and fill the tensor once."""
    where = f"{path / METADATA}: {name}"
    held = 0
    for piece in tensor.pieces:
        if piece.file not in sizes:
            raise ConfigError(f"{path / piece.file} is missing; {name} lies in it")
        if piece.start + piece.length > sizes[piece.file]:
            raise ConfigError(f"{path / piece.file} is cut short: {name} goes beyond its end")
        count = prod(piece.sizes)
        if count * tensor.dtype.itemsize > piece.length:
            raise ConfigError(f"{where} claims a piece of {count} elements in {piece.length} bytes")
        boxes = zip(piece.offsets, piece.sizes, tensor.shape, strict=False)
        if not len(piece.offsets) == len(piece.sizes) == len(tensor.shape) or any(o + s > n for o, s, n in boxes):
            raise ConfigError(f"{where} has a piece outside of its shape {tensor.shape}")
        held += count
    if held != prod(tensor.shape) or _any_overlap(tensor.pieces):
        raise ConfigError(f"{where}: its pieces do not fill its shape {tensor.shape} exactly once")


def _any_overlap(pieces: tuple[Piece, ...]) -> bool:
    ordered = sorted((p for p in pieces if 0 not in p.sizes), key=lambda p: p.offsets)
    for i, one in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + n and b < a + m for a, m, b, n in sides):
                return True
    return False


def _overlap(piece: Piece, first: int, end: int) -> bool:
    return bool(piece.sizes) and piece.offsets[0] < end and first < piece.offsets[0] + piece.sizes[0]

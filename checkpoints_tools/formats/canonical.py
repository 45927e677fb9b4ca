"""The canonical folder, read and written tensor by tensor: at most one tensor per worker is in memory.

The folders have the format of :class:`deco_scale.checkpoint.manager.CheckpointManager`: DCP files, ``meta.json``,
``COMPLETE``. PyTorch's own ``FileSystemWriter`` keeps every tensor of a file in memory until the file is done, so
the files are written here, in the same format (``torch.save`` archives one after another).
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.base import SETS, Advance, CheckpointReader, TensorSpec, new_folder, read_checked
from checkpoints_tools.formats.torch_zip import Archive, StoredTensor
from checkpoints_tools.infer_config import infer_complete_model
from checkpoints_tools.memory_budget import MemoryBudget, in_threads, peak_bytes, sync_files, tensor_budget
from deco_scale.checkpoint.dcp_metadata import IndexedTensor, Piece, read_index, write_index
from deco_scale.checkpoint.format import (
    METADATA,
    CheckpointMeta,
    read_meta,
    shared_lock,
    without_record_checksums,
    write_markers,
)
from deco_scale.checkpoint.integrity import (
    MODEL_PREFIX,
    ChecksummedFile,
    FileChecksums,
    crc32c_of,
    digest_of_sums,
    word_sum,
)
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig


class CanonicalReader(CheckpointReader):
    """A complete canonical folder.

    Opening checks the index and the sizes of all files, but no checksums (``deco-ckpt verify`` and the commands
    that write do that). A tensor of several pieces is assembled from those that hold the requested rows.
    """

    format = "canonical"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: CheckpointMeta = read_meta(path)
        # As long as this reader exists, a run that saves beside it does not delete the folder.
        self._lock = ExitStack()
        self._lock.enter_context(shared_lock(path))
        self._index = read_index(path / METADATA)
        sizes = {p.name: p.stat().st_size for p in path.iterdir() if p.is_file()}
        for name, tensor in self._index.items():
            _check_pieces(path, name, tensor, sizes)
        self.specs = {n: TensorSpec(t.shape, t.dtype) for n, t in sorted(self._index.items())}
        unknown = [n for n in self.specs if n.split(".")[0] not in SETS]
        if unknown:
            raise ConfigError(f"{path / METADATA}: {unknown[0]} is none of {', '.join(SETS)}")

    @cached_property
    def model(self) -> ModelConfig:  # type: ignore[override]
        stated = self.meta.config.get("model")
        return infer_complete_model(self.specs, stated, where=str(self.path))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._index[name]
        if rows is None and len(tensor.pieces) == 1:
            return self._stored(name, tensor.pieces[0]).read()
        first, end = (0, tensor.shape[0]) if rows is None else rows
        out = torch.empty((end - first, *tensor.shape[1:]), dtype=tensor.dtype)
        for piece in tensor.pieces:
            top = piece.offsets[0]
            start, stop = max(first, top), min(end, top + piece.sizes[0])
            if start < stop:
                part = self._stored(name, piece).read((start - top, stop - top))
                if part.shape == out.shape:
                    return part
                columns = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
                out[slice(start - first, stop - first), *(slice(o, o + s) for o, s in columns)] = part
        return out

    def check_tensor(self, name: str) -> None:
        """Parse the headers of all pieces of a tensor; raises :class:`ConfigError` naming file and tensor."""
        for piece in self._index[name].pieces:
            self._stored(name, piece)

    def _stored(self, name: str, piece: Piece) -> StoredTensor:
        tensor = self._index[name]
        file = self.path / piece.file
        archive = Archive(file, start=piece.start, length=piece.length, what=name)
        stored = archive.stored(archive.content, name)
        if stored.shape != piece.sizes or stored.dtype != tensor.dtype:
            raise ConfigError(
                f"{file}: {name} is {stored.dtype} of shape {stored.shape}, "
                f"{METADATA} has {tensor.dtype} of shape {piece.sizes}"
            )
        return stored


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
    """Write a canonical folder; each of ``workers`` threads calls ``read`` for one name after another.

    ``memory`` bounds the bytes of tensors in memory (default: a quarter more than the largest tensor).

    Returns ``meta`` with the ``parameter_digest``, which is computed while writing. All tensors are stored in
    fp32. The folder is written under a temporary name, made durable and renamed. Raises :class:`ConfigError` if
    ``folder`` exists or ``read`` returns a misshapen tensor, :class:`RunError` if the disk cannot be written; then
    nothing is left behind.
    """
    shares = [names for names in _shares(specs, files) if names]
    budget = MemoryBudget(tensor_budget(specs.values(), memory))
    with new_folder(folder) as temporary:
        # Each thread has its own names in these.
        index: dict[str, IndexedTensor] = {}
        word_sums: dict[str, int] = {}
        checksums: FileChecksums = {}

        def write_file(number: int) -> None:
            file = f"__0_{number}.distcp"
            with ChecksummedFile(temporary / file) as out:
                for name in shares[number]:
                    start, shape = out.size, specs[name].shape
                    with budget.reserve(peak_bytes(specs[name])):
                        tensor = read_checked(read, name, TensorSpec(shape))
                        if name.startswith(MODEL_PREFIX):
                            word_sums[name] = word_sum(tensor)
                        if tensor.untyped_storage().nbytes() != tensor.nbytes:
                            # torch.save writes a tensor's whole storage.
                            tensor = tensor.clone()
                        torch.save(tensor, out)  # type: ignore[arg-type]
                        del tensor
                    piece = Piece((0,) * len(shape), shape, file, start, out.size - start)
                    index[name] = IndexedTensor(shape, torch.float32, (piece,))
                    advance(name)
            checksums[file] = out.checksum

        with without_record_checksums():
            in_threads(write_file, range(len(shares)), workers)
        sync_files([temporary / file for file in checksums])
        meta = dataclasses.replace(meta, parameter_digest=digest_of_sums(word_sums))
        write_index(temporary, dict(sorted(index.items())))
        checksums[METADATA] = ((temporary / METADATA).stat().st_size, crc32c_of(temporary / METADATA))
        write_markers(temporary, meta, checksums)
    return meta


def _shares(specs: Mapping[str, TensorSpec], files: int) -> list[list[str]]:
    """Names for each file: largest first, each to the smallest file, so that files have about the same size."""
    shares: list[list[str]] = [[] for _ in range(max(1, files))]
    loads = [0] * len(shares)
    for name in sorted(specs, key=lambda n: (-specs[n].numel, n)):
        smallest = loads.index(min(loads))
        shares[smallest].append(name)
        loads[smallest] += specs[name].numel
    return shares


def _check_pieces(path: Path, name: str, tensor: IndexedTensor, sizes: Mapping[str, int]) -> None:
    """Pieces must lie in existing files that are long enough, and fill the tensor exactly once."""
    where = f"{path / METADATA}: {name}"
    elements = 0
    for piece in tensor.pieces:
        if piece.file not in sizes:
            raise ConfigError(f"{path / piece.file} is missing; {name} lies in it")
        if piece.start + piece.length > sizes[piece.file]:
            raise ConfigError(f"{path / piece.file} is truncated: {name} goes beyond its end")
        count = prod(piece.sizes)
        if count * tensor.dtype.itemsize > piece.length:
            raise ConfigError(f"{where} claims a piece of {count} elements in {piece.length} bytes")
        boxes = zip(piece.offsets, piece.sizes, tensor.shape, strict=False)
        if not len(piece.offsets) == len(piece.sizes) == len(tensor.shape) or any(o + s > n for o, s, n in boxes):
            raise ConfigError(f"{where} has a piece outside of its shape {tensor.shape}")
        elements += count
    if elements != prod(tensor.shape) or _any_overlap(tensor.pieces):
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

"""DCP's index (``.metadata``): read as data without unpickling DCP's classes, and written by DCP itself.

The index is a pickle that names classes by module and name. Each name must be in a fixed table and is replaced by
an inert class that only stores what it is given. The opcodes are checked first: only those that DCP's writer uses
are accepted, and memo numbers must be smaller than the file, so that no index can reserve memory that it does not
fill.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from deco_scale.errors import ConfigError, Damaged

MAX_INDEX_BYTES = 256 * 2**20
"""Larger indexes are refused; each piece of a tensor takes about 200 bytes."""

_METADATA = "torch.distributed.checkpoint.metadata"
_SHELLS = {
    f"{_METADATA}.Metadata", f"{_METADATA}.MetadataIndex", f"{_METADATA}.TensorStorageMetadata",
    f"{_METADATA}.BytesStorageMetadata", f"{_METADATA}.TensorProperties", f"{_METADATA}.ChunkStorageMetadata",
    f"{_METADATA}.StorageMeta", "torch.distributed.checkpoint.filesystem._StorageInfo",
}  # fmt: skip
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and the byte range of a file that holds it as a ``torch.save`` archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class IndexedTensor:
    """Shape, type and pieces of a tensor; whether the pieces fill it is for the reader to check."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def read_index(path: Path) -> dict[str, IndexedTensor]:
    """The tensors of a DCP folder by its ``.metadata``; raises :class:`ConfigError` naming the file."""
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise ConfigError(f"{path}: an index of {size} bytes is refused")
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        _check_opcodes(raw)
        return _tensors(_ShellUnpickler(io.BytesIO(raw)).load())
    except Exception as error:
        # Arbitrary bytes drive the unpickler: any exception means a damaged index.
        raise Damaged(f"{path} is damaged or not a checkpoint's: {type(error).__name__}: {error}") from error


def to_dcp(index: Mapping[str, IndexedTensor]) -> Metadata:
    """An index in DCP's own classes."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in index.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in tensor.pieces]
        properties = TensorProperties(dtype=tensor.dtype)
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for piece in tensor.pieces:
            key = MetadataIndex(name, torch.Size(piece.offsets))
            storage[key] = _StorageInfo(piece.file, piece.start, piece.length)
    return Metadata(
        entries, planner_data={n: (n,) for n in index}, storage_data=storage, storage_meta=StorageMeta()
    )


def write_index(folder: Path, index: Mapping[str, IndexedTensor]) -> None:
    """Write ``.metadata`` into ``folder``, durably."""
    metadata = to_dcp(index)
    results = [WriteResult(key, info.length, info) for key, info in metadata.storage_data.items()]
    FileSystemWriter(folder, sync_files=True).finish(metadata, [results])


class _Shell:
    """Replaces an object of DCP; ``fields`` is the state that the pickle gives it."""

    fields: Any = None

    def __setstate__(self, state: Any) -> None:
        self.fields = state


class _ShellUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _SHELLS:
            # A class of its own each time: a pickle can set attributes of what it is given.
            return type(name, (_Shell,), {})
        plain: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch", "Size"): lambda *values: tuple(*values),
            ("torch.serialization", "_get_layout"): lambda name: name,
            (_METADATA, "_MEM_FORMAT_ENCODING"): lambda value: value,
            ("pathlib", "PosixPath"): lambda *parts: parts,
        }
        if (module, name) in plain:
            return plain[module, name]
        dtype = torch.__dict__.get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


def _check_opcodes(raw: bytes) -> None:
    """Raise ``UnpicklingError`` for an opcode or memo number that DCP's writer never writes."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name} does not belong in a checkpoint's index")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > len(raw):
            raise pickle.UnpicklingError(f"{opcode.name} {argument} is beyond the index's {len(raw)} bytes")


def _tensors(metadata: Any) -> dict[str, IndexedTensor]:
    entries: Mapping[Any, Any] = _fields(metadata, "Metadata")["state_dict_metadata"]
    storage: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for key, info in _fields(metadata, "Metadata")["storage_data"].items():
        index = _fields(key, "MetadataIndex")
        storage[str(index["fqn"]), _numbers(index.get("offset") or ())] = _fields(info, "_StorageInfo")
    tensors: dict[str, IndexedTensor] = {}
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is not a tensor name")
        fields = _fields(entry, "TensorStorageMetadata")
        dtype, layout = _state(fields["properties"], "TensorProperties")[:2]
        if not isinstance(dtype, torch.dtype) or layout != "torch.strided":
            raise ValueError(f"{name} is not a dense tensor")
        pieces = tuple(_piece(name, chunk, storage) for chunk in fields["chunks"])
        tensors[name] = IndexedTensor(_numbers(fields["size"]), dtype, pieces)
    return tensors


def _piece(name: str, chunk: Any, storage: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]) -> Piece:
    fields = _fields(chunk, "ChunkStorageMetadata")
    offsets = _numbers(fields["offsets"])
    info = storage[name, offsets]
    if info.get("transform_descriptors"):
        raise ValueError(f"{name} is stored transformed (compressed or encrypted), which is not supported")
    start, length = _numbers((info["offset"], info["length"]))
    file = info["relative_path"]
    if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
        raise ValueError(f"{name} lies in {file!r}, which is no file of the folder")
    return Piece(offsets, _numbers(fields["sizes"]), file, start, length)


def _state(shell: Any, kind: str) -> Any:
    if not isinstance(shell, _Shell) or type(shell).__name__ != kind:
        raise ValueError(f"a {type(shell).__name__} instead of a {kind}")
    return shell.fields


def _fields(shell: Any, kind: str) -> Mapping[str, Any]:
    fields = _state(shell, kind)
    if not isinstance(fields, dict):
        raise ValueError(f"a {kind} without fields")
    return fields


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return numbers

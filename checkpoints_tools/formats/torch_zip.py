"""Reading ``torch.save`` archives without loading them: headers by ``weights_only``, data by offset.

An archive is a file (a Lightning ``.ckpt``) or a part of one (a tensor in a DCP file). Its pickle is
read by ``torch.load(weights_only=True, map_location="meta")``, which runs no code and allocates no tensor data.
The header is compared with the archive's own table of records, and that with the file's size, before anything is
read. Compressed records are refused: PyTorch writes none, and they could expand without bound.
"""

import dataclasses
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deco_scale.checkpoint.integrity import raw_bytes
from deco_scale.errors import ConfigError

_LOCAL_HEADER_BYTES = 30
_LOCAL_MAGIC = b"PK\x03\x04"
MAX_PICKLE_BYTES = 64 * 2**20
"""Largest pickle that is parsed; that of the 1.1B model is below 1 MiB."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A strided tensor whose first element is at byte ``start`` of ``file``; ``meta`` has its type and layout."""

    file: Path
    start: int
    meta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    def reshaped(self, shape: tuple[int, ...]) -> "StoredTensor":
        """The same contiguous tensor with another shape of as many elements."""
        return dataclasses.replace(self, meta=self.meta.view(shape))

    def part(self, index: int, count: int) -> "StoredTensor":
        """One of ``count`` equal parts along dimension 0."""
        meta = self.meta.chunk(count)[index]
        offset = int(meta.storage_offset() - self.meta.storage_offset())
        return dataclasses.replace(self, start=self.start + offset * self.dtype.itemsize, meta=meta)

    def read_into(self, flat: Tensor, first: int = 0) -> None:
        """Fill a flat tensor of the stored type with elements from ``first`` on, in the order of the file."""
        data = raw_bytes(flat)
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.start + first * self.dtype.itemsize)
                count = stream.readinto(data)
        except OSError as error:
            raise ConfigError(f"{self.file} cannot be read: {error.strerror}") from error
        if count < len(data):
            raise ConfigError(f"{self.file} is truncated: {len(data) - count} bytes are missing")

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """Contiguous copy of all rows, or of some along dimension 0."""
        part = self.meta if rows is None else self.meta[rows[0] : rows[1]]
        flat = torch.empty(_extent(part), dtype=self.dtype)
        self.read_into(flat, int(part.storage_offset() - self.meta.storage_offset()))
        return flat.as_strided(part.shape, part.stride()).contiguous()


class Archive:
    """The parsed header of an archive: ``content`` has meta tensors, which :meth:`stored` locates in the file.

    Raises :class:`ConfigError` naming ``file`` (and ``what`` is read from it) if it is not a plain archive.
    """

    def __init__(self, file: Path, *, start: int = 0, length: int | None = None, what: str = "") -> None:
        self.file, self._start = file, start
        self._where = f"{file}: {what}" if what else str(file)
        try:
            length = file.stat().st_size - start if length is None else length
            with file.open("rb") as raw:
                view = io.BufferedReader(_FileRange(raw, start, length))
                self._records = _data_records(view, length, self._where)
                view.seek(0)
                self.content: Any = torch.load(view, map_location="meta", weights_only=True)
        except OSError as error:
            raise ConfigError(f"{self._where} cannot be read: {error.strerror or error}") from error
        except ConfigError:
            raise
        except pickle.UnpicklingError as error:
            raise ConfigError(f"{self._where} is refused: {_first_line(error)}") from error
        except Exception as error:
            # The pickle machine meets arbitrary bytes here: any exception means a damaged archive.
            raise ConfigError(f"{self._where} is damaged or truncated: {_first_line(error)}") from error

    def stored(self, tensor: object, name: str) -> StoredTensor:
        """Locate the data of a tensor of ``content``; raises :class:`ConfigError` naming the tensor."""
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"{self._where}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "meta":
            raise ConfigError(f"{self._where}: {name} is not a plain dense tensor")
        position = tensor.untyped_storage()._checkpoint_offset
        available = self._records.get(-1 if position is None else position)
        if position is None or available is None:
            raise ConfigError(f"{self._where}: the data of {name} are not at the offset in its header")
        first, size = int(tensor.storage_offset()), tensor.dtype.itemsize
        needed = (first + _extent(tensor)) * size
        if needed > available or tensor.numel() * size > available:
            raise ConfigError(
                f"{self._where}: {name} of shape {tuple(tensor.shape)} needs {needed} bytes, "
                f"{available} are stored for it"
            )
        return StoredTensor(self.file, self._start + position + first * size, tensor)


def check_record_crcs(file: Path) -> None:
    """Compare the CRC-32 of all records of a ``torch.save`` file; raises :class:`ConfigError` naming one."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    if bad is not None:
        raise ConfigError(f"{file} is damaged: record {bad} differs from its checksum")


def _data_records(view: BinaryIO, length: int, where: str) -> Mapping[int, int]:
    """Size of each record by the offset of its data; all records must be uncompressed and inside the archive."""
    if view.read(4) != _LOCAL_MAGIC:
        raise ConfigError(
            f"{where} is not a torch.save archive (PyTorch 1.6 or newer writes them; "
            "load an older file there and save it again)"
        )
    records: dict[int, int] = {}
    with zipfile.ZipFile(view) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ConfigError(f"{where}: record {info.filename} is compressed, as torch.save writes none")
            view.seek(info.header_offset)
            header = view.read(_LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or header[:4] != _LOCAL_MAGIC:
                raise ConfigError(f"{where}: record {info.filename} is not at the offset in the table")
            data = info.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
            if data + info.file_size > length:
                raise ConfigError(f"{where} is truncated: record {info.filename} goes beyond its end")
            if info.filename.endswith("/data.pkl") and info.file_size > MAX_PICKLE_BYTES:
                raise ConfigError(f"{where}: a header of {info.file_size} bytes is refused")
            if info.filename.endswith("/byteorder"):
                view.seek(data)
                if view.read(info.file_size) != b"little":
                    raise ConfigError(f"{where} was written on a big-endian machine, which is not supported")
            records[data] = info.file_size
    return records


class _FileRange(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} before the archive's start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._file.fileno(), count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last one of a strided tensor."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (useful or lines or ["no further information"])[0]

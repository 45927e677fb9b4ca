"""Checksums of files, taken while they are written, and a digest of the weights that ignores sharding."""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from deco_scale.errors import ConfigError, Damaged

WRITE_BYTES = 2**20
"""Bytes that one call writes: for more, recent kernels look for large pages and may take ten times as long."""
FLUSH_BYTES = 32 * 2**20
"""Bytes after which the kernel is asked to begin writing to the disk."""
_READ_BYTES = 2 * 2**20
MODEL_PREFIX = "model."

FileChecksums = dict[str, tuple[int, int]]
"""Size and CRC32C of files by name."""


class ChecksummedFile(io.BufferedWriter):
    """A new file that is only appended to, with the size and CRC32C of what was written.

    The first error is kept as :attr:`problem`, because ``torch.save`` hides it behind its own.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.size, self._crc, self._flushed = 0, 0, 0
        self.problem: OSError | None = None

    @property
    def checksum(self) -> tuple[int, int]:
        """Size and CRC32C of what was written."""
        return self.size, self._crc

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, starting a flush after every ``FLUSH_BYTES``; returns its bytes."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), WRITE_BYTES):
                # The checksum takes bytes only. Small pieces bound the copy and the time that the interpreter is
                # held; what is written then comes from the cache as well.
                piece = bytes(view[start : start + WRITE_BYTES])
                super().write(piece)
                self._crc = google_crc32c.extend(self._crc, piece)
                self.size += len(piece)
                if self.size - self._flushed >= FLUSH_BYTES:
                    start_flush(self.fileno(), self._flushed, self.size - self._flushed)
                    self._flushed = self.size
        except OSError as error:
            self.problem = self.problem or OSError(error.errno, error.strerror, str(self.name))
            raise
        return len(view)

    def fileno(self) -> int:
        # DCP asks for it to make the file durable, and does not flush its index before.
        self.flush()
        return super().fileno()

    def sync(self) -> tuple[int, int]:
        """Wait until everything is on the disk; returns :attr:`checksum`."""
        os.fsync(self.fileno())
        return self.checksum


def write_checksummed(path: Path, data: bytes) -> tuple[int, int]:
    """Write a small file durably; size and CRC32C."""
    with ChecksummedFile(path) as file:
        file.write(data)
        return file.sync()


def crc32c_of(path: Path) -> int:
    crc = 0
    # Unbuffered, and pieces that the allocator reuses: several times as fast as larger ones.
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            crc = google_crc32c.extend(crc, piece)
    return crc


def check_file(file: Path, size: int, crc: int, *, listing: str) -> None:
    """Compare a file with its entry in ``listing``; raises :class:`ConfigError` naming both."""
    try:
        if file.stat().st_size == size and crc32c_of(file) == crc:
            return
    except FileNotFoundError:
        raise Damaged(f"{file} is missing, {listing} names it") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    raise Damaged(f"{file} is damaged: size or checksum differ from {listing}")


def start_flush(descriptor: int, start: int, length: int) -> None:
    """Ask the kernel to begin writing what was just written, so that the final sync has less to wait for."""
    if length > 0:
        # Linux starts to write dirty pages that are declared as no longer needed.
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def word_sum(tensor: Tensor) -> int:
    """Sum of the 32-bit words of a tensor's fp32 values, modulo 2^64, a part of :func:`digest_of_sums`."""
    return int(tensor.detach().float().contiguous().view(-1).view(torch.int32).sum(dtype=torch.int64))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any type, not copied."""
    if not tensor.numel():
        return memoryview(bytearray())
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest_of_sums(sums: Mapping[str, int]) -> str:
    """The weights' digest from the word sums of complete tensors."""
    parts = [f"{name}:{sums[name]}" for name in sorted(sums)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

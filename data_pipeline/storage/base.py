"""Objects by key in an S3 bucket or a local folder, through one small interface.

A store may be used by several threads, and pickled: the copy connects anew. Errors never hold credentials.
"""

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from data_pipeline.errors import DataError, StoreError
from data_pipeline.storage.files import PARTIAL, atomic_path
from data_pipeline.storage.retry import RetryBudget

_COUNTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Key relative to the store's URL, size in bytes, and an opaque tag that changes with the content."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a bucket is reached: by unsigned requests (``anonymous``), at the reader's cost (``requester_pays``).

    A request without progress for ``deadline_s`` seconds fails; an attempt that receives nothing for
    ``read_timeout_s`` is a stall. ``connections`` bounds the sockets kept open.
    """

    anonymous: bool = False
    requester_pays: bool = False
    deadline_s: float = 300.0
    connections: int = 32
    read_timeout_s: float = 30.0


class Counters(Counter[str]):
    """Counts that several threads add to."""

    def add(self, **counts: int) -> None:
        with _COUNTING:
            self.update(counts)


class Store(Protocol):
    """A flat namespace of objects below one URL; all methods raise :class:`StoreError`.

    ``counters`` counts "requests" and "bytes" received; over S3 also "retries" and the faults behind them:
    "fault_503", "fault_5xx", "fault_reset", "fault_stall" and "fault_truncated".
    """

    url: str
    counters: Counters

    def list(self) -> Iterator[ObjectInfo]:
        """All objects below the URL, sorted by key."""

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """Exactly ``length`` bytes from ``offset``; with ``etag``, only of that very object."""

    def read_all(self, key: str) -> bytes | None:
        """The whole object, or None where there is none."""

    def info(self, key: str) -> ObjectInfo | None:
        """An object's size and tag, or None where there is none."""

    def delete(self, key: str) -> None:
        """Remove an object; none is no error."""

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on a local disk, None for one that does not."""
        return None

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object, all or nothing."""

    def write_file(self, key: str, path: Path) -> None:
        """Create or replace an object from a file, all or nothing."""

    def abort_uploads(self) -> None:
        """Remove what interrupted uploads have left behind, which is billed and which no listing shows."""
        return None


class LocalStore(Store):
    """Files below a folder. Interrupted writes leave nothing that would have to be removed."""

    def __init__(self, root: str) -> None:
        self.url, self.counters = root, Counters(requests=0, bytes=0)
        self._root = Path(root).expanduser()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.url,)

    def list(self) -> Iterator[ObjectInfo]:
        if not self._root.is_dir():
            raise StoreError(f"{self.url}: no such folder")
        self.counters.add(requests=1)
        for path in sorted(p for p in self._root.rglob("*") if p.is_file()):
            if path.suffix != PARTIAL:
                yield self._info(path)

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        with self._errors(key) as path:
            if etag is not None and self._info(path).etag != etag:
                raise StoreError(f"{path} changed since it was indexed; run deco-data index again")
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        self.counters.add(requests=1, bytes=len(data))
        if len(data) != length:
            raise StoreError(f"{path}: ends at {offset + len(data)}, expected {offset + length}")
        return data

    def read_all(self, key: str) -> bytes | None:
        with self._errors(key) as path, contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            self.counters.add(requests=1, bytes=len(data))
            return data
        return None

    def info(self, key: str) -> ObjectInfo | None:
        with self._errors(key) as path, contextlib.suppress(FileNotFoundError):
            return self._info(path)
        return None

    def delete(self, key: str) -> None:
        with self._errors(key) as path:
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._root / key

    def write(self, key: str, data: bytes) -> None:
        with self._replacing(key) as partial:
            partial.write_bytes(data)

    def write_file(self, key: str, path: Path) -> None:
        with self._replacing(key) as partial:
            shutil.copyfile(path, partial)

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        self.counters.add(requests=1)
        with self._errors(key) as path, atomic_path(path, durable=False, shared=True) as partial:
            yield partial

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[Path]:
        """Path of an object; what the disk refuses becomes a :class:`StoreError`."""
        path = self._root / key
        try:
            yield path
        except OSError as error:
            raise StoreError(f"{error.filename or path}: {error.strerror}") from error

    def _info(self, path: Path) -> ObjectInfo:
        stat = path.stat()
        key = path.relative_to(self._root).as_posix()
        return ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")


def open_store(url: str, access: Access = Access(), *, budget: RetryBudget | None = None) -> Store:
    """Store for ``s3://bucket/prefix`` or a local path; those of one server may share a ``budget`` of retries."""
    scheme = urlparse(url).scheme if "://" in url else ""
    if scheme == "s3":
        # boto3 takes a third of a second to import, and local data need none of it.
        from data_pipeline.storage.s3 import S3Store

        return S3Store(url, access, budget or RetryBudget())
    if scheme in ("", "file"):
        return LocalStore(url.removeprefix("file://"))
    raise DataError(f"{url}: only s3:// URLs and local paths can be read")

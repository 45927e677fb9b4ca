"""Objects by key in an S3 bucket or a local folder, through one small interface.

A store may be used by several threads, and pickled: the copy connects anew. Errors name the object, never
credentials.
"""

import contextlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from data_pipeline.errors import DataError, StoreError
from data_pipeline.retry import RetryBudget


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Key relative to the store's URL, size in bytes, and an opaque tag that changes with the content."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a bucket is reached; local folders need none of it.

    ``anonymous`` sends unsigned requests, for public buckets; ``requester_pays`` accepts the costs of a bucket
    that asks for it. A request without progress for ``deadline_s`` seconds fails (see
    :class:`data_pipeline.retry.Backoff`); an attempt that receives nothing for ``read_timeout_s`` is a stall.
    ``connections`` bounds the sockets kept open.
    """

    anonymous: bool = False
    requester_pays: bool = False
    deadline_s: float = 300.0
    connections: int = 32
    read_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("deadline_s", "connections", "read_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


class Store(Protocol):
    """A flat namespace of objects below one URL; all methods raise :class:`StoreError`.

    ``counters`` counts "requests" and "bytes" received; over S3 also "retries" and the faults behind them:
    "fault_503", "fault_5xx", "fault_reset", "fault_stall" and "fault_truncated".
    """

    url: str
    counters: Counter[str]

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

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object, all or nothing."""

    def write_file(self, key: str, path: Path) -> None:
        """Create or replace an object from a file, all or nothing."""


def open_store(url: str, access: Access = Access(), *, budget: RetryBudget | None = None) -> Store:
    """Store for ``s3://bucket/prefix`` or a local path; raises :class:`DataError` for anything else.

    Stores of one process that read from the same server may share a ``budget`` of retries.
    """
    scheme = urlparse(url).scheme if "://" in url else ""
    if scheme == "s3":
        # boto3 takes a third of a second to import, and local data need none of it.
        from data_pipeline.s3 import S3Store

        return S3Store(url, access, budget or RetryBudget())
    if scheme in ("", "file"):
        return LocalStore(url.removeprefix("file://"))
    raise DataError(f"{url}: only s3:// URLs and local paths can be read")


class LocalStore:
    """Files below a folder."""

    def __init__(self, root: str) -> None:
        self.url = root
        self.counters: Counter[str] = Counter(requests=0, bytes=0)
        self._root = Path(root).expanduser()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.url,)

    def list(self) -> Iterator[ObjectInfo]:
        if not self._root.is_dir():
            raise StoreError(f"{self.url}: no such folder")
        self._count(0)
        for path in sorted(p for p in self._root.rglob("*") if p.is_file()):
            if not path.name.endswith(".partial"):
                yield self._info(path)

    def read(self, key: str, offset: int, length: int, etag: str | None = None) -> bytes:
        path = self._root / key
        try:
            if etag is not None and self._info(path).etag != etag:
                raise StoreError(f"{path} changed since it was indexed; run deco-data index again")
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        self._count(len(data))
        if len(data) != length:
            raise StoreError(f"{path}: ends at {offset + len(data)}, wanted {offset + length}")
        return data

    def read_all(self, key: str) -> bytes | None:
        try:
            data = (self._root / key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._root / key}: {error.strerror}") from error
        self._count(len(data))
        return data

    def info(self, key: str) -> ObjectInfo | None:
        try:
            return self._info(self._root / key)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._root / key}: {error.strerror}") from error

    def delete(self, key: str) -> None:
        try:
            (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{self._root / key}: {error.strerror}") from error

    def local_path(self, key: str) -> Path | None:
        return self._root / key

    def write(self, key: str, data: bytes) -> None:
        self._replace(key, lambda partial: partial.write_bytes(data))

    def write_file(self, key: str, path: Path) -> None:
        self._replace(key, lambda partial: shutil.copyfile(path, partial))

    def _replace(self, key: str, fill: Callable[[Path], object]) -> None:
        path = self._root / key
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        self._count(0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(partial)
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(f"{error.filename or path}: {error.strerror}") from error

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.counters["requests"] += 1
            self.counters["bytes"] += num_bytes

    def _info(self, path: Path) -> ObjectInfo:
        stat = path.stat()
        key = path.relative_to(self._root).as_posix()
        return ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")

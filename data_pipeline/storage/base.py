"""Objects by key in an S3 bucket or a local folder, through one small interface.

A store may be used by several threads, and pickled: the copy connects anew. Errors name the object, never
credentials.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from data_pipeline.errors import DataError
from data_pipeline.storage.retry import RetryBudget


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
    that asks for it. A request without progress for ``deadline_s`` seconds fails; an attempt that receives nothing
    for ``read_timeout_s`` is a stall. ``connections`` bounds the sockets kept open.
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

    def abort_uploads(self) -> None:
        """Remove what interrupted uploads have left behind, which is billed and which no listing shows."""


def open_store(url: str, access: Access = Access(), *, budget: RetryBudget | None = None) -> Store:
    """Store for ``s3://bucket/prefix`` or a local path; raises :class:`DataError` for anything else.

    Stores of one process that read from the same server may share a ``budget`` of retries.
    """
    scheme = urlparse(url).scheme if "://" in url else ""
    if scheme == "s3":
        # boto3 takes a third of a second to import, and local data need none of it.
        from data_pipeline.storage.s3 import S3Store

        return S3Store(url, access, budget or RetryBudget())
    if scheme in ("", "file"):
        from data_pipeline.storage.local import LocalStore

        return LocalStore(url.removeprefix("file://"))
    raise DataError(f"{url}: only s3:// URLs and local paths can be read")

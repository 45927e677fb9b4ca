"""Files below a local folder, as a store."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import StoreError
from data_pipeline.storage.base import ObjectInfo
from data_pipeline.storage.files import atomic_path


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
            raise StoreError(f"{path}: ends at {offset + len(data)}, expected {offset + length}")
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

    def abort_uploads(self) -> None:
        """Interrupted writes leave nothing that would have to be removed."""

    def _replace(self, key: str, fill: Callable[[Path], object]) -> None:
        path = self._root / key
        self._count(0)
        try:
            with atomic_path(path, durable=False, shared=True) as partial:
                fill(partial)
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

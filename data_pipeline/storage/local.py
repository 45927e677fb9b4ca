"""Files below a local folder, as a store."""

import contextlib
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
        with self._errors(key) as path:
            if etag is not None and self._info(path).etag != etag:
                raise StoreError(f"{path} changed since it was indexed; run deco-data index again")
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        self._count(len(data))
        if len(data) != length:
            raise StoreError(f"{path}: ends at {offset + len(data)}, expected {offset + length}")
        return data

    def read_all(self, key: str) -> bytes | None:
        with self._errors(key) as path, contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            self._count(len(data))
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
        self._replace(key, lambda partial: partial.write_bytes(data))

    def write_file(self, key: str, path: Path) -> None:
        self._replace(key, lambda partial: shutil.copyfile(path, partial))

    def abort_uploads(self) -> None:
        """Interrupted writes leave nothing that would have to be removed."""

    def _replace(self, key: str, fill: Callable[[Path], object]) -> None:
        self._count(0)
        with self._errors(key) as path, atomic_path(path, durable=False, shared=True) as partial:
            fill(partial)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[Path]:
        """Path of an object; what the disk refuses becomes a :class:`StoreError`."""
        path = self._root / key
        try:
            yield path
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

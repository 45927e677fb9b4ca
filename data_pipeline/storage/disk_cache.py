"""Chunks of data on a node's own disk, shared by the processes of the node.

An entry is one file, named by a hash of its key: the payload, then CRC32C of payload and key, then the payload's
length. It is checked on every read, so a damaged disk costs a fetch and never a wrong byte.

A ledger file holds the total bytes. A writer reserves its bytes there, under an flock, and evicts first if they
would not fit; so the cap holds for all processes together. The ledger errs towards too many bytes (killed writers,
files removed by hand), and each eviction corrects it. Files being written meanwhile may be counted short: the cap
is exceeded by at most one entry per writer.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import psutil

from data_pipeline.storage.base import Counters
from data_pipeline.storage.files import PARTIAL, atomic_path

logger = logging.getLogger(__name__)

LOW_WATER = 0.9
"""Share of the cap that an eviction leaves, so that not every write has to scan."""
LEFTOVER_AGE_S = 3600.0
PAUSE_S = 30.0
"""No writes for so long after one failed: a full disk would be filled again by each."""
TRAILER = struct.Struct("<IQ")
_COUNTERS = ("cache_hits", "cache_misses", "cache_damaged", "cache_evicted", "cache_errors")


class DiskCache:
    """At most ``limit_bytes`` of entries below ``folder``, the least recently used evicted first.

    It never raises for what the disk does: a folder that cannot be read or written is a miss, counted in
    ``counters`` and logged once. Usable from several threads; each process makes its own.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.counters = Counters(dict.fromkeys(_COUNTERS, 0))
        self._folder, self._limit = folder, limit_bytes
        self._warned = False
        self._paused_until = 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._ledger() as ledger:
                os.pwrite(ledger, struct.pack("<Q", sum(size for _, size, _ in self._scan())), 0)
        except OSError as error:
            self._failed(error)

    def get(self, key: str) -> bytes | None:
        """Payload of a key, or None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                data = file.read(max(0, os.fstat(file.fileno()).st_size - TRAILER.size))
                if file.read() == _trailer(key, data):
                    # What was used last is evicted last. Another user's file cannot be touched, but serves.
                    with contextlib.suppress(OSError):
                        os.utime(file.fileno())
                    self.counters.add(cache_hits=1)
                    return data
            self.counters.add(cache_damaged=1)
            self._remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed(error)
        self.counters.add(cache_misses=1)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep a payload; an entry larger than the cap is refused like a disk that is full."""
        now = time.time()
        if now < self._paused_until:
            return
        path, size = self._path(key), len(data) + TRAILER.size
        try:
            if size > self._limit:
                raise OSError(0, f"an entry of {size} bytes exceeds the cap of {self._limit}", str(path))
            self._reserve(size)
            with atomic_path(path, durable=False, shared=True) as partial, partial.open("wb") as file:
                file.write(data)
                file.write(_trailer(key, data))
        except OSError as error:
            self._paused_until = now + PAUSE_S
            self._failed(error)

    def get_or(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """Payload of a key, fetched and kept if it is not here; raises what ``fetch`` raises."""
        data = self.get(key)
        if data is None:
            data = fetch()
            self.put(key, data)
        return data

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / name

    def _reserve(self, size: int) -> None:
        """Enter bytes that will be written; makes room for them first."""
        with self._ledger() as ledger:
            raw = os.pread(ledger, 8, 0)
            total = int.from_bytes(raw, "little") if len(raw) == 8 else self._limit
            if total + size > self._limit:
                total = self._evict(int(LOW_WATER * self._limit) - size)
            os.pwrite(ledger, struct.pack("<Q", total + size), 0)

    def _evict(self, target: int) -> int:
        """Remove entries, the longest unused first, down to a number of bytes; returns the bytes that are left."""
        entries = sorted(self._scan())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= target:
                break
            if path.suffix != PARTIAL and self._remove(path):
                total -= size
                self.counters.add(cache_evicted=1)
        return total

    def _scan(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and path of each file; removes what killed writers left behind."""
        for folder in [each for each in self._folder.iterdir() if each.is_dir()]:
            for path in folder.iterdir():
                # Gone by now: renamed by its writer or removed by a reader that found it damaged.
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if not (self._is_leftover(path, stat.st_mtime) and self._remove(path)):
                        yield stat.st_mtime, stat.st_size, path

    def _is_leftover(self, path: Path, written: float) -> bool:
        if path.suffix != PARTIAL:
            return False
        writer = re.search(r"\.(\d{1,9})-\d+\.", path.name)
        killed = writer is not None and not psutil.pid_exists(int(writer[1]))
        return killed or time.time() - written > LEFTOVER_AGE_S

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error)
            return False
        return True

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """Descriptor of the ledger, locked against all other threads and processes."""
        # flock, not lockf: POSIX locks do not exclude threads, and any close() of the file would drop them.
        descriptor = os.open(self._folder / "ledger", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _failed(self, error: OSError) -> None:
        self.counters.add(cache_errors=1)
        first, self._warned = not self._warned, True
        if first:
            logger.warning(
                f"cannot read or write the cache {self._folder}: {error.strerror} "
                f"({error.filename or self._folder}); training continues and fetches the data instead"
            )


def _trailer(key: str, data: bytes) -> bytes:
    return TRAILER.pack(google_crc32c.extend(google_crc32c.value(data), key.encode()), len(data))

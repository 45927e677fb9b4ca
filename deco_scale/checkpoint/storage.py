"""Where complete checkpoints are stored: a local or shared folder, or a prefix of an object store."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import google_crc32c

from data_pipeline.errors import DataError, StoreError
from data_pipeline.storage.base import Store, open_store
from data_pipeline.storage.files import SAVING, make_durable
from deco_scale.checkpoint.format import META, METADATA, NO_LOCKS, read_checksums
from deco_scale.checkpoint.integrity import FileChecksums, check_file, crc32c_of
from deco_scale.errors import ConfigError, Damaged, RunError
from deco_scale.observability.run_dir import COMPLETE, STEP, complete_checkpoints

REPLACED, READING, RETIRED = ".replaced_", ".reading_", ".retired_"
_PIECE_BYTES = 16 * 2**20


class LocalStorage:
    """A run's complete checkpoints by step: folders ``step_XXXXXXXX`` of a local disk or a shared file system.

    Methods other than ``publish`` are for rank 0. The files are there already when they are published, and
    invisible until they are complete.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def path_of(self, step: int) -> Path:
        """Folder of a step."""
        return self._root / step_name(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return list(complete_checkpoints(self._root))

    def metrics(self, step: int) -> Mapping[str, float]:
        """The metrics that a checkpoint recorded; none where they cannot be parsed."""
        return _metrics((self.path_of(step) / META).read_bytes())

    def remove(self, step: int) -> None:
        """Remove a checkpoint, unless somebody is reading it (where the file system has locks)."""
        path = self.path_of(step)
        with _try_exclusive_lock(path / COMPLETE) as locked:
            if locked:
                # Renamed first, so that a half-removed folder is not taken for a checkpoint.
                retired = self._root / f"{RETIRED}{path.name}"
                os.rename(path, retired)
                shutil.rmtree(retired)

    def publish(self, folder: Path, step: int, names: Sequence[str], checksums: FileChecksums) -> None:
        """Store this rank's part: the files ``names`` of a finished ``folder``."""

    def complete(self, folder: Path, step: int, checksums: FileChecksums) -> None:
        """Make a published checkpoint visible. ``folder`` has ``meta.json`` and ``COMPLETE``; it is used up."""
        final = self.path_of(step)
        replaced = self._root / f"{REPLACED}{final.name}"
        make_durable(folder)
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(folder, final)
        except OSError:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        make_durable(self._root)
        shutil.rmtree(replaced, ignore_errors=True)

    def abort(self, step: int) -> None:
        """Remove what a failed save has published of a step."""

    def recover(self) -> None:
        """Remove what an interrupted save has left behind."""
        for replaced in self._root.glob(f"{REPLACED}*"):
            final = self._root / replaced.name.removeprefix(REPLACED)
            if final.exists():
                shutil.rmtree(replaced)
            else:
                os.rename(replaced, final)


class ObjectStorage:
    """Objects ``step_XXXXXXXX/<file>`` below a URL, ``COMPLETE`` stored last; see :class:`LocalStorage`."""

    def __init__(self, url: str) -> None:
        self._url, self._store = url.rstrip("/"), open_objects(url)

    def path_of(self, step: int) -> str:
        return f"{self._url}/{step_name(step)}"

    def steps(self) -> list[int]:
        return sorted(step for step, names in self._files().items() if COMPLETE in names)

    def metrics(self, step: int) -> Mapping[str, float]:
        with named_errors():
            return _metrics(self._store.read_all(f"{step_name(step)}/{META}") or b"")

    def remove(self, step: int) -> None:
        names = self._files().get(step, [])
        with named_errors():
            for name in sorted(names, key=lambda n: n != COMPLETE):
                self._store.delete(f"{step_name(step)}/{name}")

    def publish(self, folder: Path, step: int, names: Sequence[str], checksums: FileChecksums) -> None:
        for name in names:
            upload(self._store, f"{step_name(step)}/{name}", folder / name, checksums[name][1])

    def complete(self, folder: Path, step: int, checksums: FileChecksums) -> None:
        self.publish(folder, step, [META, COMPLETE], checksums)
        shutil.rmtree(folder, ignore_errors=True)

    def path_of_export(self, name: str) -> str:
        return f"{self._url}/exports/{name}"

    def publish_export(self, folder: Path) -> None:
        """Move an export's folder to the store, its settings last."""
        for file in sorted(folder.iterdir(), key=lambda f: f.suffix == ".json"):
            upload(self._store, f"exports/{folder.name}/{file.name}", file, crc32c_of(file))
        shutil.rmtree(folder, ignore_errors=True)

    abort = remove

    def recover(self) -> None:
        for step, names in self._files().items():
            if COMPLETE not in names:
                self.remove(step)
        with named_errors():
            self._store.abort_uploads()

    def _files(self) -> dict[int, list[str]]:
        """Names of files by step."""
        files: dict[int, list[str]] = {}
        for key in sizes_of(self._store):
            folder, _, name = key.partition("/")
            if folder.startswith(STEP) and folder.removeprefix(STEP).isdigit() and name:
                files.setdefault(int(folder.removeprefix(STEP)), []).append(name)
        return files


class ObjectFetcher:
    """Downloads files of a checkpoint in an object store to a scratch ``folder``, each once, and verifies them.

    ``COMPLETE``, ``meta.json`` and the index are fetched at once. Ranks that share the folder take turns by a lock
    on each file.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url.rstrip("/"), folder
        parent, _, name = self._url.rpartition("/")
        self._prefix, self._store = f"{name}/", open_objects(parent)
        sizes = sizes_of(self._store)
        self._sizes = {k.removeprefix(self._prefix): n for k, n in sizes.items() if k.startswith(self._prefix)}
        if COMPLETE not in self._sizes:
            raise ConfigError(f"{self._url} is not a complete checkpoint (no {COMPLETE} object)")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._checksums: Mapping[str, tuple[int, int | None]] = {COMPLETE: (self._sizes[COMPLETE], None)}
        self.fetch(COMPLETE)
        self._checksums = read_checksums(self._folder)
        self.fetch(META)
        self.fetch(METADATA)

    def fetch(self, name: str) -> None:
        """Raises :class:`ConfigError` for a file that is missing or damaged, naming the object."""
        file = self._folder / name
        size, crc = self._checksums.get(name, (-1, None))
        if size < 0 or self._sizes.get(name) != size:
            raise Damaged(f"{self._url}/{name} is missing, or its size differs from {COMPLETE}")
        partial = self._folder / f"{name}.partial"
        try:
            with (self._folder / f"{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if file.exists():
                    return
                with partial.open("wb") as out:
                    for piece in _pieces(self._store, self._prefix + name, size):
                        out.write(piece)
                if crc is not None:
                    check_file(partial, size, crc, listing=COMPLETE)
                os.rename(partial, file)
        except ConfigError as error:
            raise type(error)(f"{self._url}/{name}: {error}") from error
        except OSError as error:
            raise RunError(f"{error.filename or file}: {error.strerror}") from error


def open_objects(url: str) -> Store:
    """The store below ``s3://bucket/prefix``; raises :class:`ConfigError` for a URL that cannot be opened."""
    try:
        return open_store(url)
    except DataError as error:
        raise ConfigError(str(error)) from error


def sizes_of(store: Store) -> Mapping[str, int]:
    """Size in bytes of every object, by key relative to the store's URL."""
    with named_errors():
        return {entry.key: entry.size for entry in store.list()}


def upload(store: Store, key: str, path: Path, crc32c: int) -> None:
    """Upload a file and compare size and ETag; where the ETag is no MD5 of the bytes, read them back.

    Raises :class:`RunError` naming the object.
    """
    # Importing it imports boto3, which a trainer needs only once it has opened a store.
    from data_pipeline.storage.s3 import expected_etag

    size = path.stat().st_size
    with named_errors():
        store.write_file(key, path)
        stored = store.info(key)
        if stored is None or stored.size != size:
            raise StoreError(f"{store.url}/{key}: {stored.size if stored else 0} of {size} bytes were stored")
        if stored.etag == expected_etag(path, size):
            return
        stored_crc = 0
        for piece in _pieces(store, key, size):
            stored_crc = google_crc32c.extend(stored_crc, piece)
        if stored_crc != crc32c:
            raise StoreError(f"{store.url}/{key}: the stored bytes differ from those that were sent")


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn a store's errors into :class:`RunError`."""
    try:
        yield
    except DataError as error:
        # Its own message says which object; a cause could hold credentials.
        raise RunError(str(error)) from None


def step_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def remove_scratch(root: Path) -> None:
    """Remove the folders of interrupted saves, reads and removals below ``root``."""
    for leftover in [path for prefix in (SAVING, READING, RETIRED) for path in root.glob(f"{prefix}*")]:
        with suppress(FileNotFoundError):
            shutil.rmtree(leftover)


def _pieces(store: Store, key: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, _PIECE_BYTES):
        with named_errors():
            piece = store.read(key, start, min(_PIECE_BYTES, size - start))
        yield piece


def _metrics(text: bytes) -> Mapping[str, float]:
    try:
        metrics = json.loads(text).get("metrics", {})
        return {str(k): float(v) for k, v in metrics.items()}
    except (ValueError, AttributeError, TypeError):
        # Damaged: that is detected and reported when the checkpoint is read.
        return {}


@contextmanager
def _try_exclusive_lock(path: Path) -> Iterator[bool]:
    """Lock the file against readers; False if somebody is reading it."""
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                yield False
                return
            if error.errno not in NO_LOCKS:
                raise
        yield True

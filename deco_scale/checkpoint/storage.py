"""Where complete checkpoints stand: a local or shared folder, or a prefix of an object store."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from data_pipeline.storage.files import make_durable
from deco_scale.checkpoint.format import COMPLETE, META, NO_LOCKS, STEP, FileSums, check_file, crc32c_of, read_sums
from deco_scale.errors import ConfigError, Damaged, RunError

SAVING, REPLACED, READING, RETIRED = ".saving_", ".replaced_", ".reading_", ".retired_"
_PIECE_BYTES = 16 * 2**20


class ObjectStore(Protocol):
    """Objects below one URL; all methods raise :class:`RunError` naming the object."""

    url: str

    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of every object, by key relative to the URL."""

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""

    def put_file(self, key: str, path: Path, crc32c: int) -> None:
        """Create or replace an object, all or nothing; returns when the store holds exactly the file's bytes."""

    def delete(self, key: str) -> None:
        """Remove an object; none is no error."""

    def discard_uploads(self) -> None:
        """Remove what uploads that were broken off have left, which no listing shows."""


OpenObjects = Callable[[str], ObjectStore]
"""Opens the store below a URL."""


class CheckpointStorage(Protocol):
    """Complete checkpoints of one run by step. Methods other than ``publish`` are for rank 0."""

    def where(self, step: int) -> Path | str:
        """Folder, or URL, of a step."""

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""

    def metrics(self, step: int) -> Mapping[str, float]:
        """What the checkpoint of a step is judged by."""

    def remove(self, step: int) -> None:
        """Remove a checkpoint; one that somebody reads stays, where the storage has locks."""

    def publish(self, folder: Path, step: int, names: Sequence[str], sums: FileSums) -> None:
        """Bring this rank's part to its place: the files ``names`` of a finished ``folder``."""

    def complete(self, folder: Path, step: int, sums: FileSums) -> None:
        """Make a published checkpoint visible; ``folder`` has ``meta.json`` and ``COMPLETE``, and is used up."""

    def discard(self, step: int) -> None:
        """Remove what a failed save has published of a step."""

    def clean(self) -> None:
        """Remove what an interrupted save has left."""


class LocalStorage:
    """Folders ``step_XXXXXXXX`` of a local disk or a shared file system; see :class:`CheckpointStorage`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, step: int) -> Path:
        return self._root / step_name(step)

    def steps(self) -> list[int]:
        return sorted(step_of(p.parent.name) for p in self._root.glob(f"{STEP}*/{COMPLETE}"))

    def metrics(self, step: int) -> Mapping[str, float]:
        try:
            return _metrics((self.where(step) / META).read_bytes())
        except OSError as error:
            raise RunError(f"{self.where(step) / META}: {error.strerror}") from error

    def remove(self, step: int) -> None:
        path = self.where(step)
        with _unread(path) as free:
            if free:
                # Renamed first, so that a half-removed folder is not taken for a checkpoint.
                retired = self._root / f"{RETIRED}{path.name}"
                os.rename(path, retired)
                shutil.rmtree(retired)

    def publish(self, folder: Path, step: int, names: Sequence[str], sums: FileSums) -> None:
        """The files lie on the same file system already."""

    def complete(self, folder: Path, step: int, sums: FileSums) -> None:
        final = self.where(step)
        aside = self._root / f"{REPLACED}{final.name}"
        make_durable(folder)
        if final.exists():
            os.rename(final, aside)
        try:
            os.rename(folder, final)
        except OSError:
            if aside.exists():
                os.rename(aside, final)
            raise
        make_durable(self._root)
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self, step: int) -> None:
        """Nothing is published before it is complete."""

    def clean(self) -> None:
        for aside in self._root.glob(f"{REPLACED}*"):
            final = self._root / aside.name.removeprefix(REPLACED)
            if final.exists():
                shutil.rmtree(aside)
            else:
                os.rename(aside, final)


class ObjectStorage:
    """Objects ``step_XXXXXXXX/<file>`` below a URL; ``COMPLETE`` is put last. See :class:`CheckpointStorage`."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def where(self, step: int) -> str:
        return f"{self._objects.url.rstrip('/')}/{step_name(step)}"

    def steps(self) -> list[int]:
        return sorted(s for s, names in self._found().items() if COMPLETE in names)

    def metrics(self, step: int) -> Mapping[str, float]:
        key = f"{step_name(step)}/{META}"
        size = self._found()[step][META]
        return _metrics(self._objects.read(key, 0, size))

    def remove(self, step: int) -> None:
        names = self._found().get(step, {})
        for name in sorted(names, key=lambda n: n != COMPLETE):
            self._objects.delete(f"{step_name(step)}/{name}")

    def publish(self, folder: Path, step: int, names: Sequence[str], sums: FileSums) -> None:
        for name in names:
            self._objects.put_file(f"{step_name(step)}/{name}", folder / name, sums[name][1])

    def complete(self, folder: Path, step: int, sums: FileSums) -> None:
        self.publish(folder, step, [META, COMPLETE], sums)
        shutil.rmtree(folder, ignore_errors=True)

    def where_export(self, name: str) -> str:
        return f"{self._objects.url.rstrip('/')}/exports/{name}"

    def put_export(self, folder: Path) -> None:
        """Move an export's folder to :meth:`where_export`, its settings last."""
        for file in sorted(folder.iterdir(), key=lambda f: f.suffix == ".json"):
            self._objects.put_file(f"exports/{folder.name}/{file.name}", file, crc32c_of(file))
        shutil.rmtree(folder, ignore_errors=True)

    def discard(self, step: int) -> None:
        self.remove(step)

    def clean(self) -> None:
        for step, names in self._found().items():
            if COMPLETE not in names:
                self.remove(step)
        self._objects.discard_uploads()

    def _found(self) -> dict[int, dict[str, int]]:
        """Files and sizes by step."""
        found: dict[int, dict[str, int]] = {}
        for key, size in self._objects.sizes().items():
            folder, _, name = key.partition("/")
            if folder.startswith(STEP) and folder.removeprefix(STEP).isdigit() and name:
                found.setdefault(step_of(folder), {})[name] = size
        return found


class ObjectFetcher:
    """Brings files of a checkpoint in an object store to a scratch folder, each once, checked on the way.

    Ranks that share the scratch folder take turns by a lock on each file.
    """

    def __init__(self, objects: ObjectStore, name: str, scratch: Path) -> None:
        self._objects, self._name, self.folder = objects, name, scratch
        self._sums: FileSums | None = None
        prefix = f"{name}/"
        self._sizes = {k.removeprefix(prefix): n for k, n in objects.sizes().items() if k.startswith(prefix)}
        if COMPLETE not in self._sizes:
            raise ConfigError(f"{objects.url}/{name} is not a complete checkpoint (no {COMPLETE} object)")

    def open(self, names: Sequence[str]) -> None:
        """Fetch ``COMPLETE`` and ``names``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fetch(COMPLETE)
        self._sums = read_sums(self.folder)
        for name in names:
            self.fetch(name)

    def fetch(self, name: str) -> None:
        """Raises :class:`ConfigError` for a file that is missing or damaged, naming the object."""
        file = self.folder / name
        size, crc = (self._sizes[name], None) if self._sums is None else self._sums.get(name, (-1, None))
        if size < 0 or self._sizes.get(name) != size:
            raise Damaged(
                f"{self._objects.url}/{self._name}/{name} is missing, or of another size than {COMPLETE} says"
            )
        try:
            with (self.folder / f"{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.exists():
                    self._download(name, size, crc)
        except OSError as error:
            raise RunError(f"{error.filename or file}: {error.strerror}") from error

    def _download(self, name: str, size: int, crc: int | None) -> None:
        partial = self.folder / f"{name}.partial"
        with partial.open("wb") as out:
            for start in range(0, size, _PIECE_BYTES):
                length = min(_PIECE_BYTES, size - start)
                out.write(self._objects.read(f"{self._name}/{name}", start, length))
        if crc is not None:
            try:
                check_file(partial, size, crc)
            except ConfigError as error:
                raise type(error)(f"{self._objects.url}/{self._name}/{name}: {error}") from error
        os.rename(partial, self.folder / name)


def step_name(step: int) -> str:
    return f"{STEP}{step:08d}"


def step_of(name: str) -> int:
    return int(name.removeprefix(STEP))


def _metrics(text: bytes) -> Mapping[str, float]:
    try:
        found = json.loads(text).get("metrics", {})
        return {str(k): float(v) for k, v in found.items()}
    except (ValueError, AttributeError, TypeError):
        # Damaged: it is found and named when the checkpoint is read.
        return {}


@contextmanager
def _unread(path: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint; within the context nobody begins to."""
    with (path / COMPLETE).open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                yield False
                return
            if error.errno not in NO_LOCKS:
                raise
        yield True


def remove_scratch(root: Path) -> None:
    """Remove the folders of interrupted saves, reads and removals below ``root``."""
    for leftover in [path for prefix in (SAVING, READING, RETIRED) for path in root.glob(f"{prefix}*")]:
        with suppress(FileNotFoundError):
            shutil.rmtree(leftover)

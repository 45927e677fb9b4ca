"""A folder of pictures that several processes fill and that a broken-off command goes on with.

Each picture is a PNG, and a JSON line that says how it was drawn, written in this order: a picture with its line
is finished. While drawing, each process appends to a file of lines of its own; in the end, or when the next
command begins, they become one, ``pictures.jsonl``.
"""

import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.storage.files import atomic_write
from deco_scale.checkpoint.format import NO_LOCKS
from deco_scale.errors import ConfigError, RunError

LINES = "pictures.jsonl"
_PARTS = "pictures.part*.jsonl"
_LOCK = ".pictures.lock"

Record = dict[str, Any]
"""What a JSON line says of a picture: ``file``, its job, and the settings that all pictures of a folder share."""


class PictureFolder:
    """One process's view of the folder; :meth:`open` and :meth:`finish` are for one process, before and after."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.path = folder
        self._lines = folder / f"pictures.part{rank:05d}.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, and keep other commands out of it, where the file system has locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise ConfigError(f"--out {self.path}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out {self.path}: another command is drawing there") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise ConfigError(f"--out {self.path}: {error.strerror}") from error
            yield

    def open(self, wanted: Sequence[Record], settings: Mapping[str, Any]) -> set[str]:
        """Files of the wanted pictures that are finished; gathers the lines of a command that was broken off.

        Raises :class:`ConfigError` saying what differs where the folder has pictures of other ``settings``, or
        another picture under the name of a wanted one, and for lines that are damaged.
        """
        by_file = {record["file"]: _as_read(record) for record in wanted}
        shared = _as_read(settings)
        found = self._read()
        for file, record in found.items():
            differences = _differences(record, by_file.get(file, shared))
            if differences:
                raise ConfigError(
                    f"--out {self.path} has {file} with {'; '.join(differences)}: choose another --out, or remove "
                    "that folder"
                )
        self._write(found, order=by_file)
        return found.keys() & by_file.keys()

    def save(self, record: Record, pixels: Any) -> None:
        """Write a picture, uint8 (Y, X, 3), under its name ``record["file"]``, then its line."""
        target = self.path / record["file"]
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format="PNG")
        try:
            atomic_write(target, encoded.getvalue())
            with self._lines.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"{target} could not be written: {error.strerror}") from error

    def finish(self, wanted: Sequence[Record]) -> None:
        """Make one file of all lines, the wanted pictures first and in their order."""
        self._write(self._read(), order={record["file"]: record for record in wanted})

    def _read(self) -> dict[str, Record]:
        """Records by file, of those pictures that are there."""
        found: dict[str, Record] = {}
        for path in [self.path / LINES, *sorted(self.path.glob(_PARTS))]:
            try:
                lines = path.read_bytes().split(b"\n")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            # A process that was killed may have left half a line, which has no end.
            for number, line in enumerate(lines[:-1], start=1):
                record = _record(line)
                if record is None:
                    raise ConfigError(f"{path}, line {number}: no picture's line; remove it, or the folder")
                if (self.path / record["file"]).is_file():
                    found[record["file"]] = record
        return found

    def _write(self, found: Mapping[str, Record], order: Mapping[str, object]) -> None:
        names = [*(name for name in order if name in found), *sorted(name for name in found if name not in order)]
        text = "".join(json.dumps(found[name]) + "\n" for name in names)
        try:
            parts = sorted(self.path.glob(_PARTS))
            atomic_write(self.path / LINES, text.encode())
            for path in parts:
                path.unlink()
        except OSError as error:
            raise RunError(f"{self.path / LINES} could not be written: {error.strerror}") from error


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    file = record.get("file") if isinstance(record, dict) else None
    return record if isinstance(file, str) and Path(file).name == file else None


def _as_read(record: Mapping[str, Any]) -> Record:
    """A record as it comes back from its line."""
    return json.loads(json.dumps(dict(record)))  # type: ignore[no-any-return]


def _differences(found: Record, wanted: Record) -> list[str]:
    """What is not as wanted, one message each; settings within settings are named one by one."""
    differences = []
    for key, value in wanted.items():
        there = found.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            differences += _differences(there, value)
        elif there != value:
            differences.append(f"{key}={_told(there)}, now {_told(value)}")
    return differences


def _told(value: Any) -> str:
    """A value for a message, not at any length."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

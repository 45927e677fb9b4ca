"""Folders of generated images: atomic files, the settings they were made with, and resuming.

``deco sample`` writes each image as a PNG, then a JSON line that says how it was generated; an image is complete
once it has both. While sampling, each process appends to its own file of lines; at the end, or at the start of the
next command, they are merged into :data:`LINES`.
"""

import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.storage.files import atomic_write
from deco_scale.checkpoint.format import NO_LOCKS
from deco_scale.errors import ConfigError, RunError

SETTINGS = "settings.json"
LINES = "pictures.jsonl"
_PARTS = LINES.replace(".jsonl", ".part*.jsonl")
_LOCK = f".{LINES.replace('jsonl', 'lock')}"

Record = dict[str, Any]
"""One JSON line: ``file``, the request, and the settings that all images of a folder share."""


def write_file(path: Path, data: bytes, *, scratch: Path | None = None, shared: bool = True) -> None:
    """:func:`~data_pipeline.storage.files.atomic_write` that raises :class:`RunError` if the disk refuses."""
    try:
        atomic_write(path, data, scratch=scratch, shared=shared)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror}") from error


def encode_png(pixels_YXC: Any) -> bytes:
    """An uint8 image (Y, X, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_YXC).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_npy(array: Any) -> bytes:
    """An array as ``.npy``."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings.json``, or check that the folder has the same settings.

    Raises :class:`ConfigError` naming each difference, so that one folder never mixes two models or samplers.
    """
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return write_file(path, json.dumps(settings, indent=1).encode())
        actual = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); choose another --out") from error
    if not isinstance(actual, dict):
        raise ConfigError(f"{path} is not a JSON object; choose another --out")
    # Both ways: a setting that only one of the two has is a difference as well.
    differences = _differences(actual, dict.fromkeys(actual) | _as_read(settings))
    if differences:
        raise ConfigError(f"--out {folder} has other settings: {'; '.join(differences)}: choose another --out")


class ImageFolder:
    """One process's view of a folder; only one process calls :meth:`open` (at the start) and :meth:`finish`."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.path = folder
        self._lines = folder / _PARTS.replace("*", f"{rank:05d}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock out other commands, if the file system supports locks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {self.path}: another command is writing there") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"--out {self.path}: {error.strerror}") from error
        with lock:
            yield

    def open(self, expected: Sequence[Record], settings: Mapping[str, Any]) -> set[str]:
        """Files among the expected ones that are complete; merges the lines of an interrupted command.

        Raises :class:`ConfigError` for damaged lines, and naming the differences if the folder has images of other
        ``settings`` or another image under the name of an expected one.
        """
        by_file = {record["file"]: _as_read(record) for record in expected}
        shared = _as_read(settings)
        records = self._read()
        for file, record in records.items():
            differences = _differences(record, by_file.get(file, shared))
            if differences:
                raise ConfigError(
                    f"--out {self.path} has {file} with {'; '.join(differences)}: choose another --out, or remove "
                    "that folder"
                )
        self._write(records, order=by_file)
        return records.keys() & by_file.keys()

    def save(self, record: Record, pixels_YXC: Any) -> None:
        """Write an uint8 image (Y, X, 3) to ``record["file"]``, then its line; raises :class:`RunError`."""
        write_file(self.path / record["file"], encode_png(pixels_YXC), shared=False)
        try:
            with self._lines.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"{self._lines} could not be written: {error.strerror}") from error

    def finish(self, expected: Sequence[Record]) -> None:
        """Merge all lines into one file, the expected images first and in their order."""
        self._write(self._read(), order={record["file"]: record for record in expected})

    def _read(self) -> dict[str, Record]:
        """Records of the images that exist, by file."""
        records: dict[str, Record] = {}
        for path in [*self.path.glob(LINES), *sorted(self.path.glob(_PARTS))]:
            try:
                lines = path.read_bytes().split(b"\n")
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            # A process that was killed may have left an incomplete last line.
            for number, line in enumerate(lines[:-1], start=1):
                record = _parse(line)
                if record is None:
                    raise ConfigError(f"{path}, line {number}: not an image's record; remove it, or the folder")
                if (self.path / record["file"]).is_file():
                    records[record["file"]] = record
        return records

    def _write(self, records: Mapping[str, Record], order: Mapping[str, object]) -> None:
        names = [*(n for n in order if n in records), *sorted(n for n in records if n not in order)]
        lines = "".join(json.dumps(records[name]) + "\n" for name in names)
        write_file(self.path / LINES, lines.encode(), shared=False)
        for path in self.path.glob(_PARTS):
            path.unlink()


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    file = record.get("file") if isinstance(record, dict) else None
    return record if isinstance(file, str) and Path(file).name == file else None


def _as_read(record: Mapping[str, Any]) -> Record:
    """A record as JSON returns it."""
    return json.loads(json.dumps(dict(record)))  # type: ignore[no-any-return]


def _differences(actual: Record, expected: Record) -> list[str]:
    """One message for each expected value that differs; nested settings are compared one by one."""
    differences = []
    for key, value in expected.items():
        other = actual.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            differences += _differences(other, value)
        elif other != value:
            differences.append(f"{key}={_shortened(other)}, now {_shortened(value)}")
    return differences


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

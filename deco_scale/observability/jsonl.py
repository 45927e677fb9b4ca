"""Line files of a run: appending through a full disk, and reading a file that another process still writes."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 2**22  # lines kept in memory while the disk is full; beyond it the oldest are lost
_MAX_LINE = 16 * 2**20


class JsonlWriter:
    """Appends lines to ``path``; lines that a full disk refuses are kept and written with a later one.

    A warning is logged when writing starts to fail. Raises ``OSError`` only where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._pending = b""
        self._failing = False

    def write(self, line: str) -> None:
        """Append one line, given with its newline, without buffering."""
        with self._lock:
            self._pending += line.encode(errors="replace")
            error = self._flush()
            if len(self._pending) > MAX_PENDING_BYTES:
                # Drop whole lines; the newline ends one that the disk took in part.
                self._pending = b"\n" + self._pending[-MAX_PENDING_BYTES // 2 :].partition(b"\n")[2]
            failed_before, self._failing = self._failing, error is not None
        if error is not None and not failed_before:
            logger.warning("%s: %s; keeping its lines in memory until the disk takes them", self._path, error)

    def close(self) -> None:
        """Try once more to write what is pending, and warn of what is lost."""
        error = self._flush()
        if error is not None:
            logger.warning("%s: %s; %d bytes are lost", self._path, error, len(self._pending))
        os.close(self._file)

    def _flush(self) -> str | None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            return error.strerror or type(error).__name__
        return None


class JsonlTailer:
    """Reads the objects of a growing JSON lines file: only new bytes, only complete lines.

    ``parse`` makes an item of each object, or None to leave it out. ``items`` has those of the file as it is, in
    order; ``bad`` counts lines that are no JSON object, longer than 16 MiB, or refused by ``parse``
    (``ValueError``). A file that is replaced or truncated is read anew.
    """

    def __init__(self, path: Path, parse: Callable[[dict[str, Any]], Any] = dict) -> None:
        self.path, self.items, self.bad = path, list[Any](), 0
        self._parse, self._offset, self._identity, self._partial = parse, 0, (0, 0), b""

    def read(self) -> list[Any]:
        """Items of the lines completed since the last call; none where there is no file.

        Raises ``OSError`` where the file exists and cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._offset, self._partial, self.bad, self._identity = 0, b"", 0, identity
                self.items.clear()
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._partial = (self._partial + new).split(b"\n")
        if len(self._partial) > _MAX_LINE:
            self._partial = b"?"  # with whatever follows it is no JSON
        known = len(self.items)
        for line in filter(bytes.strip, lines):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
                if (item := self._parse(entry)) is not None:
                    self.items.append(item)
            except (ValueError, RecursionError):
                self.bad += 1
        return self.items[known:]

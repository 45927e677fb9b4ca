"""Line files of a run: appending through a full disk, and reading a file that another process still writes."""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 2**22
"""Lines kept in memory while the disk is full; beyond it the oldest are lost."""
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

    ``bad`` counts lines that are no JSON object or longer than 16 MiB. ``replaced``: the last read found the file
    replaced or truncated, and objects read before are no longer in it.
    """

    def __init__(self, path: Path) -> None:
        self.bad, self.replaced = 0, False
        self._path, self._offset, self._identity, self._partial = path, 0, (0, 0), b""

    def read(self) -> list[dict[str, Any]]:
        """Objects of the lines completed since the last call; none where there is no file.

        Raises ``OSError`` where the file exists and cannot be read.
        """
        self.replaced = False
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._offset and (identity != self._identity or status.st_size < self._offset):
                self._offset, self._partial, self.replaced = 0, b"", True
            self._identity = identity
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._partial = (self._partial + new).split(b"\n")
        if len(self._partial) > _MAX_LINE:
            self._partial = b"?"  # with whatever follows it is no JSON
        entries: list[dict[str, Any]] = []
        for line in filter(bytes.strip, lines):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                self.bad += 1
        return entries

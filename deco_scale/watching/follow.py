"""Reading files of JSON lines that other processes still write to: only new bytes, only whole lines."""

import json
import os
from pathlib import Path
from typing import Any

_MAX_LINE = 16 * 2**20


class JsonLines:
    """The objects of a growing file of JSON lines.

    ``bad`` counts lines that were no JSON object, or longer than 16 MiB. ``generation`` goes up each time that the
    file was replaced or cut: what was read before is then no longer in it.
    """

    def __init__(self, path: Path) -> None:
        self.bad, self.generation = 0, 0
        self._path, self._offset, self._identity, self._rest = path, 0, (0, 0), b""

    def read(self) -> list[dict[str, Any]]:
        """Objects of the lines that were completed since the last call; none where there is no file.

        Raises ``OSError`` where the file is there and cannot be read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._offset and (identity != self._identity or status.st_size < self._offset):
                self._offset, self._rest = 0, b""
                self.generation += 1
            self._identity = identity
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b"?"  # with whatever follows it is no JSON
        return [entry for line in whole if (entry := self._object(line)) is not None]

    def _object(self, line: bytes) -> dict[str, Any] | None:
        if not line.strip():
            return None
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            return entry
        self.bad += 1
        return None

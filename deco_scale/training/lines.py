"""Files that grow line by line, and that a full disk does not stop."""

import os
from collections.abc import Callable
from pathlib import Path

KEPT_BYTES = 2**22
"""So much is kept in memory while the disk takes nothing; beyond it the oldest lines are lost."""


class Lines:
    """Appends to ``path``; what the disk does not take is kept and written with a later line.

    ``warn`` is told when that begins. Raises ``OSError`` only where the file cannot be opened.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""
        self._failing = False

    def write(self, line: str) -> None:
        """One line, with its newline; it goes to the system at once."""
        self._waiting += line.encode(errors="replace")
        problem = self._flush()
        if problem is None:
            self._failing = False
            return
        if len(self._waiting) > KEPT_BYTES:
            # The rest of a line that was cut off goes with it; the next one is whole.
            self._waiting = b"\n" + self._waiting[-KEPT_BYTES // 2 :].partition(b"\n")[2]
        if not self._failing:
            self._failing = True
            self._warn(f"WARNING: {self._path}: {problem}; its lines are kept in memory until the disk takes them")

    def close(self) -> None:
        """Try once more, and say what is lost."""
        problem = self._flush()
        if problem is not None:
            self._warn(f"WARNING: {self._path}: {problem}; {len(self._waiting)} bytes are lost")
        os.close(self._file)

    def _flush(self) -> str | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            return error.strerror or type(error).__name__
        return None

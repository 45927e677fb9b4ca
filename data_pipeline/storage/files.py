"""Files that appear whole or not at all, and that survive a crash of the machine."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

SAVING = ".saving_"
"""Prefix of the hidden folder in which a folder is written before it takes its name."""
PARTIAL = ".partial"
"""Suffix of a hidden file that is being written."""


def make_durable(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file in place and wait until it is on the disk."""
    path.write_bytes(data)
    make_durable(path)


@contextlib.contextmanager
def atomic_path(
    path: Path, *, scratch: Path | None = None, durable: bool = True, shared: bool = False
) -> Iterator[Path]:
    """Yield a hidden path to write to; at the end it is renamed to ``path``, after an error it is removed.

    Folders are created. ``scratch`` is a folder on the same file system for the hidden file (default: beside
    ``path``). ``shared`` gives the hidden file a name of its own for each thread, where several may write
    ``path`` at once. ``durable`` waits for the disk before the rename. Raises ``OSError``.
    """
    writer = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    partial = (scratch or path.parent) / f".{path.name}{writer}{PARTIAL}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if durable:
            make_durable(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def atomic_write(
    path: Path, data: bytes, *, scratch: Path | None = None, durable: bool = True, shared: bool = False
) -> None:
    """Create or replace a file in one move; see :func:`atomic_path`. Raises ``OSError``."""
    with atomic_path(path, scratch=scratch, durable=durable, shared=shared) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path``; at the end it takes the name, after an error it is removed.

    What is written in it must be durable; the folder itself is made so here. Raises ``OSError``.
    """
    partial = path.parent / f"{SAVING}{path.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        make_durable(partial)
        os.rename(partial, path)
        make_durable(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

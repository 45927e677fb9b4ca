"""Files of a snapshot, written by all ranks, with checksums taken on the way to the disk."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from deco_scale.errors import RunError
from deco_scale.training.background import Team, first_failure
from deco_scale.training.checkpoint_format import (
    FLUSH_BYTES,
    WRITE_BYTES,
    FileSums,
    start_flush,
    without_record_sums,
)
from deco_scale.training.staging import Snapshot, StagedPlanner


class SummedFile(io.RawIOBase):
    """A new file that is only appended to, and knows size and CRC32C of what was written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._file = path, path.open("wb")
        self.size, self._checksum, self._flushed = 0, google_crc32c.Checksum(), 0
        self.problem: OSError | None = None

    @property
    def crc(self) -> int:
        return int.from_bytes(self._checksum.digest(), "big")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``; the first error is kept, because torch.save hides it behind its own."""
        whole = memoryview(data).cast("B")
        try:
            for start in range(0, len(whole), WRITE_BYTES):
                # The checksum takes bytes only; a piece at a time bounds the copy, and the time that the
                # interpreter is held.
                piece = bytes(whole[start : start + WRITE_BYTES])
                self._file.write(piece)
                self._checksum.update(piece)
                self.size += len(piece)
                if self.size - self._flushed >= FLUSH_BYTES:
                    self._file.flush()
                    start_flush(self._file.fileno(), self._flushed, self.size - self._flushed)
                    self._flushed = self.size
        except OSError as error:
            self.problem = self.problem or OSError(error.errno, error.strerror, str(self._path))
            raise
        return len(whole)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        # DCP asks for it to make the file durable, and does not flush its index before.
        self._file.flush()
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Close the file even where its last bytes do not reach the disk."""
        try:
            self._file.close()
        finally:
            super().close()


class SummedFolder(FileSystem):
    """DCP's files, with :attr:`sums` of those that this rank wrote and the first :attr:`problem` it met."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: FileSums = {}
        self.problem: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        assert mode == "wb", mode
        file: SummedFile | None = None
        try:
            file = SummedFile(Path(path))
            yield file
            file.close()
        except OSError as error:
            self.problem = self.problem or (file.problem if file else None) or error
            raise
        except BaseException:
            self.problem = self.problem or (file.problem if file else None)
            raise
        finally:
            if file is not None and not file.closed:
                with suppress(OSError):
                    file.close()
        self.sums[Path(path).name] = file.size, file.crc

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


def write_snapshot(snapshot: Snapshot, folder: Path, team: Team) -> FileSums:
    """Write and make durable all files of DCP, all ranks together; returns those of this rank.

    Raises :class:`RunError` on the ranks that failed; all others return as if nothing had happened, so the caller
    lets the ranks agree.
    """
    files = SummedFolder()
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files
    try:
        with without_record_sums():
            dcp.save(
                # The planner has the tensors already.
                {},
                storage_writer=writer,
                planner=StagedPlanner(snapshot),
                process_group=team.group,
            )
    except CheckpointException as error:
        if files.problem is not None:
            raise RunError(f"{files.problem.filename or folder}: {files.problem.strerror}") from error
        rank, failure = first_failure(error)
        if rank == team.rank:
            raise RunError(f"{folder}: {type(failure).__name__}: {failure}") from error
    return files.sums

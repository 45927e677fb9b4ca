"""Writing the files of a snapshot on all ranks, with checksums taken on the way to the disk."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from deco_scale.checkpoint.format import without_record_checksums
from deco_scale.checkpoint.integrity import ChecksummedFile, FileChecksums
from deco_scale.checkpoint.staging import Snapshot, StagedPlanner
from deco_scale.errors import RunError


class ChecksumFileSystem(FileSystem):
    """DCP's files, with :attr:`checksums` of those that this rank wrote and the last :attr:`file`."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: FileChecksums = {}
        self.file: ChecksummedFile | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        with ChecksummedFile(Path(path)) as self.file:
            yield self.file
        self.checksums[Path(path).name] = self.file.checksum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


def write_snapshot(snapshot: Snapshot, folder: Path, group: dist.ProcessGroup | None) -> FileChecksums:
    """Write all files of DCP durably, all ranks together; returns the checksums of this rank's files.

    Raises :class:`RunError` only on the ranks that failed: call it within ``raise_together``.
    """
    files = ChecksumFileSystem()
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files
    try:
        with without_record_checksums():
            # The planner has the tensors already.
            dcp.save({}, storage_writer=writer, planner=StagedPlanner(snapshot), process_group=group)
    except CheckpointException as error:
        failure = error.failures.get(dist.get_rank(), (None,))[0]
        problem = files.file.problem if files.file is not None and files.file.problem else failure
        if isinstance(problem, OSError):
            raise RunError(f"{problem.filename or folder}: {problem.strerror}") from error
        if problem is not None:
            raise RunError(f"{folder}: {type(problem).__name__}: {problem}") from error
    return files.checksums

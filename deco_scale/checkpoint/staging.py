"""A rank's part of a save: the copy of its shards in host memory, and what is done with it beside the training.

The copy is the only part that a training step waits for; it is then written by DCP, with checksums, and summed.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor, Replicate

from deco_scale.checkpoint.format import without_record_checksums
from deco_scale.checkpoint.integrity import MODEL_PREFIX, ChecksummedFile, FileChecksums, digest_of_sums, word_sum
from deco_scale.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """This rank's parts of the state at one step, valid until the next one is staged.

    ``tensors`` are plain CPU tensors by canonical name, ``plan`` gives the position of each in its full tensor,
    and ``counted`` names those that this rank, of all that have a copy, counts in the digest.
    """

    tensors: dict[str, Tensor]
    plan: SavePlan
    counted: frozenset[str]


class Stager:
    """Host buffers (pinned where there is a GPU) that are reused from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._plans: list[tuple[Any, SavePlan]] = []

    def stage(self, state: Mapping[str, Tensor], *, prefix: str = "") -> Snapshot:
        """Copy this rank's part of each tensor whose name starts with ``prefix``; waits for the device's copies.

        Nothing is gathered. A plan is reused if names, shapes and placements are those of one of the last two.
        """
        selected = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        tensors: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in selected.items():
            local = local_part(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=local.is_cuda)
            tensors[name] = buffer
            if local.is_cuda:
                devices.add(local.device)
        layout = [(name, _layout(tensor)) for name, tensor in selected.items()]
        plan = next((plan for known, plan in self._plans if known == layout), None)
        if plan is None:
            plan = create_default_local_save_plan(selected, dist.get_rank() == 0)
            self._plans = [*self._plans[-1:], (layout, plan)]
        counted = frozenset(name for name, tensor in selected.items() if is_counted(tensor))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(tensors=tensors, plan=plan, counted=counted)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_counted(tensor: Tensor) -> bool:
    """Whether this rank's part of a tensor is counted; of ranks with the same part exactly one is."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    coordinate = list(tensor.device_mesh.get_coordinate() or ())
    copies = [c for c, p in zip(coordinate, tensor.placements, strict=True) if p == Replicate()]
    # HSDP's placements name the shard axis only, its mesh has both: count the first replica.
    return not any(copies)


def _layout(tensor: Tensor) -> Any:
    if isinstance(tensor, DTensor):
        return tuple(tensor.shape), tensor.placements, tensor.device_mesh
    return tuple(tensor.shape)


class StagedPlanner(DefaultSavePlanner):
    """Saves a snapshot by the plan that was made with it."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        self.plan = self._snapshot.plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._snapshot.tensors[index.fqn]


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


def parameter_digest(snapshot: Snapshot, group: dist.ProcessGroup | None = None) -> str:
    """Digest of the weights of all ranks of ``group``: the sum of 32-bit words per tensor. All ranks together."""
    names = sorted(name for name in snapshot.tensors if name.startswith(MODEL_PREFIX))
    sums = torch.tensor(
        [word_sum(snapshot.tensors[n]) if n in snapshot.counted else 0 for n in names], dtype=torch.int64
    )
    dist.all_reduce(sums, group=group)
    return digest_of_sums(dict(zip(names, sums.tolist(), strict=True)))

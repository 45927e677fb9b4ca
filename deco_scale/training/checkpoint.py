"""The canonical checkpoint: one folder, the same for every engine and layout.

``step_XXXXXXXX/`` holds PyTorch DCP files with the single-device names and shapes (fp32), ``meta.json``
(where the run stands, its configuration, a digest of the weights), and ``COMPLETE`` (size and CRC32C of each
file), which is written last. A folder is made under a temporary name and renamed; one without ``COMPLETE``
is never read.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from deco_scale.errors import ConfigError, RunError
from deco_scale.training.engine import Engine
from deco_scale.training.processes import agreed
from deco_scale.training.settings import CheckpointConfig

SCHEMA_VERSION = 2
META, COMPLETE, METADATA = "meta.json", "COMPLETE", ".metadata"
_STEP, _TEMPORARY = "step_", ".saving_"
_READ_BYTES = 16 * 2**20
_LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMeta:
    """Where the run stood; ``data_state`` is what the loader says of its place (samples seen, digests, seed)."""

    step: int
    stage: str
    samples: int
    seed: int
    optimizer_steps: int
    data_state: dict[str, Any]
    parameter_digest: str
    config: dict[str, Any]
    schema_version: int = SCHEMA_VERSION


class Checkpoints:
    """Saves to and resumes from the ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self._folder, self._cfg = folder, cfg

    def prepare(self) -> None:
        """Make the folder and clear what an interrupted save left behind; rank 0 only."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise ConfigError(f"cannot write to {self._folder}: {error.strerror}") from error

    def due(self, step: int) -> bool:
        return step % self._cfg.every == 0

    def path(self, step: int) -> Path:
        return self._folder / f"{_STEP}{step:08d}"

    def save(self, engine: Engine, meta: CheckpointMeta) -> Path:
        """Save on all ranks together; raises :class:`RunError` and leaves nothing half-written."""
        final = self.path(meta.step)
        temporary = self._folder / f"{_TEMPORARY}{final.name}"
        state = engine.state()
        meta = dataclasses.replace(
            meta,
            parameter_digest=parameter_digest(state),
            optimizer_steps=engine.optimizer_steps,
        )
        agreed(lambda: self._start(temporary))
        try:
            writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
            dcp.save(state, storage_writer=writer)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"checkpoint at step {meta.step} could not be written: {first}") from error
        sums = self._checksums(temporary)
        agreed(lambda: self._finish(temporary, final, meta, sums))
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        complete = sorted(p.parent for p in self._folder.glob(f"{_STEP}*/{COMPLETE}"))
        return complete[-1] if complete else None

    def resolve(self, resume: str) -> Path | None:
        """Folder for ``auto`` (newest complete), ``none``, or a path that must be complete."""
        if resume == "none":
            return None
        if resume == "auto":
            return self.latest()
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(f"--resume {resume}: no such checkpoint folder")
        if not (path / COMPLETE).is_file():
            raise ConfigError(f"--resume {resume}: not a complete checkpoint (no {COMPLETE} file)")
        return path

    def load(self, engine: Engine, path: Path) -> CheckpointMeta:
        """Check and load on all ranks together; raises :class:`ConfigError` for one that does not fit."""
        meta = agreed(lambda: read_meta(path))
        agreed(lambda: verify(path, rank=dist.get_rank(), world=dist.get_world_size()))
        state = engine.state()
        agreed(lambda: check_fit(path, {n: tuple(t.shape) for n, t in state.items()}))
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
        engine.load(state, meta.optimizer_steps)
        return meta

    def _start(self, temporary: Path) -> None:
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                raise RunError(f"cannot write {temporary}: {error.strerror}") from error

    def _checksums(self, folder: Path) -> dict[str, tuple[int, int]]:
        """Size and CRC32C of all files; the ranks share the reading."""
        dist.barrier()
        files = sorted(p for p in folder.iterdir() if p.is_file())
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = {p.name: (p.stat().st_size, _crc32c(p)) for p in files[rank::world]}
        parts: list[dict[str, tuple[int, int]]] = [{} for _ in range(world)]
        dist.all_gather_object(parts, mine)
        return {name: entry for part in parts for name, entry in part.items()}

    def _finish(
        self, temporary: Path, final: Path, meta: CheckpointMeta, sums: dict[str, tuple[int, int]]
    ) -> None:
        if dist.get_rank() != 0:
            return
        try:
            text = json.dumps(dataclasses.asdict(meta), indent=1).encode()
            _write_durably(temporary / META, text)
            sums[META] = (len(text), google_crc32c.value(text))
            _write_durably(temporary / COMPLETE, json.dumps(sums, indent=1).encode())
            if final.exists():
                shutil.rmtree(final)
            os.rename(temporary, final)
            _sync_folder(self._folder)
            self._retire()
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"cannot finish {final}: {error.strerror}") from error

    def _retire(self) -> None:
        complete = sorted(p.parent for p in self._folder.glob(f"{_STEP}*/{COMPLETE}"))
        for path in complete[: -self._cfg.keep_last]:
            step = int(path.name.removeprefix(_STEP))
            if self._cfg.keep_every == 0 or step % self._cfg.keep_every:
                # Without its mark first, so that a half-removed folder is not taken for a checkpoint.
                (path / COMPLETE).unlink()
                shutil.rmtree(path)


def read_meta(path: Path) -> CheckpointMeta:
    """``meta.json`` of a complete checkpoint; raises :class:`ConfigError` naming the file."""
    if not (path / COMPLETE).is_file():
        raise ConfigError(f"{path} is not a complete checkpoint (no {COMPLETE} file)")
    try:
        fields = json.loads((path / META).read_text())
        if fields.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{path / META}: schema version {fields.get('schema_version')}, "
                f"this program reads {SCHEMA_VERSION}"
            )
        return CheckpointMeta(**fields)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path / META} is damaged: {error}") from error


def verify(path: Path, *, rank: int = 0, world: int = 1) -> None:
    """Check size and CRC32C of this rank's share of the files; names the first one that differs."""
    try:
        sums = json.loads((path / COMPLETE).read_text())
        expected = sorted((str(n), int(e[0]), int(e[1])) for n, e in sums.items())
    except (OSError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ConfigError(f"{path / COMPLETE} is damaged: {error}") from error
    for name, size, crc in expected[rank::world]:
        file = path / name
        if "/" in name or not file.is_file():
            raise ConfigError(f"{file} is missing")
        if file.stat().st_size != size or _crc32c(file) != crc:
            raise ConfigError(f"{file} is damaged: size or checksum differ from {COMPLETE}")


def check_fit(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with a checkpoint's; raises :class:`ConfigError` naming what differs."""
    found = stored_shapes(path)
    problems = [f"missing {n}" for n in sorted(set(wanted) - set(found))]
    problems += [f"unexpected {n}" for n in sorted(set(found) - set(wanted))]
    problems += [
        f"{n} has shape {found[n]}, the model {wanted[n]}"
        for n in sorted(set(wanted) & set(found))
        if wanted[n] != found[n]
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listed = "; ".join(problems[:_LISTED])
        raise ConfigError(f"{path} does not fit the configured model: {listed}{more}")


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint, read without running anything that its index could hold."""
    try:
        metadata = _SafeUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
        return {
            name: tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError, ValueError) as error:
        raise ConfigError(f"{path / METADATA} is damaged or not a checkpoint's: {error}") from error


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Full CPU tensors whose names start with ``prefix`` (removed), in one process, checked."""
    read_meta(path)
    verify(path)
    shapes = {n: s for n, s in stored_shapes(path).items() if n.startswith(prefix)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def parameter_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of the weights' bits that does not depend on the layout: a sum of words per tensor."""
    names = sorted(n for n in state if n.startswith("model."))
    sums = torch.stack([_word_sum(state[n]) for n in names])
    dist.all_reduce(sums)
    parts = [f"{n}:{v}" for n, v in zip(names, sums.tolist(), strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _word_sum(tensor: Tensor) -> Tensor:
    """Wrapping sum of the 32-bit words that this rank alone contributes."""
    local, counted = tensor, dist.get_rank() == 0
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        coordinate = list(tensor.device_mesh.get_coordinate() or ())
        copies = [c for c, p in zip(coordinate, tensor.placements, strict=True) if p == Replicate()]
        # HSDP's placements name the shard axis only, its mesh has both: count the first replica.
        counted = not any(copies)
    words = local.detach().float().contiguous().view(torch.int32)
    total = words.sum(dtype=torch.int64) if counted else torch.zeros((), dtype=torch.int64)
    return total.to(local.device)


class _SafeUnpickler(pickle.Unpickler):
    """Unpickles DCP's index and nothing else: classes of its metadata, sizes, dtypes, containers."""

    _ALLOWED_MODULES = ("torch.distributed.checkpoint.",)
    _ALLOWED = {
        ("torch", "Size"),
        ("torch", "dtype"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("builtins", "set"),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        known = module.startswith(self._ALLOWED_MODULES) and name[:1].isupper() | (name[:1] == "_")
        if dtype or known or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's index")


def _crc32c(path: Path) -> int:
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            checksum.update(piece)
    return int.from_bytes(checksum.digest(), "big")


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The canonical checkpoint: one format, the same for every engine and mesh, saved beside the training.

:mod:`deco_scale.checkpoint.format` describes the format. A step waits only for a copy of this rank's shards in
host memory; a thread writes them under a temporary name with their checksums, makes them durable and publishes
them. Loading checks files, names and shapes before a tensor is changed.
"""

import dataclasses
import datetime
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.storage.files import SAVING
from deco_scale.checkpoint import loader
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.export import PREFIX, export_ema
from deco_scale.checkpoint.format import CheckpointMeta, find_checkpoint, write_markers
from deco_scale.checkpoint.integrity import FileChecksums
from deco_scale.checkpoint.retention import retained
from deco_scale.checkpoint.staging import Snapshot, Stager, parameter_digest, write_snapshot
from deco_scale.checkpoint.storage import LocalStorage, ObjectStorage, remove_scratch, step_name
from deco_scale.distributed.collectives import gather_objects, raise_together, run_on_rank_zero
from deco_scale.errors import ConfigError, Damaged, RunError
from deco_scale.parallel.engines.base import Engine

logger = logging.getLogger(__name__)

_TIMEOUT = datetime.timedelta(hours=6)
"""For ranks whose disk or network is slow; a lost rank is noticed at once, by its closed connections."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: a line for the log, or the error that all ranks share, and for how long training waited.

    ``checkpoint`` is False where only the weights were exported.
    """

    step: int
    checkpoint: bool
    message: str
    error: str | None
    stall_s: float
    total_s: float


class CheckpointManager:
    """Saves, resumes and retires the checkpoints of a run, in ``folder`` or at ``cfg.url``.

    Methods that take an engine must be called by all ranks together.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self._folder, self._exports, self._cfg = folder, folder.parent / "exports", cfg
        self._local = LocalStorage(folder)
        self._remote: ObjectStorage | None = None
        self._stager = Stager()
        self._saving: Future[SaveResult] | None = None
        self._group: dist.ProcessGroup | None = None
        self._protected: set[int] = set()
        self._metrics: dict[str, float] = {}
        self._unreported_stall_s: float | None = None

    def prepare(self) -> None:
        """Create the folder and remove what interrupted saves left behind; rank 0 only, before any other use."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_scratch(self._folder)
            remove_scratch(self._exports)
            self._local.recover()
        except OSError as error:
            raise ConfigError(f"cannot write to {self._folder}: {error.strerror}") from error
        if self._cfg.url is not None:
            self._storage.recover()

    def reserve(self, engine: Engine) -> None:
        """Allocate the staging buffers now, so that the first save stalls training no longer than later ones."""
        if self._cfg.asynchronous:
            self._stager.stage(engine.state())

    def due(self, step: int) -> bool:
        return step % self._cfg.every == 0

    def export_due(self, step: int) -> bool:
        """Whether the EMA is exported at this step."""
        every = self._cfg.ema_every
        return step in self._cfg.ema_steps or (every > 0 and step % every == 0)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Record a logged step's metrics; raises :class:`ConfigError` where ``keep_best`` names none of them."""
        if self._cfg.keep_best is not None:
            name = self._cfg.keep_best.metric
            value = metrics.get(name)
            if name not in metrics or not isinstance(value, int | float | None):
                numbers = sorted(k for k, v in metrics.items() if isinstance(v, int | float))
                raise ConfigError(f"checkpoint.keep_best.metric={name!r} is not logged; possible: {numbers}")
            self._metrics = {name: float(value)} if value is not None and math.isfinite(value) else {}

    def start(
        self, engine: Engine, meta: CheckpointMeta, *, checkpoint: bool = True, export: bool = False
    ) -> SaveResult | None:
        """Start to save (the checkpoint, the EMA export, or both) and return once the state is copied.

        Without ``asynchronous`` it returns when all is done. At most one save is in flight: a previous one is
        waited for, and its result returned.
        """
        start_time = time.perf_counter()
        previous = self.finished(wait=True)
        inline = not self._cfg.asynchronous
        if self._group is None and (not inline or "gloo" not in dist.get_backend_config()):
            # The default group only where the caller waits for the save and that group can send host memory.
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        meta = dataclasses.replace(meta, optimizer_steps=engine.optimizer_steps, metrics=self._metrics)
        snapshot = self._stager.stage(engine.state(), prefix="" if checkpoint else PREFIX)
        staged_s = time.perf_counter() - start_time
        self._saving = saving = Future[SaveResult]()

        def run() -> None:
            parts, failure = [], None
            try:
                if checkpoint:
                    parts.append(f"checkpoint {self._write(snapshot, meta)}")
                if export:
                    parts.append(f"EMA export {self._export(snapshot, meta)}")
            except RunError as error:
                failure = str(error)
            except BaseException as error:
                # A bug or a lost rank: raised where the result is asked for.
                saving.set_exception(error)
                return
            total_s = time.perf_counter() - start_time
            stall_s = total_s if inline else staged_s
            message = f"{', '.join(parts)} in {total_s:.1f} s (checkpoint_stall_s {stall_s:.2f})"
            saving.set_result(SaveResult(meta.step, checkpoint, message, failure, stall_s, total_s))

        if inline:
            run()
        else:
            # A daemon thread, so that a process that ends with another error does not hang in it.
            threading.Thread(target=run, name="checkpoint", daemon=True).start()
        self._unreported_stall_s = (self._unreported_stall_s or 0.0) + time.perf_counter() - start_time
        return previous

    def finished(self, *, wait: bool = False) -> SaveResult | None:
        """The result of the save that was started last, once; None if there is none or it is still running.

        An exception of the save that is no :class:`RunError` is a bug or a lost rank, and is raised here.
        """
        saving = self._saving
        if saving is None or not (wait or saving.done()):
            return None
        # Ctrl-C ends the wait, not the save, which the next call waits for.
        futures.wait([saving])
        self._saving = None
        return saving.result()

    def take_stall(self) -> float | None:
        """Seconds for which saves have stalled training since the last call, None without a save."""
        stall_s, self._unreported_stall_s = self._unreported_stall_s, None
        return stall_s

    def complete(self) -> list[tuple[int, Path | str]]:
        """Steps and paths (folders or URLs) of all complete checkpoints, the newest first."""
        storages = [self._storage, self._local] if self._cfg.url is not None else [self._local]
        paths: list[tuple[int, Path | str]] = [(s, each.path_of(s)) for each in storages for s in each.steps()]
        # Of the same step the one at the URL: the sort is stable.
        return sorted(paths, key=lambda entry: entry[0], reverse=True)

    def resolve(self, resume: str) -> Path | str | None:
        """The checkpoint for ``none``, or for the name of a complete folder or URL."""
        if resume == "none":
            return None
        if "://" in resume:
            return resume
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(f"--resume {resume}: no such checkpoint folder")
        if find_checkpoint(path) != path:
            raise ConfigError(f"--resume {resume}: not a complete checkpoint (no COMPLETE file)")
        return path

    def resume(self, engine: Engine, resume: str) -> tuple[CheckpointMeta, Path | str] | None:
        """Load what ``resume`` names; with ``auto`` the newest undamaged one. None if there is nothing to load.

        Damaged checkpoints are skipped with a warning and left where they are. Raises :class:`ConfigError` where
        ``resume`` names a damaged one or all are damaged: a run never starts anew because its checkpoints cannot
        be read.
        """
        if resume != "auto":
            named = run_on_rank_zero(lambda: self.resolve(resume))
            return None if named is None else (self.load(engine, named), named)
        paths = run_on_rank_zero(lambda: [path for _, path in self.complete()])
        return self._load_first(engine, paths) if paths else None

    def rollback(self, engine: Engine, *, max_step: int) -> CheckpointMeta:
        """Load the newest undamaged checkpoint of step ``max_step`` or before, and remove those after it.

        Raises :class:`RunError` where there is none.
        """
        checkpoints = run_on_rank_zero(self.complete)
        old_enough = [path for step, path in checkpoints if step <= max_step]
        if not old_enough:
            raise RunError(
                f"no checkpoint of step {max_step} or before to roll back to; save more often (checkpoint.every), "
                "keep more (checkpoint.keep_last), or lower faults.rollback_steps"
            )
        meta, _ = self._load_first(engine, old_enough)
        newer = sorted({step for step, _ in checkpoints if step > meta.step})
        raise_together(lambda: self._remove(newer) if dist.get_rank() == 0 else None)
        if newer:
            logger.info("removed the checkpoints of steps %s, which were rolled back", ", ".join(map(str, newer)))
        return meta

    def _load_first(self, engine: Engine, paths: Sequence[Path | str]) -> tuple[CheckpointMeta, Path | str]:
        damaged: list[str] = []
        for path in paths:
            try:
                return self.load(engine, path), path
            except Damaged as error:
                damaged.append(str(error))
                logger.warning("%s: skipped; trying the checkpoint before it", error)
        raise ConfigError(f"all {len(paths)} complete checkpoints are damaged: {'; '.join(damaged)}")

    def _remove(self, steps: Sequence[int]) -> None:
        for storage in {self._local, self._storage}:
            for step in set(steps) & set(storage.steps()):
                storage.remove(step)

    def load(self, engine: Engine, path: Path | str) -> CheckpointMeta:
        """Verify and load a full checkpoint; raises :class:`ConfigError` for one that does not fit.

        The checkpoint that a run resumed from is not deleted by the run.
        """
        with loader.open_checkpoint(path, self._folder) as source:
            meta = loader.load(engine, source)
        if str(path) in {str(each.path_of(meta.step)) for each in (self._local, self._storage)}:
            self._protected = {meta.step}
        return meta

    def initialise(self, engine: Engine) -> None:
        """Fill a fresh engine from ``init_from``, if set; raises :class:`ConfigError` naming what does not fit."""
        if self._cfg.init_from is None:
            return
        path = self._cfg.init_from if "://" in self._cfg.init_from else Path(self._cfg.init_from)
        with loader.open_checkpoint(path, self._folder) as source:
            loader.initialise(engine, source, self._cfg)

    @property
    def _storage(self) -> LocalStorage | ObjectStorage:
        """Where this run's checkpoints are stored."""
        if self._cfg.url is None:
            return self._local
        if self._remote is None:
            self._remote = ObjectStorage(self._cfg.url)
        return self._remote

    def _export(self, snapshot: Snapshot, meta: CheckpointMeta) -> Path | str:
        """Write the EMA to the run's ``exports``, and move it to the URL if set; after an error it stays there."""
        path = export_ema(snapshot, meta, self._exports, self._group)
        storage = self._storage
        if not isinstance(storage, ObjectStorage):
            return path
        raise_together(lambda: storage.publish_export(path) if dist.get_rank() == 0 else None, self._group)
        return storage.path_of_export(path.name)

    def _write(self, snapshot: Snapshot, meta: CheckpointMeta) -> Path | str:
        """Write and publish a snapshot, on all ranks; returns its path. Leaves nothing after an error."""
        temporary = self._folder / f"{SAVING}{step_name(meta.step)}"
        group, first = self._group, dist.get_rank() == 0
        published = False
        try:
            raise_together(lambda: _make_empty(temporary) if first else None, group)
            own = raise_together(lambda: write_snapshot(snapshot, temporary, group), group)
            meta = dataclasses.replace(meta, parameter_digest=parameter_digest(snapshot, group))
            checksums = {name: entry for part in gather_objects(own, group) for name, entry in part.items()}
            published = True
            # A step that is saved again must not seem complete with files of both.
            raise_together(lambda: self._storage.abort(meta.step) if first else None, group)
            raise_together(lambda: self._storage.publish(temporary, meta.step, sorted(own), own), group)
            raise_together(lambda: self._complete(temporary, meta, checksums) if first else None, group)
        except (ConfigError, RunError) as error:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                if published:
                    # What cannot be removed now is removed at the next start.
                    with suppress(ConfigError, RunError):
                        self._storage.abort(meta.step)
            raise RunError(f"checkpoint at step {meta.step} could not be written: {error}") from error
        return self._storage.path_of(meta.step)

    def _complete(self, temporary: Path, meta: CheckpointMeta, checksums: FileChecksums) -> None:
        """Write what makes a checkpoint complete, publish it, and retire old ones; rank 0 only."""
        storage = self._storage
        storage.complete(temporary, meta.step, write_markers(temporary, meta, checksums))
        try:
            steps = storage.steps()
            for step in set(steps) - retained(steps, self._cfg, storage.metrics, protected=self._protected):
                storage.remove(step)
        except (RunError, OSError) as error:
            logger.warning("an old checkpoint could not be removed: %s", error)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

"""The canonical checkpoint: one format, the same for every engine and layout, saved beside the training.

:mod:`deco_scale.checkpoint.format` has the format. A step waits for a copy of this rank's shards in host
memory; a thread writes them under a temporary name with their checksums, makes them durable and brings them to
their place. Loading checks files, names and shapes before a tensor is touched.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import torch.distributed as dist

from data_pipeline.storage.files import write_durably
from deco_scale.checkpoint import loader
from deco_scale.checkpoint.async_save import BackgroundTask, CheckpointGroup, SaveResult
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.digest import parameter_digest, snapshot_digest
from deco_scale.checkpoint.export import PREFIX, export_ema
from deco_scale.checkpoint.format import (
    COMPLETE,
    META,
    METADATA,
    SCHEMA_VERSION,
    CheckpointMeta,
    FileSums,
    check_fit,
    read_meta,
    read_tensors,
    stored_shapes,
    sums_text,
    verify,
)
from deco_scale.checkpoint.retention import retained
from deco_scale.checkpoint.staging import Snapshot, Staging
from deco_scale.checkpoint.storage import (
    SAVING,
    CheckpointStorage,
    LocalStorage,
    ObjectStorage,
    OpenObjects,
    remove_scratch,
    step_name,
)
from deco_scale.checkpoint.writer import write_snapshot
from deco_scale.distributed.collectives import raise_together, run_on_rank_zero
from deco_scale.errors import ConfigError, Damaged, RunError
from deco_scale.parallel.engines.base import Engine

logger = logging.getLogger(__name__)

__all__ = [
    "COMPLETE",
    "META",
    "METADATA",
    "SCHEMA_VERSION",
    "CheckpointMeta",
    "CheckpointManager",
    "SaveResult",
    "check_fit",
    "parameter_digest",
    "read_meta",
    "read_tensors",
    "stored_shapes",
    "verify",
]


class CheckpointManager:
    """Saves to and resumes from the checkpoints of a run: ``folder``, or what ``cfg.url`` names.

    ``open_objects`` opens object stores. Methods that take an engine are for all ranks together.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig, *, open_objects: OpenObjects | None = None) -> None:
        self._folder, self._cfg, self._open_objects = folder, cfg, open_objects
        self._local = LocalStorage(folder)
        self._target: CheckpointStorage | None = self._local if cfg.url is None else None
        self._staging, self._worker = Staging(), BackgroundTask()
        self._team: CheckpointGroup | None = None
        self._held: set[int] = set()
        self._metrics: dict[str, float] = {}
        self._stall_s, self._saving_step, self._saving_whole = 0.0, 0, True
        self._untold_stall_s: float | None = None

    def prepare(self) -> None:
        """Make the folder and clear what interrupted saves left behind; rank 0 only, before any other use."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_scratch(self._folder)
            if self._exports.exists():
                remove_scratch(self._exports)
            self._local.clean()
        except OSError as error:
            raise ConfigError(f"cannot write to {self._folder}: {error.strerror}") from error
        if self._cfg.url is not None:
            self._place.clean()

    def reserve(self, engine: Engine) -> None:
        """Take the memory for copies now, so that the first save holds a step up no longer than later ones."""
        if self._cfg.asynchronous:
            self._staging.take(engine.state())

    def due(self, step: int) -> bool:
        return step % self._cfg.every == 0

    def export_due(self, step: int) -> bool:
        """Whether the EMA is exported at this step."""
        every = self._cfg.ema_every
        return step in self._cfg.ema_steps or (every > 0 and step % every == 0)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Note a logged step's metrics; raises :class:`ConfigError` where ``keep_best`` names none of them."""
        if self._cfg.keep_best is not None:
            name = self._cfg.keep_best.metric
            value = metrics.get(name)
            if name not in metrics or not isinstance(value, int | float | None):
                numbers = sorted(k for k, v in metrics.items() if isinstance(v, int | float))
                raise ConfigError(f"checkpoint.keep_best.metric={name!r} is not logged; possible: {numbers}")
            self._metrics = {name: float(value)} if value is not None and math.isfinite(value) else {}

    def save(self, engine: Engine, meta: CheckpointMeta) -> Path:
        """Save and wait until it is done; raises :class:`RunError` and leaves nothing half-written.

        The error of a save that is still in flight is raised in its place.
        """
        before = self.finished(wait=True)
        if before is not None and before.error is not None:
            raise RunError(before.error)
        self._begin(engine, meta, checkpoint=True, export=False, inline=True)
        saved = self.finished(wait=True)
        if saved is not None and saved.error is not None:
            raise RunError(saved.error)
        return self._folder / step_name(meta.step)

    def start(
        self, engine: Engine, meta: CheckpointMeta, *, checkpoint: bool = True, export: bool = False
    ) -> SaveResult | None:
        """Begin to save (the whole, the EMA alone, or both) and return once the state is copied.

        Without ``asynchronous`` it returns when all is done. At most one save is in flight: one that still runs
        is waited for, and its end returned.
        """
        began = time.perf_counter()
        before = self.finished(wait=True)
        self._begin(
            engine, meta, checkpoint=checkpoint, export=export, inline=not self._cfg.asynchronous, began=began
        )
        return before

    def finished(self, *, wait: bool = False) -> SaveResult | None:
        """The end of the save that was started last, once; None if there is none or it still runs."""
        if self._worker.busy and not wait:
            return None
        outcome = self._worker.wait()
        if outcome is None:
            return None
        times = f"in {outcome.total_s:.1f} s (checkpoint_stall_s {self._stall_s:.2f})"
        return SaveResult(
            message=f"{outcome.message} {times}",
            error=outcome.error,
            checkpoint=self._saving_whole,
            step=self._saving_step,
            stall_s=self._stall_s,
            total_s=outcome.total_s,
        )

    def take_stall(self) -> float | None:
        """Seconds for which saves have held the training up since the last call, None without a save."""
        stall_s, self._untold_stall_s = self._untold_stall_s, None
        return stall_s

    def complete(self) -> list[tuple[int, Path | str]]:
        """Steps and places (folders or URLs) of all complete checkpoints, the newest first."""
        found: list[tuple[int, Path | str]] = [(s, self._local.where(s)) for s in self._local.steps()]
        if self._cfg.url is not None:
            found += [(s, self._place.where(s)) for s in self._place.steps()]
        # Of the same step the one that was put to the URL.
        return sorted(found, key=lambda entry: (entry[0], isinstance(entry[1], str)), reverse=True)

    def latest(self) -> Path | str | None:
        """The newest complete checkpoint, folder or URL, or None."""
        found = self.complete()
        return found[0][1] if found else None

    def resolve(self, resume: str) -> Path | str | None:
        """What ``auto`` (newest complete), ``none``, or the name of a complete folder or URL stands for."""
        if resume == "none":
            return None
        if resume == "auto":
            return self.latest()
        if "://" in resume:
            return resume
        path = Path(resume)
        if not path.is_dir():
            raise ConfigError(f"--resume {resume}: no such checkpoint folder")
        if not (path / COMPLETE).is_file():
            raise ConfigError(f"--resume {resume}: not a complete checkpoint (no {COMPLETE} file)")
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
        found = run_on_rank_zero(lambda: [where for _, where in self.complete()])
        return self._load_first(engine, found) if found else None

    def rollback(self, engine: Engine, *, max_step: int) -> CheckpointMeta:
        """Load the newest undamaged checkpoint of step ``max_step`` or before, and remove those after it.

        Raises :class:`RunError` where there is none.
        """
        everything = run_on_rank_zero(self.complete)
        old_enough = [where for step, where in everything if step <= max_step]
        if not old_enough:
            raise RunError(
                f"no checkpoint of step {max_step} or before to roll back to; save more often (checkpoint.every), "
                "keep more (checkpoint.keep_last), or lower faults.rollback_steps"
            )
        meta, _ = self._load_first(engine, old_enough)
        newer = sorted({step for step, _ in everything if step > meta.step})
        raise_together(lambda: self._remove(newer) if dist.get_rank() == 0 else None)
        if newer:
            logger.info("removed the checkpoints of steps %s, which were rolled back", ", ".join(map(str, newer)))
        return meta

    def _load_first(self, engine: Engine, places: Sequence[Path | str]) -> tuple[CheckpointMeta, Path | str]:
        damaged: list[str] = []
        for where in places:
            try:
                return self.load(engine, where), where
            except Damaged as error:
                damaged.append(str(error))
                logger.warning("%s: skipped; trying the checkpoint before it", error)
        raise ConfigError(f"all {len(places)} complete checkpoints are damaged: {'; '.join(damaged)}")

    def _remove(self, steps: Sequence[int]) -> None:
        for step in steps:
            if step in self._local.steps():
                self._local.remove(step)
            if self._cfg.url is not None and step in self._place.steps():
                self._place.remove(step)

    def load(self, engine: Engine, where: Path | str) -> CheckpointMeta:
        """Check and load all of a checkpoint; raises :class:`ConfigError` for one that does not fit.

        The checkpoint that a run goes on from is not retired by it.
        """
        with loader.open_checkpoint(where, self._folder, self._open_objects) as source:
            meta = loader.load(engine, source)
        if str(where) in (str(self._local.where(meta.step)), self._cfg.url and str(self._place.where(meta.step))):
            self._held = {meta.step}
        return meta

    def initialise(self, engine: Engine) -> None:
        """Fill a fresh engine from ``init_from``, if set; raises :class:`ConfigError` naming what does not fit."""
        if self._cfg.init_from is None:
            return
        where = self._cfg.init_from if "://" in self._cfg.init_from else Path(self._cfg.init_from)
        with loader.open_checkpoint(where, self._folder, self._open_objects) as source:
            loader.initialise(engine, source, self._cfg)

    @property
    def _place(self) -> CheckpointStorage:
        if self._target is None:
            assert self._cfg.url is not None
            if self._open_objects is None:
                raise ConfigError(f"checkpoint.url={self._cfg.url}: this program has no access to object stores")
            self._target = ObjectStorage(self._open_objects(self._cfg.url))
        return self._target

    @property
    def _exports(self) -> Path:
        return self._folder.parent / "exports"

    def _begin(
        self,
        engine: Engine,
        meta: CheckpointMeta,
        *,
        checkpoint: bool,
        export: bool,
        inline: bool,
        began: float | None = None,
    ) -> None:
        began = time.perf_counter() if began is None else began
        if self._team is None or (not inline and self._team.group is None):
            self._team = CheckpointGroup(apart=not inline)
        team = self._team
        self._saving_step, self._saving_whole = meta.step, checkpoint
        meta = dataclasses.replace(meta, optimizer_steps=engine.optimizer_steps, metrics=self._metrics)
        wanted = (lambda name: True) if checkpoint else (lambda name: name.startswith(PREFIX))
        snapshot = self._staging.take(engine.state(), wanted)

        def job() -> str:
            said = []
            if checkpoint:
                said.append(f"checkpoint {self._write(snapshot, meta, team)}")
            if export:
                said.append(f"EMA export {self._export(snapshot, meta, team)}")
            return ", ".join(said)

        if inline:
            self._worker.start(job, began=began, inline=True)
            self._stall_s = time.perf_counter() - began
        else:
            self._stall_s = time.perf_counter() - began
            self._worker.start(job, began=began, inline=False)
        self._untold_stall_s = (self._untold_stall_s or 0.0) + self._stall_s

    def _export(self, snapshot: Snapshot, meta: CheckpointMeta, team: CheckpointGroup) -> Path | str:
        """Write the EMA to the run's ``exports``, or by way of it to the URL; after an error it stays there."""
        path = export_ema(snapshot, meta, self._exports, team)
        if self._cfg.url is None:
            return path
        place = self._place
        assert isinstance(place, ObjectStorage)
        team.agree(lambda: place.put_export(path) if team.rank == 0 else None)
        return place.where_export(path.name)

    def _write(self, snapshot: Snapshot, meta: CheckpointMeta, team: CheckpointGroup) -> str:
        """Bring a snapshot to its place, on all ranks, and say which; on a :class:`RunError` nothing is left."""
        temporary = self._folder / f"{SAVING}{step_name(meta.step)}"
        first = team.rank == 0
        published = False
        try:
            team.agree(lambda: _make_empty(temporary) if first else None)
            mine = team.agree(lambda: write_snapshot(snapshot, temporary, team))
            digest = snapshot_digest(snapshot, team.group)
            sums = {name: entry for part in team.gather(mine) for name, entry in part.items()}
            published = True
            # A step that is saved again must not seem complete with files of both.
            team.agree(lambda: self._place.discard(meta.step) if first else None)
            team.agree(lambda: self._place.publish(temporary, meta.step, sorted(mine), mine))
            meta = dataclasses.replace(meta, parameter_digest=digest)
            team.agree(lambda: self._complete(temporary, meta, sums) if first else None)
        except RunError as error:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                if published:
                    # What cannot be removed now is removed at the next start.
                    with suppress(RunError):
                        self._place.discard(meta.step)
            raise RunError(f"checkpoint at step {meta.step} could not be written: {error}") from error
        return str(self._place.where(meta.step))

    def _complete(self, temporary: Path, meta: CheckpointMeta, sums: FileSums) -> None:
        """Write what makes a checkpoint complete, publish it, and retire old ones; rank 0 only."""
        text = json.dumps(dataclasses.asdict(meta), indent=1).encode()
        write_durably(temporary / META, text)
        sums[META] = len(text), google_crc32c.value(text)
        listing = sums_text(dict(sorted(sums.items())))
        write_durably(temporary / COMPLETE, listing)
        marked = {**sums, COMPLETE: (len(listing), google_crc32c.value(listing))}
        self._place.complete(temporary, meta.step, marked)
        try:
            steps = self._place.steps()
            for step in set(steps) - retained(steps, self._cfg, self._place.metrics, held=self._held):
                self._place.remove(step)
        except RunError as error:
            logger.warning("an old checkpoint could not be removed: %s", error)
        except OSError as error:
            logger.warning("an old checkpoint could not be removed: %s: %s", error.filename, error.strerror)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

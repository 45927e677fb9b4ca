"""Profiler trace and memory snapshot of a few steps on chosen ranks, in the run's folder."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from deco_scale.training.callbacks import Callback
from deco_scale.training.config import ProfileConfig

if TYPE_CHECKING:
    from deco_scale.training.trainer import Trainer

logger = logging.getLogger(__name__)

_MAX_ALLOCATIONS = 100_000
"""Events in a memory snapshot; older ones are dropped."""


class ProfileSteps(Callback):
    """Writes ``step_*_rank_*.trace.json.gz`` and, on a GPU, ``.memory.pickle`` into ``folder``.

    The profiler warms up in the step before the first, if this launch has one. A run that ends earlier has what
    was recorded until then; a trace that cannot be written is a warning. No GPU has run the memory snapshot yet.
    """

    def __init__(self, cfg: ProfileConfig, folder: Path) -> None:
        self._cfg, self._folder = cfg, folder
        self._pending, self._on_gpu = cfg.at_step is not None, False
        self._profiler: profile | None = None
        self._path = folder

    def on_step_start(self, trainer: "Trainer", step: int) -> None:
        first = self._cfg.at_step
        if not self._pending or first is None or step < first - 1:
            return
        self._pending = False
        if step > first:
            logger.info(
                "run.profile.at_step=%d is before step %d of this launch: nothing is profiled", first, step
            )
        elif dist.get_rank() in self._cfg.ranks:
            self._on_gpu = trainer.device.type == "cuda"
            self._path = self._folder / f"step_{first:08d}_rank_{dist.get_rank():05d}"
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])],
                schedule=schedule(wait=0, warmup=first - step, active=self._cfg.steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS)

    def on_step_end(self, trainer: "Trainer", step: int) -> None:
        if self._cfg.at_step is None or step > (last := self._cfg.at_step + self._cfg.steps - 1):
            return
        if step == last:
            # Writing takes longer than a step, and the other ranks wait for it in the next one.
            trainer.heartbeat.beat(step, "long_op")
        if self._profiler is not None:
            self._profiler.step()
        if step == last:
            self._stop()
            viewers = "traces open in https://ui.perfetto.dev"
            if trainer.device.type == "cuda":
                viewers += ", memory snapshots in https://pytorch.org/memory_viz"
            else:
                viewers += "; no memory snapshots, they need a GPU"
            steps, ranks = f"{self._cfg.at_step}-{last}", ", ".join(map(str, self._cfg.ranks))
            logger.info("profile of steps %s of ranks %s: %s (%s)", steps, ranks, self._folder, viewers)

    def on_exception(self, trainer: "Trainer", error: BaseException) -> None:
        # After an error of the device the profiler may fail as well; the first error is the one to see.
        with suppress(RuntimeError):
            self._stop()

    def on_train_end(self, trainer: "Trainer") -> None:
        if self._pending:
            logger.info("run.profile.at_step=%s was not reached: nothing is profiled", self._cfg.at_step)
        self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, profiler: profile) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{self._path}.trace.json.gz")
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(f"{self._path}.memory.pickle")
        except (OSError, RuntimeError) as error:
            logger.warning("the profile could not be written to %s: %s; training continues", self._folder, error)

"""The training loop: stages in order, steps within, and everything that happens between steps."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch

from deco_scale.errors import RunError
from deco_scale.training.ahead import Ahead
from deco_scale.training.batch import NOT_ENCODED, Batch, Encoded, Prepare, pinned, split
from deco_scale.training.checkpoint import CheckpointMeta, Checkpoints, Saved
from deco_scale.training.engine import Engine
from deco_scale.training.feed import Feed
from deco_scale.training.processes import summed_counters
from deco_scale.training.report import Reporter
from deco_scale.training.settings import RunSettings, StageConfig
from deco_scale.training.step import StepResult, train_step
from deco_scale.training.stopping import StopRequest


class Data(Protocol):
    """Batches of one rank for one stage."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened to the data on this rank so far, by name."""

    def state(self, samples: int) -> dict[str, Any]:
        """The data's place after ``samples`` samples of the run, the same on every rank."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: updates attempted, samples seen, their stage, and the data's place after them."""

    step: int = 0
    samples: int = 0
    stage: str = ""
    data_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with what is derived from it: accumulation steps and FLOPs of one training image."""

    cfg: StageConfig
    accumulation: int
    image_flops: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything a run needs, put together by the launcher.

    ``open_data`` gives the samples of a stage from a number of samples on; ``after_step`` is called with
    the step just done (all ranks), for pictures and the like; ``peak_flops`` is the sum over ranks.
    """

    settings: RunSettings
    stages: Sequence[Stage]
    engine: Engine
    prepare: Prepare
    open_data: Callable[[StageConfig, int], Data]
    checkpoints: Checkpoints
    reporter: Reporter
    device: torch.device
    config: dict[str, Any]
    after_step: Callable[[int], None]
    peak_flops: float | None
    ahead: Ahead | None = None
    stop: StopRequest | None = None

    @property
    def total_steps(self) -> int:
        return sum(stage.cfg.steps for stage in self.stages)

    @property
    def stopped(self) -> str | None:
        """Name of the signal that ended the run early."""
        return self.stop.met if self.stop is not None else None

    def run(self, progress: Progress) -> Progress:
        """Train from ``progress`` to the end, or to ``stop_at_step``."""
        self.checkpoints.reserve(self.engine)
        try:
            return self._run(progress)
        finally:
            # Also after an error: a save on its way to the disk is worth the wait.
            self._tell(self.checkpoints.finished(wait=True))

    @property
    def _limit(self) -> int:
        """The step at which this launch ends."""
        return min(self.settings.stop_at_step or self.total_steps, self.total_steps)

    def _run(self, progress: Progress) -> Progress:
        limit, end = self._limit, 0
        for stage in self.stages:
            end += stage.cfg.steps
            if progress.step >= min(end, limit):
                continue
            self.reporter.say(
                f"stage {stage.cfg.name}: {stage.cfg.resolution} px, to step {end}, global batch "
                f"{stage.cfg.global_batch} (accumulation {stage.accumulation})"
            )
            progress = self._run_stage(stage, progress, min(end, limit))
            if self.stopped is not None:
                self.reporter.say(f"stopped by {self.stopped} after step {progress.step}")
                break
        return progress

    def _run_stage(self, stage: Stage, progress: Progress, end: int) -> Progress:
        data = self.open_data(stage.cfg, progress.samples)
        state = data.state(progress.samples)
        if progress.stage == stage.cfg.name and progress.data_state != state:
            self.reporter.say(
                f"WARNING: the data are not those of the checkpoint ({state}, was {progress.data_state}): "
                "from here on other samples are seen than without the break"
            )
        gate = BadSteps(self.settings.max_bad_steps, self.device)
        meter = Meter(self, stage, progress.step)
        on_gpu, null_shape = self.device.type == "cuda", self.prepare.null.shape
        feed = Feed(iter(data), depth=2, prepare=(lambda batch: pinned(batch, null_shape)) if on_gpu else None)
        batches: Iterator[tuple[Batch, list[Encoded] | None]] = ((batch, None) for batch in feed)
        if self.ahead is not None:
            count = end - progress.step
            batches = iter(self.ahead.over(feed, parts=stage.accumulation, count=count))
        try:
            first = progress.step + 1
            while progress.step < end and self.stopped is None:
                started = waited = time.perf_counter()
                batch, encoded = next(batches)
                meter.waited(time.perf_counter() - waited)
                result = self.step(stage, batch, encoded)
                samples = progress.samples + stage.cfg.global_batch
                progress = Progress(progress.step + 1, samples, stage.cfg.name, data.state(samples))
                gate.add(result.skipped)
                step = progress.step
                if step == first:
                    self.reporter.event("first_step", step=step, seconds=time.perf_counter() - started)
                if self.stop is not None and self.stop.agreed():
                    self.reporter.event("stop_signal", signal=self.stop.met)
                if step % self.settings.log_every == 0 or step == end:
                    counted = summed_counters(data.counters)
                    metrics = meter.read(result, progress, gate.total(), counted)
                    self.reporter.metrics(metrics)
                    self.checkpoints.observe(metrics)
                    gate.check(step)
                else:
                    gate.glance(step)
                began = time.perf_counter()
                self.after_step(step)
                self._save(stage, progress, end=end)
                meter.other(time.perf_counter() - began)
        finally:
            # The workers first: their end wakes a feed that waits for them.
            data.close()
            feed.close()
        return progress

    def step(self, stage: Stage, batch: Batch, encoded: Sequence[Encoded] | None = None) -> StepResult:
        """One update on this rank's share of a global batch; ``encoded`` is what is already, by micro-batch."""
        parts = split(batch, stage.accumulation)
        shift = stage.cfg.timestep_shift
        known = encoded or [NOT_ENCODED] * stage.accumulation
        inputs = (self.prepare(part, shift, each) for part, each in zip(parts, known, strict=True))
        return train_step(
            self.engine,
            inputs,
            num_micro_batches=stage.accumulation,
            lr=stage.cfg.lr,
            betas=stage.cfg.betas,
        )

    def _save(self, stage: Stage, progress: Progress, *, end: int) -> None:
        """Tell of a save that has ended, and begin one where it is time; the last of a run must succeed."""
        step = progress.step
        last = step == self._limit or self.stopped is not None
        whole = self.checkpoints.due(step) or step == end or last
        export = self.checkpoints.export_due(step)
        if not whole and not export:
            self._tell(self.checkpoints.finished())
            return
        meta = CheckpointMeta(
            step=step,
            stage=stage.cfg.name,
            samples=progress.samples,
            seed=self.settings.seed,
            optimizer_steps=0,
            data_state=progress.data_state,
            parameter_digest="",
            config=self.config,
        )
        self._tell(self.checkpoints.start(self.engine, meta, checkpoint=whole, export=export))
        if last:
            self._tell(self.checkpoints.finished(wait=True), must_succeed=True)

    def _tell(self, saved: Saved | None, *, must_succeed: bool = False) -> None:
        if saved is None:
            return
        times = {"step": saved.step, "stall_s": saved.stall_s, "total_s": saved.total_s}
        if saved.error is None:
            self.reporter.event("checkpoint", **times)
        else:
            self.reporter.event("checkpoint_failed", **times, reason=saved.error)
        if saved.error is None:
            self.reporter.say(saved.said)
        elif must_succeed:
            raise RunError(saved.error)
        else:
            # Training is worth more than one checkpoint: the previous one is untouched.
            self.reporter.say(f"WARNING: {saved.error}; training goes on")


class BadSteps:
    """Counts skipped steps on the device and ends the run after too many in a row.

    Steps that log wait for the device and check. In between, every ``limit``-th step starts a copy of the count
    to the host and looks at the copy before, which has long arrived: a run that does not log ends less than
    three times ``limit`` steps after its last good one, at the same step on every rank.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit = limit
        self._in_a_row = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._on_gpu = device.type == "cuda"
        self._copied: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def add(self, skipped: torch.Tensor) -> None:
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._total = self._total + skipped

    def total(self) -> int:
        return int(self._total.item())

    def glance(self, step: int) -> None:
        """Check the count of ``limit`` steps ago, without waiting for the steps in flight."""
        if step % self._limit:
            return
        before, event = self._copied or (None, None)
        held = torch.zeros((), pin_memory=self._on_gpu)
        held.copy_(self._in_a_row, non_blocking=True)
        self._copied = held, torch.cuda.current_stream().record_event() if self._on_gpu else None
        if before is not None:
            if event is not None:
                event.synchronize()
            self._judge(step, int(before.numpy()))

    def check(self, step: int) -> None:
        """Check the count of this step; waits for the device."""
        self._copied = None
        self._judge(step, int(self._in_a_row.item()))

    def _judge(self, step: int, count: int) -> None:
        if count >= self._limit:
            raise RunError(
                f"step {step}: loss or gradient not finite in {count} steps in a row "
                f"(run.max_bad_steps={self._limit}); weights are as before them. Lower the learning "
                "rate, or look at the data of these steps"
            )


class Meter:
    """Times between two logged steps."""

    def __init__(self, loop: Loop, stage: Stage, step: int) -> None:
        self._loop, self._stage = loop, stage
        self._began, self._from_step, self._wait_s = time.perf_counter(), step, 0.0

    def waited(self, seconds: float) -> None:
        """Time spent on waiting for data, part of the step."""
        self._wait_s += seconds

    def other(self, seconds: float) -> None:
        """Time spent on pictures and checkpoints, no part of the step."""
        self._began += seconds

    def read(
        self, result: StepResult, progress: Progress, skipped: int, counters: Mapping[str, int]
    ) -> dict[str, Any]:
        """Metrics since the last call; waits for the device. ``counters`` are of the stage so far, all ranks."""
        losses = {name: value.item() for name, value in result.losses.items()}
        grad_norm = result.grad_norm.item()
        now = time.perf_counter()
        steps = progress.step - self._from_step
        step_s = (now - self._began) / steps
        stage, loop = self._stage, self._loop
        images_per_s = stage.cfg.global_batch / step_s
        achieved = stage.image_flops * images_per_s
        metrics = {
            "time": time.time(),
            "step": progress.step,
            "stage": stage.cfg.name,
            "samples": progress.samples,
            **{name: losses.get(name) for name in ("loss", "loss_flow", "loss_freq", "loss_repa")},
            "grad_norm": grad_norm,
            "lr": stage.cfg.lr,
            "images_per_s": images_per_s,
            "mfu": achieved / loop.peak_flops if loop.peak_flops else None,
            "step_s": step_s,
            "data_wait_s": self._wait_s / steps,
            "memory_bytes": memory_bytes(loop.device),
            "skipped": skipped,
            **{f"data.{name}": count for name, count in sorted(counters.items())},
        }
        stall_s = loop.checkpoints.take_stall()
        if stall_s is not None:
            metrics["checkpoint_stall_s"] = stall_s
        self._began, self._from_step, self._wait_s = now, progress.step, 0.0
        return metrics


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on the GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def resumed(meta: CheckpointMeta) -> Progress:
    """Progress that a checkpoint stands for."""
    return Progress(meta.step, meta.samples, meta.stage, meta.data_state)

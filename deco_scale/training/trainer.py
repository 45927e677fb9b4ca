"""The training loop: stages in order, steps within, and everything that happens between steps."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deco_scale.checkpoint.manager import CheckpointManager, CheckpointMeta, SaveResult
from deco_scale.distributed.collectives import gather_objects, sum_counters
from deco_scale.distributed.replica_check import ReplicaCheck, ReplicaMismatchError
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import RunError
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.engines.base import Engine
from deco_scale.training.anomalies import AnomalyDetector, RollbackRequested
from deco_scale.training.config import FaultsConfig, RunSettings, StageConfig
from deco_scale.training.encoder_prefetch import EncoderPrefetcher
from deco_scale.training.host_prefetch import HostPrefetcher
from deco_scale.training.inputs import NOT_ENCODED, Batch, EncoderOutputs, InputBuilder, pinned, split
from deco_scale.training.metrics import RankComputeTimer, StepTimer, StragglerDetector, memory_bytes, rank_times
from deco_scale.training.train_step import StepResult, train_step
from deco_scale.watchdog.client import NoWatchdog
from deco_scale.watchdog.heartbeat import Phase


class Data(Protocol):
    """Batches of one rank for one stage."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened to the data on this rank so far, by name."""

    def state(self, samples: int) -> dict[str, Any]:
        """The data's place after ``samples`` samples of the run, the same on every rank."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class Heartbeat(Protocol):
    """What a rank tells that it makes progress; see :mod:`deco_scale.watchdog`."""

    def beat(self, step: int, phase: Phase) -> None:
        """The rank starts ``phase`` of ``step``: start-up, a step, or an operation that may take long."""


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
class Trainer:
    """Everything a run needs, put together by the launcher.

    ``open_data`` gives the samples of a stage from a number of samples on; ``after_step`` is called with
    the step just done (all ranks), for pictures and the like; ``peak_flops`` is the sum over ranks; ``hosts`` are
    the ranks' nodes.
    """

    settings: RunSettings
    stages: Sequence[Stage]
    engine: Engine
    prepare: InputBuilder
    open_data: Callable[[StageConfig, int], Data]
    checkpoints: CheckpointManager
    reporter: RunLogger
    device: torch.device
    config: dict[str, Any]
    after_step: Callable[[int], None]
    peak_flops: float | None
    ahead: EncoderPrefetcher | None = None
    stop: StopRequest | None = None
    faults: FaultsConfig = FaultsConfig()
    heartbeat: Heartbeat = field(default_factory=NoWatchdog)
    hosts: Sequence[str] = ("localhost",)
    own_work: RankComputeTimer | None = None

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
        rolled_back = 0
        while True:
            try:
                return self._run_stages(progress)
            except RollbackRequested as wanted:
                rolled_back += 1
                if rolled_back > self.faults.max_rollbacks:
                    raise RunError(
                        f"{wanted}; the run was rolled back {self.faults.max_rollbacks} times already "
                        "(faults.max_rollbacks): lower the learning rate, or look at the data"
                    ) from None
                progress = self._go_back(wanted)

    def _go_back(self, wanted: RollbackRequested) -> Progress:
        """Load the checkpoint that the policy asks for; the data go on after what was trained on."""
        self.heartbeat.beat(wanted.at_step, "long_op")
        self._tell(self.checkpoints.finished(wait=True))
        at_most = wanted.step - self.faults.rollback_steps
        meta = self.checkpoints.rollback(self.engine, at_most=at_most, say=self.reporter.say)
        self.reporter.event("rollback", step=wanted.at_step, to_step=meta.step)
        skipped = wanted.samples - meta.samples
        self.reporter.say(
            f"WARNING: {wanted}: rolled back from step {wanted.at_step} to {meta.step}; "
            f"{skipped} samples are skipped"
        )
        # Of no stage, since its data no longer stand where its count of steps says.
        return Progress(meta.step, wanted.samples)

    def _run_stages(self, progress: Progress) -> Progress:
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
        self.heartbeat.beat(progress.step, "start")
        data = self.open_data(stage.cfg, progress.samples)
        state = data.state(progress.samples)
        if progress.stage == stage.cfg.name and progress.data_state != state:
            self.reporter.say(
                f"WARNING: the data are not those of the checkpoint ({state}, was {progress.data_state}): "
                "from here on other samples are seen than without the break"
            )
        judge = AnomalyDetector(self.faults, max_bad_steps=self.settings.max_bad_steps, device=self.device)
        replicas = ReplicaCheck(self.faults.check_replicas_every, self.hosts)
        log = MetricsCollector(self, stage, progress.step)
        on_gpu, null_shape = self.device.type == "cuda", self.prepare.null.shape
        feed = HostPrefetcher(
            iter(data), depth=2, prepare=(lambda batch: pinned(batch, null_shape)) if on_gpu else None
        )
        batches: Iterator[tuple[Batch, list[EncoderOutputs] | None]] = ((batch, None) for batch in feed)
        if self.ahead is not None:
            count = end - progress.step
            batches = iter(self.ahead.over(feed, parts=stage.accumulation, count=count))
        try:
            first = progress.step + 1
            while progress.step < end and self.stopped is None:
                step = progress.step + 1
                logs = step % self.settings.log_every == 0 or step == end
                self.heartbeat.beat(step, "start" if step == first else "step")
                started = time.perf_counter()
                batch, encoded = next(batches)
                log.waited(time.perf_counter() - started)
                if logs:
                    log.watch_step()
                result = self.step(stage, batch, encoded, judge)
                samples = progress.samples + stage.cfg.global_batch
                progress = Progress(step, samples, stage.cfg.name, data.state(samples))
                judge.add(step, loss=result.losses["loss"], skipped=result.skipped)
                if step == first:
                    self.reporter.event("first_step", step=step, seconds=time.perf_counter() - started)
                if self.stop is not None and self.stop.agreed():
                    self.reporter.event("stop_signal", signal=self.stop.met)
                found = judge.read(everything=logs or self.stopped is not None)
                for one in found:
                    self.reporter.event(one.kind, step=one.step, **one.details)
                if logs:
                    metrics = log.read(result, progress, judge.skipped, data.counters)
                    self.reporter.metrics(metrics)
                    self.checkpoints.observe(metrics)
                judge.act(found, progress.step, progress.samples)
                self._check(replicas, step)
                began = time.perf_counter()
                self.after_step(step)
                self._save(stage, progress, end=end)
                log.other(time.perf_counter() - began)
        finally:
            self.heartbeat.beat(progress.step, "long_op")
            # The workers first: their end wakes a feed that waits for them.
            data.close()
            feed.close()
        return progress

    def _check(self, replicas: ReplicaCheck, step: int) -> None:
        try:
            replicas.check(self.engine, step)
        except ReplicaMismatchError as error:
            for odd in error.odd:
                host = self.hosts[odd.rank]
                self.reporter.event("corruption", rank=odd.rank, host=host, tensors=odd.count, first=odd.first)
            raise

    def step(
        self,
        stage: Stage,
        batch: Batch,
        encoded: Sequence[EncoderOutputs] | None = None,
        judge: AnomalyDetector | None = None,
    ) -> StepResult:
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
            should_skip=judge.should_skip if judge is not None else None,
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
        self.heartbeat.beat(step, "long_op")
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

    def _tell(self, saved: SaveResult | None, *, must_succeed: bool = False) -> None:
        if saved is None:
            return
        times = {"step": saved.step, "stall_s": saved.stall_s, "total_s": saved.total_s}
        if saved.error is None:
            self.reporter.event("checkpoint" if saved.checkpoint else "export", **times)
            self.reporter.say(saved.said)
            return
        self.reporter.event("checkpoint_failed", **times, reason=saved.error)
        if must_succeed:
            raise RunError(saved.error)
        # Training is worth more than one checkpoint: the previous one is untouched.
        self.reporter.say(f"WARNING: {saved.error}; training goes on")


class MetricsCollector:
    """What a logged step says: times since the last one, losses, ranks' own times, counters of the data."""

    def __init__(self, loop: Trainer, stage: Stage, step: int) -> None:
        self._loop, self._stage = loop, stage
        self._meter = StepTimer(step)
        self._stragglers = StragglerDetector(loop.faults.straggler_factor)
        self.waited, self.other = self._meter.waited, self._meter.other

    def watch_step(self) -> None:
        """The step that begins now will be logged: measure this rank's own work in it."""
        if self._loop.own_work is not None:
            self._loop.own_work.start()

    def read(
        self, result: StepResult, progress: Progress, skipped: int, counters: Mapping[str, int]
    ) -> dict[str, Any]:
        """Metrics since the last call; waits for the device. All ranks together; ``counters`` are this rank's."""
        stage, loop = self._stage, self._loop
        losses = {name: value.item() for name, value in result.losses.items()}
        grad_norm = result.grad_norm.item()
        step_s, wait_s = self._meter.read(progress.step)
        own_s = wait_s + (loop.own_work.stop() if loop.own_work is not None else 0.0)
        ranks = gather_objects((dict(counters), own_s))
        seconds = [each for _, each in ranks]
        for rank, factor in self._stragglers.find(seconds, step_s).items():
            host = loop.hosts[rank]
            loop.reporter.event("straggler", rank=rank, host=host, factor=factor, step=progress.step)
            loop.reporter.say(f"WARNING: rank {rank} on {host} is slow: {factor:.1f} times the median's own work")
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
            "data_wait_s": wait_s,
            **rank_times(seconds),
            "memory_bytes": memory_bytes(loop.device),
            "skipped": skipped,
            **{f"data.{name}": count for name, count in sorted(sum_counters(each for each, _ in ranks).items())},
        }
        stall_s = loop.checkpoints.take_stall()
        if stall_s is not None:
            metrics["checkpoint_stall_s"] = stall_s
        return metrics


def resumed(meta: CheckpointMeta) -> Progress:
    """Progress that a checkpoint stands for."""
    return Progress(meta.step, meta.samples, meta.stage, meta.data_state)

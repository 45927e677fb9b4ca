"""The trainer: runs stages and steps, saves checkpoints when due, rolls back when a step went wrong.

Logs, sample images, evaluation and checks are callbacks.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.manager import CheckpointManager, SaveResult
from deco_scale.distributed.collectives import gather_objects
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError, RunError, Stopped
from deco_scale.models.compile import drop_graphs
from deco_scale.parallel.engines.base import Engine
from deco_scale.training.anomalies import AnomalyDetector, RollbackRequested
from deco_scale.training.callbacks import Callback
from deco_scale.training.config import FaultsConfig, RunSettings, StageConfig
from deco_scale.training.inputs import NOT_ENCODED, Batch, EncoderOutputs, InputBuilder, pinned, split
from deco_scale.training.metrics import MetricsCollector, RankComputeTimer, memory_bytes
from deco_scale.training.prefetch import EncoderPrefetcher, HostPrefetcher
from deco_scale.training.train_step import StepResult, train_step
from deco_scale.watchdog.client import NoWatchdog, Watchdog

logger = logging.getLogger(__name__)


class Data(Protocol):
    """Batches of one rank for one stage."""

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened to the data on this rank so far, by name."""

    def state(self, samples: int) -> dict[str, Any]:
        """Where the data stand after ``samples`` samples of the run, the same on every rank."""

    def __iter__(self) -> Iterator[Any]:
        """Batches, with the fields of :class:`Batch`."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: updates attempted, samples seen, their stage, and the state of the data after them."""

    step: int = 0
    samples: int = 0
    stage: str = ""
    data_state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with what is derived from it: accumulation steps and FLOPs of one training image.

    ``start`` counts the run's steps before it.
    """

    cfg: StageConfig
    accumulation: int
    image_flops: float
    start: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` of the run, counted from 1."""
        return self.cfg.lr_at(step - self.start)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A run, put together by :func:`launcher.build.trainer.build_trainer`.

    ``open_data`` opens a stage's data from a number of samples on; ``peak_flops`` is the sum over ranks (None:
    unknown); ``hosts`` are the ranks' nodes; ``config`` is stored in checkpoints. Callbacks are called in order.
    """

    settings: RunSettings
    stages: Sequence[Stage]
    engine: Engine
    build_inputs: InputBuilder
    open_data: Callable[[StageConfig, int], Data]
    checkpoints: CheckpointManager
    device: torch.device
    config: dict[str, Any]
    peak_flops: float | None = None
    callbacks: Sequence[Callback] = ()
    encoder_prefetcher: EncoderPrefetcher | None = None
    stop: StopRequest | None = None
    faults: FaultsConfig = FaultsConfig()
    heartbeat: Watchdog = field(default_factory=NoWatchdog)
    hosts: Sequence[str] = ("localhost",)
    rank_compute: RankComputeTimer | None = None

    @property
    def last_step(self) -> int:
        """The step at which this launch ends."""
        total = sum(stage.cfg.steps for stage in self.stages)
        return min(self.settings.stop_at_step or total, total)

    @property
    def stopped(self) -> str | None:
        """Name of the signal that ended the run early."""
        return self.stop.signal_name if self.stop is not None else None

    def fit(self, resume: str = "auto") -> Progress:
        """Resume as ``--resume`` says, or start anew, and train to the end or to ``run.stop_at_step``.

        Raises :class:`Stopped` after a signal and a checkpoint, :class:`ConfigError` for a checkpoint that does
        not fit, :class:`RunError` if training cannot continue.
        """
        try:
            self._call("on_fit_start")
            progress = self._restore(resume)
            self._call("on_train_start")
            progress = self.train(progress)
            self._call("on_train_end")
        except BaseException as error:
            self._call("on_exception", error)
            raise
        if self.stopped is not None:
            raise Stopped(f"stopped by {self.stopped}")
        return progress

    def train(self, progress: Progress) -> Progress:
        """Train from ``progress``; roll back and continue if the policy on bad steps requires it."""
        self.checkpoints.reserve(self.engine)
        rollbacks = 0
        try:
            while True:
                try:
                    return self._run_stages(progress)
                except RollbackRequested as request:
                    rollbacks += 1
                    if rollbacks > self.faults.max_rollbacks:
                        raise RunError(
                            f"{request}; the run was rolled back {self.faults.max_rollbacks} times already "
                            "(faults.max_rollbacks): lower the learning rate, or check the data"
                        ) from None
                    progress = self._roll_back(request)
        finally:
            # Also after an error: a save that is still being written is worth the wait.
            self._saved(self.checkpoints.finished(wait=True))

    def dry_run(self) -> None:
        """Log the outcome of one step of the first stage, and each rank's peak memory."""
        stage = self.stages[0]
        result = self.step(stage, next(iter(self.open_data(stage.cfg, 0))), lr=stage.lr_at(1))
        told = "dry run: one step of stage %s on synthetic data, loss %.4f, gradient norm %.4f"
        logger.info(told, stage.cfg.name, result.losses["loss"].item(), result.grad_norm.item())
        for rank, peak in enumerate(gather_objects(memory_bytes(self.device))):
            logger.info("rank %d: %.2f GiB at its peak", rank, peak / 2**30)

    def step(
        self,
        stage: Stage,
        batch: Batch,
        encoded: Sequence[EncoderOutputs] | None = None,
        anomalies: AnomalyDetector | None = None,
        *,
        lr: float,
    ) -> StepResult:
        """One update on this rank's share of a global batch; ``encoded`` is what is already, by micro-batch."""
        micro_batches = split(batch, stage.accumulation)
        shift = stage.cfg.timestep_shift
        outputs = encoded or [NOT_ENCODED] * stage.accumulation
        return train_step(
            self.engine,
            (self.build_inputs(micro, shift, each) for micro, each in zip(micro_batches, outputs, strict=True)),
            num_micro_batches=stage.accumulation,
            lr=lr,
            betas=stage.cfg.betas,
            should_skip=anomalies.should_skip if anomalies is not None else None,
        )

    def emit(self, kind: str, **fields: Any) -> None:
        """Record an event."""
        self._call("on_event", kind, fields)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def _restore(self, resume: str) -> Progress:
        """Weights and progress of a checkpoint, the weights of ``checkpoint.init_from``, or a fresh start."""
        loaded = self.checkpoints.resume(self.engine, resume)
        if loaded is None:
            self.checkpoints.initialise(self.engine)
            return Progress()
        meta, path = loaded
        # The weights fit whatever the network predicts, so nothing else would notice.
        stored = meta.config.get("objective", {}).get("prediction", "velocity")
        prediction = self.build_inputs.objective.prediction
        if meta.seed != self.settings.seed:
            raise ConfigError(
                f"{path} was trained with run.seed={meta.seed}, not {self.settings.seed}: another seed would give "
                "other samples and noise; set it back, or start anew in another run.dir"
            )
        if stored != prediction:
            raise ConfigError(
                f"{path} was trained with objective.prediction={stored}, not {prediction}: set it back, or start "
                "anew in another run.dir"
            )
        logger.info("resumed from %s: step %d, %d samples seen", path, meta.step, meta.samples)
        return Progress(meta.step, meta.samples, meta.stage, meta.data_state)

    def _roll_back(self, request: RollbackRequested) -> Progress:
        """Load the checkpoint that the policy requires; the data continue after what was trained on."""
        self.heartbeat.beat(request.at_step, "long_op")
        self._saved(self.checkpoints.finished(wait=True))
        meta = self.checkpoints.rollback(self.engine, max_step=request.step - self.faults.rollback_steps)
        self.emit("rollback", step=request.at_step, to_step=meta.step)
        told = "%s: rolled back from step %d to %d; %d samples are skipped"
        logger.warning(told, request, request.at_step, meta.step, request.samples - meta.samples)
        # Of no stage, since its data no longer stand where its count of steps says.
        return Progress(meta.step, request.samples)

    def _run_stages(self, progress: Progress) -> Progress:
        end = 0
        for stage in self.stages:
            end += stage.cfg.steps
            if progress.step >= min(end, self.last_step):
                continue
            batch = f"global batch {stage.cfg.global_batch} (accumulation {stage.accumulation})"
            schedule = stage.cfg.lr_schedule
            warmup = f" after {schedule.warmup_steps} warmup steps" if schedule.warmup_steps else ""
            rate = f"learning rate {stage.cfg.peak_lr:.4g} ({schedule.kind}{warmup})"
            logger.info(
                "stage %s: %d px, to step %d, %s, %s", stage.cfg.name, stage.cfg.resolution, end, batch, rate
            )
            progress = self._run_stage(stage, progress, min(end, self.last_step))
            # Compiled for the shapes of this stage.
            drop_graphs()
            if self.stopped is not None:
                logger.info("stopped by %s after step %d", self.stopped, progress.step)
                break
        return progress

    def _run_stage(self, stage: Stage, progress: Progress, end: int) -> Progress:
        self.heartbeat.beat(progress.step, "start")
        data = self.open_data(stage.cfg, progress.samples)
        state = data.state(progress.samples)
        if progress.stage == stage.cfg.name and progress.data_state != state:
            effect = "from here on training sees other samples than without the interruption"
            was = progress.data_state
            logger.warning("the data differ from those of the checkpoint (%s, was %s): %s", state, was, effect)
        pin = partial(pinned, null_shape=self.build_inputs.null.shape) if self.device.type == "cuda" else None
        prefetcher = HostPrefetcher(iter(data), depth=2, prepare=pin)
        batches: Iterator[tuple[Batch, Sequence[EncoderOutputs] | None]] = ((batch, None) for batch in prefetcher)
        if self.encoder_prefetcher is not None:
            count = end - progress.step
            batches = self.encoder_prefetcher.iterate(prefetcher, accumulation=stage.accumulation, count=count)
        anomalies = AnomalyDetector(self.faults, max_bad_steps=self.settings.max_bad_steps, device=self.device)
        metrics = MetricsCollector(self, stage, progress.step)
        first = progress.step + 1
        try:
            while progress.step < end and self.stopped is None:
                step = progress.step + 1
                logged = step % self.settings.log_every == 0 or step == end
                with metrics.excluded():
                    self._call("on_step_start", step)
                self.heartbeat.beat(step, "start" if step == first else "step")
                start = time.perf_counter()
                batch, encoded = next(batches)
                metrics.data_wait(time.perf_counter() - start)
                if logged and self.rank_compute is not None:
                    self.rank_compute.start()
                result = self.step(stage, batch, encoded, anomalies, lr=stage.lr_at(step))
                samples = progress.samples + stage.cfg.global_batch
                progress = Progress(step, samples, stage.cfg.name, data.state(samples))
                anomalies.add(step, loss=result.losses["loss"], skipped=result.skipped)
                if step == first:
                    self.emit("first_step", step=step, seconds=time.perf_counter() - start)
                if self.stop is not None and self.stop.poll():
                    self.emit("stop_signal", signal=self.stop.signal_name)
                found = anomalies.read(everything=logged or self.stopped is not None)
                for anomaly in found:
                    self.emit(anomaly.kind, step=anomaly.step, **anomaly.details)
                if logged:
                    self._log(*metrics.read(result, progress, anomalies.skipped, data.counters))
                anomalies.apply_policy(found, progress.step, progress.samples)
                self._call("on_update_end", step)
                with metrics.excluded():
                    self._call("on_step_end", step)
                    self._save(stage, progress, end=end)
        finally:
            self.heartbeat.beat(progress.step, "long_op")
            # The workers first: their end wakes a prefetcher that waits for them.
            data.close()
            prefetcher.close()
        return progress

    def _log(self, values: dict[str, Any], stragglers: Mapping[int, float]) -> None:
        """Report a logged step's metrics, and new stragglers with their factors."""
        for rank, factor in stragglers.items():
            host = self.hosts[rank]
            self.emit("straggler", rank=rank, host=host, factor=factor, step=values["step"])
            logger.warning("rank %d on %s is slow: %.1f times the median rank's own work", rank, host, factor)
        stall_s = self.checkpoints.take_stall()
        if stall_s is not None:
            values["checkpoint_stall_s"] = stall_s
        self._call("on_log", values)
        self.checkpoints.observe(values)

    def _save(self, stage: Stage, progress: Progress, *, end: int) -> None:
        """Report a save that has ended, and start one if it is due; the last of a run must succeed."""
        step = progress.step
        last = step == self.last_step or self.stopped is not None
        checkpoint = self.checkpoints.due(step) or step == end or last
        export = self.checkpoints.export_due(step)
        if not checkpoint and not export:
            self._saved(self.checkpoints.finished())
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
        self._saved(self.checkpoints.start(self.engine, meta, checkpoint=checkpoint, export=export))
        if last:
            self._saved(self.checkpoints.finished(wait=True), must_succeed=True)

    def _saved(self, result: SaveResult | None, *, must_succeed: bool = False) -> None:
        if result is None:
            return
        self._call("on_save", result)
        if result.error is None:
            logger.info(result.message)
        elif must_succeed:
            raise RunError(result.error)
        else:
            # Training is worth more than one checkpoint: the previous one is untouched.
            logger.warning("%s; training continues", result.error)

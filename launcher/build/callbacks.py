"""Callbacks of a run: logs, the resolved configuration, replica checks, sample images, evaluation."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import DataError
from deco_scale.checkpoint.manager import SaveResult
from deco_scale.config import RunConfig, dump_config
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.distributed.replica_check import ReplicaCheck
from deco_scale.errors import ConfigError, ReplicaMismatchError, RunError
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.evaluation.in_training import (
    EvaluationResult,
    Scorer,
    evaluate_share,
    evaluation_requests,
    generate_share,
)
from deco_scale.observability.events import REQUEUE
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.sampling import ImageGenerator, SampleRequest
from deco_scale.sampling.config import SampleImagesConfig
from deco_scale.sampling.images import save_grid
from deco_scale.training.callbacks import Callback
from deco_scale.training.trainer import Trainer

logger = logging.getLogger(__name__)

GeneratorAt = Callable[[int], ImageGenerator]
"""A generator over the model in training at a step; it uses the weights of the moment."""


class LogRun(Callback):
    """Metrics, events and the run's end go to the run's folder and to what else a :class:`RunLogger` feeds."""

    def __init__(self, run_logger: RunLogger, attempt: Mapping[str, Any]) -> None:
        self._log, self._attempt = run_logger, attempt

    def on_fit_start(self, trainer: Trainer) -> None:
        self._log.start(**self._attempt)

    def on_log(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        self._log.metrics(dict(metrics))

    def on_event(self, trainer: Trainer, kind: str, fields: Mapping[str, Any]) -> None:
        self._log.event(kind, **fields)

    def on_save(self, trainer: Trainer, result: SaveResult) -> None:
        times = {"step": result.step, "stall_s": result.stall_s, "total_s": result.total_s}
        if result.error is not None:
            self._log.event("checkpoint_failed", **times, reason=result.error)
        else:
            self._log.event("checkpoint" if result.checkpoint else "export", **times)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        # Any other error is a bug or a lost rank; the watchdog finds out which and records the end.
        if isinstance(error, ConfigError | RunError | DataError):
            self._log.event("end", reason=str(error), exit_code=getattr(error, "exit_code", 1))

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.stopped is not None:
            self._log.event("end", reason=f"stopped by {trainer.stopped}", exit_code=REQUEUE)
        else:
            self._log.event("end", reason="done", exit_code=0)


class SaveConfig(Callback):
    """Writes the resolved ``config.yaml`` of a run that is about to train; rank 0 only."""

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg

    def on_train_start(self, trainer: Trainer) -> None:
        if dist.get_rank() == 0:
            (Path(self._cfg.run.dir) / "config.yaml").write_text(dump_config(self._cfg), encoding="utf-8")


class CheckReplicas(Callback):
    """Compares replicated tensors bit by bit; see :mod:`deco_scale.distributed.replica_check`."""

    def __init__(self, every: int, hosts: Sequence[str]) -> None:
        self._check = ReplicaCheck(every, hosts)

    def on_update_end(self, trainer: Trainer, step: int) -> None:
        try:
            self._check.check(trainer.engine, step)
        except ReplicaMismatchError as error:
            for mismatch in error.mismatches:
                trainer.emit(
                    "corruption",
                    rank=mismatch.rank,
                    host=trainer.hosts[mismatch.rank],
                    tensors=mismatch.count,
                    first=mismatch.first,
                )
            raise


class SampleImages(Callback):
    """Generates images of the configured prompts or classes with the EMA weights; ``samples/step_*.png``."""

    def __init__(
        self,
        cfg: SampleImagesConfig,
        *,
        generator_at: GeneratorAt,
        resolution_at: Callable[[int], int],
        dims: ParallelDims,
        folder: Path,
        run_logger: RunLogger,
    ) -> None:
        self._cfg, self._generator_at, self._resolution_at = cfg, generator_at, resolution_at
        self._dims, self._folder, self._log = dims, folder, run_logger
        self._conditions: list[str | int] = [*cfg.prompts, *cfg.classes]

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if not self._cfg.every or step % self._cfg.every:
            return
        trainer.heartbeat.beat(step, "long_op")
        start = time.perf_counter()
        side, conditions = self._resolution_at(step), self._conditions
        # Ranks of a tp group draw the same images together. Sharded weights need every rank in every forward
        # pass: all draw equally many, some of them twice.
        rank, world = self._dims.dp_rank(dist.get_rank()), self._dims.dp
        share = -(-len(conditions) // world)
        mine = [SampleRequest(conditions[(rank * share + i) % len(conditions)]) for i in range(share)]
        generator = self._generator_at(step)
        with trainer.engine.ema_weights():
            drawn = generator.images(mine, size=(side, side), sampler=self._cfg.sampler, batch=share)
            images = np.stack([pixels for _, pixels in drawn])
        parts = gather_objects(images)
        path = self._folder / f"step_{step:08d}.png"

        def write() -> None:
            if dist.get_rank() != 0:
                return
            every = np.concatenate(parts[:: self._dims.tp])[: len(conditions)]
            columns, labels = min(5, len(conditions)), [str(c) for c in conditions]
            try:
                save_grid(every, path, columns=columns, labels=labels, scale=max(1, 96 // side))
            except OSError as error:
                raise RunError(f"{path}: {error.strerror}") from error

        raise_together(write)
        trainer.emit("evaluation", step=step, seconds=time.perf_counter() - start)
        self._log.image("samples", path, step)


class Evaluate(Callback):
    """Evaluates the EMA weights on all ranks; scores go to ``metrics.jsonl`` and wandb.

    Nothing of the training's state is touched: the data stay where they are, and noise has generators of its own.
    Raises :class:`ConfigError` at once where a scorer's files are missing.
    """

    def __init__(
        self,
        cfg: EvaluationConfig,
        *,
        num_classes: int,
        generator_at: GeneratorAt,
        resolution_at: Callable[[int], int],
        dims: ParallelDims,
        folder: Path,
        run_logger: RunLogger,
        device: torch.device,
    ) -> None:
        self._cfg, self._generator_at, self._resolution_at = cfg, generator_at, resolution_at
        self._dims, self._folder, self._log = dims, folder, run_logger
        if not cfg.every:
            return
        self._requests = raise_together(lambda: evaluation_requests(cfg, num_classes=num_classes))
        self._scorer = raise_together(lambda: Scorer(cfg, device))
        if self._scorer.published_weights is False:
            logger.warning("evaluation.inception_weights is not the published file: its FID is not comparable")

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if not self._cfg.every or step % self._cfg.every:
            return
        trainer.heartbeat.beat(step, "long_op")
        start = time.perf_counter()
        side, rank = self._resolution_at(step), dist.get_rank()
        generator = self._generator_at(step)

        def generate(mine: Sequence[SampleRequest]) -> Iterator[tuple[SampleRequest, Any]]:
            return generator.images(mine, size=(side, side), sampler=self._cfg.sampler, batch=self._cfg.batch)

        with trainer.engine.ema_weights():
            share = generate_share(generate, self._requests, rank=self._dims.dp_rank(rank), world=self._dims.dp)

        def score() -> EvaluationResult:
            return evaluate_share(
                self._cfg,
                # Ranks of a tp group drew the same images; one of them answers for them.
                share if rank % self._dims.tp == 0 else [],
                self._scorer,
                rank=rank,
                folder=self._folder,
                step=step,
                all_reduce=_summed,
                gather=gather_objects,
            )

        result = raise_together(score)
        trainer.emit("evaluation", step=step, seconds=time.perf_counter() - start)
        self._log.evaluation(step, result.scalars)
        if result.grid is not None:
            self._log.image("evaluation", result.grid, step)
        if result.npz is not None:
            logger.info("evaluation: %s", result.npz)


def _summed(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values

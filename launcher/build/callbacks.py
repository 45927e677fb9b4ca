"""Callbacks of a run: garbage collection, logs, configuration, replica checks, sample images, evaluation."""

import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import DataError
from deco_scale.checkpoint.manager import SaveResult
from deco_scale.config import RunConfig, dump_config
from deco_scale.distributed.collectives import gather_objects, raise_together, run_on_rank_zero
from deco_scale.distributed.replica_check import check_replicas
from deco_scale.errors import ConfigError, ReplicaMismatchError, RunError
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.evaluation.in_training import (
    EvaluationImage,
    EvaluationResult,
    Scorer,
    evaluate_share,
    evaluation_requests,
)
from deco_scale.observability.events import REQUEUE
from deco_scale.observability.run_logger import RunLogger
from deco_scale.sampling import SampleRequest
from deco_scale.sampling.config import SampleImagesConfig, SamplerConfig
from deco_scale.sampling.images import save_grid
from deco_scale.training.callbacks import Callback
from deco_scale.training.trainer import Trainer

logger = logging.getLogger(__name__)

DrawShare = Callable[[int, Sequence[SampleRequest], SamplerConfig, int], tuple[Sequence[EvaluationImage], int]]
"""Draws with the EMA weights at a step: this rank's share of the requests' images, and their side in pixels."""


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
        stopped = trainer.stopped
        reason, code = ("done", 0) if stopped is None else (f"stopped by {stopped}", REQUEUE)
        self._log.event("end", reason=reason, exit_code=code)


class CollectGarbage(Callback):
    """Runs Python's garbage collector between steps, on all ranks at the same ones (``every`` 0: not at all).

    Otherwise each rank collects when its own counters say so, and in a synchronous step all wait for it. What
    set-up and the first step have made stays for the whole run and is exempt. Most collections look at young
    objects, every tenth at all.
    """

    _FULL = 10

    def __init__(self, every: int) -> None:
        self._every = every
        self._controls = self._frozen = False

    def on_train_start(self, trainer: Trainer) -> None:
        if self._every and gc.isenabled():
            gc.disable()
            self._controls = True

    def on_update_end(self, trainer: Trainer, step: int) -> None:
        if not self._controls:
            return
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True
        elif step % self._every == 0:
            gc.collect(2 if step % (self._FULL * self._every) == 0 else 1)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self._restore()

    def on_train_end(self, trainer: Trainer) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._controls:
            gc.unfreeze()
            gc.enable()
            self._controls = False


class SaveConfig(Callback):
    """Writes the resolved ``config.yaml`` of a run that is about to train; rank 0 only."""

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg

    def on_train_start(self, trainer: Trainer) -> None:
        if dist.get_rank() == 0:
            (Path(self._cfg.run.dir) / "config.yaml").write_text(dump_config(self._cfg), encoding="utf-8")


class CheckReplicas(Callback):
    """Compares replicated tensors bit by bit; see :mod:`deco_scale.distributed.replica_check`."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._last_good: int | None = None

    def on_update_end(self, trainer: Trainer, step: int) -> None:
        if not self._every or step % self._every:
            return
        try:
            check_replicas(trainer.engine.replicas(), step, trainer.hosts, self._last_good)
            self._last_good = step
        except ReplicaMismatchError as error:
            for bad in error.mismatches:
                where = {"rank": bad.rank, "host": trainer.hosts[bad.rank]}
                trainer.emit("corruption", **where, tensors=bad.count, first=bad.first)
            raise


class _UseImages(Callback, ABC):
    """Every ``cfg.every`` steps :meth:`use` gets this rank's share of the images of ``requests``."""

    def __init__(
        self,
        cfg: SampleImagesConfig | EvaluationConfig,
        draw: DrawShare,
        run_logger: RunLogger,
        requests: Sequence[SampleRequest],
    ) -> None:
        self._every, self._sampler, self._requests = cfg.every, cfg.sampler, requests
        self._batch = cfg.batch if isinstance(cfg, EvaluationConfig) else len(requests)
        self._draw, self._log = draw, run_logger

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        if not self._every or step % self._every:
            return
        trainer.heartbeat.beat(step, "long_op")
        start = time.perf_counter()
        share, side = self._draw(step, self._requests, self._sampler, self._batch)
        self.use(share, side, step)
        trainer.emit("evaluation", step=step, seconds=time.perf_counter() - start)

    @abstractmethod
    def use(self, share: Sequence[EvaluationImage], side: int, step: int) -> None:
        """On all ranks together; ``side`` is that of the images in pixels."""


class SampleImages(_UseImages):
    """Generates images of the configured prompts or classes with the EMA weights; ``samples/step_*.png``."""

    def __init__(self, cfg: SampleImagesConfig, draw: DrawShare, run_logger: RunLogger, run_dir: Path) -> None:
        conditions: list[str | int] = [*cfg.prompts, *cfg.classes]
        super().__init__(cfg, draw, run_logger, [SampleRequest(each) for each in conditions])
        self._folder = run_dir / "samples"

    def use(self, share: Sequence[EvaluationImage], side: int, step: int) -> None:
        drawn = sorted((image for part in gather_objects(share) for image in part), key=lambda each: each.number)
        path = self._folder / f"step_{step:08d}.png"
        pixels, labels = [each.pixels for each in drawn], [str(each.request.condition) for each in drawn]
        run_on_rank_zero(lambda: save_grid(pixels, path, labels=labels, columns=5))
        self._log.image("samples", path, step)


class Evaluate(_UseImages):
    """Evaluates the EMA weights on all ranks; scores go to ``metrics.jsonl`` and wandb.

    Nothing of the training's state is touched: the data stay where they are, and noise has generators of its own.
    Raises :class:`ConfigError` at once where a scorer's files are missing.
    """

    def __init__(self, cfg: RunConfig, draw: DrawShare, run_logger: RunLogger, device: torch.device) -> None:
        self._cfg, self._folder = cfg.evaluation, Path(cfg.run.dir) / "evaluation"
        requests: Sequence[SampleRequest] = []
        if self._cfg.every:
            num_classes = 0 if cfg.model.kind == "t2i_deco" else cfg.model.num_classes
            requests = raise_together(lambda: evaluation_requests(self._cfg, num_classes=num_classes))
            self._scorer = raise_together(lambda: Scorer(self._cfg, device))
            if self._scorer.published_weights is False:
                logger.warning("evaluation.inception_weights is not the published file: its FID is not comparable")
        super().__init__(self._cfg, draw, run_logger, requests)

    def use(self, share: Sequence[EvaluationImage], side: int, step: int) -> None:
        def score() -> EvaluationResult:
            return evaluate_share(
                self._cfg,
                share,
                self._scorer,
                rank=dist.get_rank(),
                folder=self._folder,
                step=step,
                all_reduce=_summed,
                gather=gather_objects,
            )

        result = raise_together(score)
        self._log.evaluation(step, result.scalars)
        if result.grid is not None:
            self._log.image("evaluation", result.grid, step)
        if result.npz is not None:
            logger.info("evaluation: %s", result.npz)


def _summed(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values

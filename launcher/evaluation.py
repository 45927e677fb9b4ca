"""Evaluation while training: EMA weights, all ranks, scores to ``metrics.jsonl`` and wandb, a sheet to look at."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.evaluation.in_training import Report, Scorer, draw_share, evaluate_share, evaluation_jobs
from deco_scale.models.encoders import TextEncoder
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.sampling import SampleRequest
from launcher.pictures import engine_generator, stage_at


def evaluator(
    cfg: RunConfig,
    layout: ParallelDims,
    engine: Engine,
    text: TextEncoder | None,
    folder: Path,
    reporter: RunLogger,
    device: torch.device,
) -> Callable[[int], None]:
    """After-step callback that evaluates where it is time; raises :class:`ConfigError` for missing judges now.

    Nothing of the training's state is touched: the data stay where they are, and noise has generators of its own.
    """
    settings = cfg.evaluation
    if not settings.every:
        return lambda step: None
    num_classes = 0 if cfg.model.kind == "t2i_deco" else cfg.model.num_classes
    jobs = raise_together(lambda: evaluation_jobs(settings, num_classes=num_classes))
    scorer = raise_together(lambda: Scorer(settings, device))
    if scorer.published_weights is False:
        reporter.say("WARNING: evaluation.inception_weights is not the published file: FID compares with no other")
    dp_rank, speaks = layout.dp_rank(dist.get_rank()), dist.get_rank() % layout.tp == 0

    def evaluate(step: int) -> None:
        if step % settings.every:
            return
        began = time.perf_counter()
        side = stage_at(cfg, step).resolution
        generator = engine_generator(cfg, engine, text, device, step=step)

        def draw(mine: Sequence[SampleRequest]) -> Iterator[tuple[SampleRequest, Any]]:
            return generator.pictures(mine, size=(side, side), sampler=settings.sampler, batch=settings.batch)

        with engine.averaged():
            share = draw_share(draw, jobs, rank=dp_rank, world=layout.dp)

        def judge() -> Report:
            return evaluate_share(
                # Ranks of a tp group drew the same pictures; one of them answers for them.
                settings,
                share if speaks else [],
                scorer,
                rank=dist.get_rank(),
                folder=folder,
                step=step,
                total=_total,
                gather=gather_objects,
            )

        report = raise_together(judge)
        reporter.event("evaluation", step=step, seconds=time.perf_counter() - began)
        reporter.evaluation(step, report.scalars)
        if report.sheet is not None:
            reporter.picture("evaluation", report.sheet, step)
        if report.npz is not None:
            reporter.say(f"evaluation: {report.npz}")

    return evaluate


def _total(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values

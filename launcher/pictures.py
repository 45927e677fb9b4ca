"""Pictures by the model in training, with the same generator that draws after it."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.errors import RunError
from deco_scale.models.encoders import TextEncoder
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.sampling import Generator, SampleRequest
from deco_scale.sampling.images import save_grid, velocity_of
from deco_scale.training.config import StageConfig


def engine_generator(
    cfg: RunConfig, engine: Engine, text: TextEncoder | None, device: torch.device, *, step: int = 0
) -> Generator:
    """A generator over an engine's model; with sharded weights all ranks draw equally many pictures together.

    It draws with the weights of the moment: within ``engine.averaged()`` those are the EMA's.
    """
    velocity = velocity_of(
        engine.predict, cfg.model.patch_size, prediction=cfg.objective.prediction, t_eps=cfg.objective.t_eps
    )
    return Generator(
        velocity,
        cfg.model,
        encode=text.encode if text is not None else None,
        null=text.null if text is not None else torch.tensor(cfg.model.num_classes),
        device=device,
        step=step,
    )


def picture_maker(
    cfg: RunConfig,
    layout: ParallelDims,
    engine: Engine,
    text: TextEncoder | None,
    folder: Path,
    reporter: RunLogger,
    device: torch.device,
) -> Callable[[int], None]:
    """After-step callback that draws the configured prompts or classes with the EMA weights."""
    if not cfg.samples.every:
        return lambda step: None
    conditions: list[str | int] = [*cfg.samples.prompts, *cfg.samples.classes]
    # Ranks of a tp group draw the same pictures together.
    rank, world = layout.dp_rank(dist.get_rank()), layout.dp
    # Sharded weights need every rank in every forward pass: all draw equally many, some in vain.
    share = -(-len(conditions) // world)
    mine = [SampleRequest(conditions[(rank * share + i) % len(conditions)]) for i in range(share)]

    def draw(step: int) -> None:
        if step % cfg.samples.every:
            return
        began = time.perf_counter()
        side = stage_at(cfg, step).resolution
        generator = engine_generator(cfg, engine, text, device, step=step)
        with engine.averaged():
            drawn = generator.pictures(mine, size=(side, side), sampler=cfg.samples.sampler, batch=share)
            pictures = np.stack([pixels for _, pixels in drawn])
        parts = gather_objects(pictures)
        path = folder / f"step_{step:08d}.png"

        def write() -> None:
            if dist.get_rank() != 0:
                return
            every = np.concatenate(parts[:: layout.tp])[: len(conditions)]
            columns, labels = min(5, len(conditions)), [str(c) for c in conditions]
            try:
                save_grid(every, path, columns=columns, labels=labels, scale=max(1, 96 // side))
            except OSError as error:
                raise RunError(f"{path}: {error.strerror}") from error

        raise_together(write)
        if dist.get_rank() == 0:
            reporter.event("evaluation", step=step, seconds=time.perf_counter() - began)
            reporter.picture("samples", path, step)

    return draw


def stage_at(cfg: RunConfig, step: int) -> StageConfig:
    """The stage that step ``step`` (counted from 1) belongs to."""
    end = 0
    for stage in cfg.stages:
        end += stage.steps
        if step <= end:
            return stage
    return cfg.stages[-1]

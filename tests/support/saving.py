"""Checkpoints of known content, saved and read by this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.errors import RunError
from deco_scale.parallel.engines.base import Engine
from tests.support.crash import PlainEngine, content, join_alone


@contextmanager
def alone() -> Iterator[None]:
    """A gloo group of this process alone."""
    join_alone()
    try:
        yield
    finally:
        dist.destroy_process_group()


def engine_of(step: int) -> Engine:
    """With the known content of a step."""
    made = PlainEngine(content(step))
    made.optimizer_steps = step
    return cast(Engine, made)


def save(checkpoints: CheckpointManager, engine: Engine, meta: CheckpointMeta) -> Any:
    """Save and wait for it; the new checkpoint's path. Raises :class:`RunError` for an error of any save."""
    for result in (checkpoints.start(engine, meta), checkpoints.finished(wait=True)):
        if result is not None and result.error is not None:
            raise RunError(result.error)
    return dict(checkpoints.complete())[meta.step]


def newest(checkpoints: CheckpointManager) -> Any:
    """The path of the newest complete checkpoint, None without any."""
    return next((path for _, path in checkpoints.complete()), None)


def make(folder: Path, **settings: Any) -> CheckpointManager:
    """Prepared in ``folder / "run"``, with a save at every step unless ``settings`` say otherwise."""
    made = CheckpointManager(folder / "run", CheckpointConfig(**{"every": 1, **settings}))
    made.prepare()
    return made

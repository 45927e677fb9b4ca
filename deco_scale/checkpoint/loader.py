"""Loading a checkpoint: strictly when a run resumes, selectively when a run starts from other weights."""

import dataclasses
import fnmatch
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import (
    CheckpointMeta,
    Reader,
    check_shapes,
    read_meta,
    shared_lock,
    stored_shapes,
    verify,
)
from deco_scale.checkpoint.staging import local_part
from deco_scale.checkpoint.storage import READING, ObjectFetcher
from deco_scale.distributed.collectives import raise_together
from deco_scale.errors import ConfigError, RunError
from deco_scale.parallel.engines.base import EMA_PREFIX, Engine
from deco_scale.precision.fp8 import unmatched_scaling

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A complete checkpoint whose index and meta are local; ``fetch`` makes any other file so, verified."""

    name: str
    folder: Path
    fetch: Callable[[str], None]


@contextmanager
def open_checkpoint(path: Path | str, scratch: Path) -> Iterator[OpenCheckpoint]:
    """Open a folder, or a URL through ``scratch``, which is emptied at the end. All ranks together.

    All files of a folder are verified, each by one rank. From a URL each rank fetches and verifies only what it
    reads. Raises :class:`ConfigError` for what is missing or damaged, naming the file.
    """
    if isinstance(path, Path):
        raise_together(lambda: read_meta(path))
        with shared_lock(path):
            raise_together(lambda: verify(path, rank=dist.get_rank(), world=dist.get_world_size()))
            yield OpenCheckpoint(str(path), path, lambda name: None)
        return
    folder = scratch / f"{READING}{path.rstrip('/').rpartition('/')[2]}"
    try:
        fetcher = raise_together(lambda: ObjectFetcher(path, folder))
        yield OpenCheckpoint(path, folder, fetcher.fetch)
        # Ranks of a node share the folder.
        dist.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(engine: Engine, source: OpenCheckpoint) -> CheckpointMeta:
    """Fill the engine with the full state; raises :class:`ConfigError` for a checkpoint that does not fit."""
    meta = raise_together(lambda: read_meta(source.folder))
    state = engine.state()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def check() -> tuple[set[str], list[str]]:
        actual = stored_shapes(source.folder)
        # FP8 scaling is not part of the model.
        unmatched, lines = unmatched_scaling(actual, expected)
        actual, required = ({n: s for n, s in each.items() if n not in unmatched} for each in (actual, expected))
        check_shapes(actual, required, where=f"{source.name} does not fit the configured model")
        return unmatched, lines

    unmatched, lines = raise_together(check)
    for line in lines:
        logger.info(line)
    state = {name: tensor for name, tensor in state.items() if name not in unmatched}
    _read(state, source)
    engine.load(state, meta.optimizer_steps)
    return meta


def initialise(engine: Engine, source: OpenCheckpoint, cfg: CheckpointConfig) -> None:
    """Load weights for a fresh run: EMA equal to them, moments zero, no updates counted.

    With ``init_weights: ema``, parameters without an EMA (the REPA head) come from the weights. Parameters that
    match ``init_skip`` keep their initial values. All others must be there in the right shape.
    """
    state = engine.state()
    available = raise_together(lambda: stored_shapes(source.folder))
    kinds = {name: cfg.init_weights if name.startswith(EMA_PREFIX) else "model" for name in _names(state)}
    stored = set(_names(available))
    skipped = {n for n in set(kinds) | stored if _matches(n, cfg.init_skip)}
    origin = {f"{kind}.{name}": f"model.{name}" for name, kind in kinds.items() if name not in skipped}

    def check() -> None:
        unused = [p for p in cfg.init_skip if not any(_matches(n, (p,)) for n in skipped)]
        if unused:
            raise ConfigError(
                f"checkpoint.init_skip={unused[0]!r} matches no parameter of the model or of {source.name}"
            )
        expected = {there: tuple(state[here].shape) for there, here in origin.items()}
        unexpected = {f"model.{n}" for n in stored - set(kinds) - skipped}
        actual = {n: s for n, s in available.items() if n in expected or n in unexpected}
        check_shapes(actual, expected, where=f"{source.name} does not fit the configured model")

    raise_together(check)
    _read({there: state[here] for there, here in origin.items()}, source)
    for name in kinds:
        weights = local_part(state[f"model.{name}"])
        for kind in ("ema", "exp_avg", "exp_avg_sq"):
            if f"{kind}.{name}" in state:
                part = local_part(state[f"{kind}.{name}"])
                part.copy_(weights) if kind == "ema" else part.zero_()
    engine.load(state, 0)
    logger.info("weights from %s (%s), %d parameters; fresh optimizer", source.name, cfg.init_weights, len(origin))
    if skipped:
        logger.info("not loaded because of checkpoint.init_skip: %s", ", ".join(sorted(skipped)))


def _read(state: Mapping[str, Tensor], source: OpenCheckpoint) -> None:
    """Fill tensors in place, each rank its own parts, one stored piece at a time. All ranks together."""
    try:
        dcp.load(cast(dict[str, Any], dict(state)), storage_reader=Reader(source.folder, source.fetch))
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        prefix = f"rank {rank}: " if rank else ""
        if isinstance(failure, ConfigError | RunError):
            raise type(failure)(f"{prefix}{failure}") from error
        raise RunError(f"{prefix}{source.name} could not be read: {type(failure).__name__}: {failure}") from error


def _names(tensors: Mapping[str, Any]) -> list[str]:
    """Parameters by their plain names."""
    return [n.removeprefix("model.") for n in tensors if n.startswith("model.")]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

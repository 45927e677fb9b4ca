"""Loading: strict for a run that goes on, explicit for one that starts from another's weights."""

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

from deco_scale.checkpoint.async_save import first_failure
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import (
    META,
    METADATA,
    CheckpointMeta,
    Reader,
    check_fit,
    read_meta,
    shared_lock,
    stored_shapes,
    verify,
)
from deco_scale.checkpoint.staging import local_part
from deco_scale.checkpoint.storage import READING, ObjectFetcher, OpenObjects
from deco_scale.distributed.collectives import raise_together
from deco_scale.errors import ConfigError, RunError
from deco_scale.parallel.engines.base import EMA_PREFIX, Engine
from deco_scale.precision.scaling import unmatched_scaling

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A complete checkpoint whose index and meta are at hand; ``fetch`` brings any other file, checked."""

    name: str
    folder: Path
    fetch: Callable[[str], None]


@contextmanager
def open_checkpoint(
    where: Path | str, scratch: Path, open_objects: OpenObjects | None
) -> Iterator[OpenCheckpoint]:
    """Open a folder, or a URL by way of ``scratch``, which is emptied at the end. All ranks together.

    All files of a folder are verified, each by one rank. Of a URL each rank fetches what it reads and no more,
    and verifies it. Raises :class:`ConfigError` for what is missing or damaged, naming the file.
    """
    if isinstance(where, Path):
        with shared_lock(raise_together(lambda: _complete(where))):
            raise_together(lambda: verify(where, rank=dist.get_rank(), world=dist.get_world_size()))
            yield OpenCheckpoint(str(where), where, lambda name: None)
        return
    parent, _, name = where.rstrip("/").rpartition("/")
    folder = scratch / f"{READING}{name}"

    def start() -> ObjectFetcher:
        if open_objects is None:
            raise ConfigError(f"{where}: this program has no access to object stores")
        fetcher = ObjectFetcher(open_objects(parent), name, folder)
        fetcher.open([META, METADATA])
        return fetcher

    try:
        fetcher = raise_together(start)
        yield OpenCheckpoint(where, folder, fetcher.fetch)
        # Ranks of a node share the folder.
        dist.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(engine: Engine, source: OpenCheckpoint) -> CheckpointMeta:
    """Fill the engine with the whole state; raises :class:`ConfigError` for a checkpoint that does not fit."""
    meta = raise_together(lambda: read_meta(source.folder))
    state = engine.state()
    wanted = _shapes(state)

    def check() -> tuple[set[str], list[str]]:
        found = stored_shapes(source.folder)
        # Scaling of FP8 is no part of the model.
        apart, lines = unmatched_scaling(found, wanted)
        check_fit(source.name, *({n: s for n, s in each.items() if n not in apart} for each in (found, wanted)))
        return apart, lines

    apart, lines = raise_together(check)
    for line in lines:
        logger.info(line)
    state = {name: tensor for name, tensor in state.items() if name not in apart}
    _read(state, source)
    engine.load(state, meta.optimizer_steps)
    return meta


def initialise(engine: Engine, source: OpenCheckpoint, cfg: CheckpointConfig) -> None:
    """Take weights for a fresh run: EMA equal to them, moments zero, no updates counted.

    ``ema`` stands for the denoiser's average; what has none (the REPA head) comes from the weights. Parameters
    matching ``init_skip`` stay as they were initialised. Everything else must be there in the right shape.
    """
    state = engine.state()
    found = raise_together(lambda: stored_shapes(source.folder))
    kinds = {name: cfg.init_weights if name.startswith(EMA_PREFIX) else "model" for name in _names(state)}
    stored = {n for n in _names(found)}
    skipped = {n for n in set(kinds) | stored if _matches(n, cfg.init_skip)}
    origin = {f"{kind}.{name}": f"model.{name}" for name, kind in kinds.items() if name not in skipped}

    def check() -> None:
        idle = [p for p in cfg.init_skip if not any(_matches(n, (p,)) for n in skipped)]
        if idle:
            raise ConfigError(
                f"checkpoint.init_skip={idle[0]!r} matches no parameter of the model or of {source.name}"
            )
        wanted = {there: tuple(state[here].shape) for there, here in origin.items()}
        other = {f"model.{n}" for n in stored - set(kinds) - skipped}
        check_fit(source.name, {n: s for n, s in found.items() if n in wanted or n in other}, wanted)

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
        logger.info("not taken over by checkpoint.init_skip: %s", ", ".join(sorted(skipped)))


def _read(state: Mapping[str, Tensor], source: OpenCheckpoint) -> None:
    """Fill tensors in place, each rank its own parts, one stored piece at a time. All ranks together."""
    try:
        dcp.load(cast(dict[str, Any], dict(state)), storage_reader=Reader(source.folder, source.fetch))
    except CheckpointException as error:
        rank, failure = first_failure(error)
        where = f"rank {rank}: " if rank else ""
        kind = type(failure) if isinstance(failure, ConfigError) else RunError
        known = isinstance(failure, ConfigError | RunError)
        what = str(failure) if known else f"{source.name} could not be read: {type(failure).__name__}: {failure}"
        raise kind(where + what) from error


def _complete(where: Path) -> Path:
    read_meta(where)
    return where


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _names(tensors: Mapping[str, Any]) -> list[str]:
    """Parameters by their plain names."""
    return [n.removeprefix("model.") for n in tensors if n.startswith("model.")]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

"""Inputs of a run: frozen encoders, the loader of a stage, random images for a dry run."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.stream.loader import Batch, Loader
from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import raise_together
from deco_scale.errors import RunError
from deco_scale.models.config import is_on
from deco_scale.models.encoders import ImageEncoder, TextEncoder, load_text_encoder
from deco_scale.models.tp_plan import part_sizes
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.parallel.sequence_parallel import TokenShard, encode_shared
from deco_scale.training.config import StageConfig


def load_encoders(
    cfg: RunConfig, device: torch.device, *, need_text: bool
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """Frozen encoders that the configuration asks for, checked against the model.

    They are compiled for micro-batches; what else is encoded, such as prompts of samples, stays eager.
    """
    text = image = None
    batches = {size for stage in cfg.stages for size in part_sizes(stage.micro_batch, cfg.parallel.tp)}
    settings = cfg.text_encoder
    if settings is not None and cfg.model.kind == "t2i_deco" and need_text:
        text = load_text_encoder(settings, cfg.model.text_dim, device)
        if settings.compiles(device.type) and not cfg.data.has_text_embeddings:
            text.model.compile(batches)
    if cfg.image_encoder is not None and cfg.objective.repa_weight > 0:
        image = ImageEncoder.load(cfg.image_encoder, device)
        if is_on(cfg.image_encoder.compile, device.type):
            image.model.compile(batches)
    return text, image


def shared_over_tp(
    encode: Callable[[Any], torch.Tensor], tokens: TokenShard | None
) -> Callable[[Any], torch.Tensor]:
    """Encode once per tp group, each rank a part of the batch; as it is without tensor parallelism.

    Encoders need a group of their own (:meth:`TokenShard.with_own_communicator`): one communicator runs its
    collectives in the order of the calls, so the step would wait for encoders that run ahead.
    """
    if tokens is None:
        return encode
    return lambda items: encode_shared(encode, items, tokens)


def open_loader(
    cfg: RunConfig, dims: ParallelDims, text_identity: dict[str, Any] | None, stage: StageConfig, samples: int
) -> Loader:
    """A stage's loader, on all ranks together, from a number of samples on.

    Bad samples are written to the run's ``quarantine.jsonl``; ``text_identity`` is that of the text encoder where
    text embeddings are read.
    """

    def record(entry: dict[str, Any]) -> None:
        with (Path(cfg.run.dir) / "quarantine.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"rank": dist.get_rank(), **entry}) + "\n")

    def open_here() -> Loader:
        try:
            return Loader(
                dataclasses.replace(cfg.data, url=stage.data, mixture=()) if stage.data else cfg.data,
                resolution=stage.resolution,
                multiple=cfg.model.patch_size,
                seed=cfg.run.seed,
                global_batch=stage.global_batch,
                rank=dims.dp_rank(dist.get_rank()),
                world=dims.dp,
                start=samples,
                text_identity=text_identity,
                on_bad=record,
            )
        except DataError as error:
            raise RunError(str(error)) from error

    return raise_together(open_here)


class SyntheticData:
    """Random images with empty captions, for ``--dry-run``."""

    counters: dict[str, int] = {}

    def __init__(self, dims: ParallelDims, stage: StageConfig, samples: int) -> None:
        self._side, self._count, self._start = stage.resolution, stage.global_batch, samples
        self._rank, self._world = dims.dp_rank(dist.get_rank()), dims.dp

    def __iter__(self) -> Iterator[Batch]:
        for first in itertools.count(self._start, self._count):
            sample_ids = list(range(first + self._rank, first + self._count, self._world))
            shape = (len(sample_ids), self._side, self._side, 3)
            images = np.random.default_rng(sample_ids[0]).integers(0, 256, shape, dtype=np.uint8)
            yield Batch(images, [""] * len(sample_ids), [0] * len(sample_ids), sample_ids, None)

    def state(self, samples: int) -> dict[str, Any]:
        return {"synthetic": True, "samples": samples}

    def close(self) -> None:
        """Nothing to stop."""

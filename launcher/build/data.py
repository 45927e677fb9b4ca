"""Inputs of a run: frozen encoders, the loader of a stage, random images for a dry run."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.stream.loader import Batch, Loader
from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import raise_together
from deco_scale.errors import RunError
from deco_scale.models.encoders import ImageEncoder, TextEncoder, load_text_encoder
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.parallel.sequence_parallel import encode_shared
from deco_scale.training.config import StageConfig
from deco_scale.training.trainer import Data


def load_encoders(
    cfg: RunConfig, device: torch.device, *, need_text: bool
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """Frozen encoders that the configuration asks for, checked against the model."""
    text = image = None
    if cfg.text_encoder is not None and cfg.model.kind == "t2i_deco" and need_text:
        text = load_text_encoder(cfg.text_encoder, cfg.model.text_dim, device)
    if cfg.image_encoder is not None and cfg.objective.repa_weight > 0:
        image = ImageEncoder.load(cfg.image_encoder, device)
    return text, image


def shared_over_tp(encode: Callable[[Any], torch.Tensor], engine: Engine) -> Callable[[Any], torch.Tensor]:
    """Encode once per tp group, each rank a part of the batch; as it is without tensor parallelism."""
    tokens = engine.tokens
    if tokens is None:
        return encode
    return lambda items: encode_shared(encode, items, tokens)


def data_opener(
    data: DataConfig,
    dims: ParallelDims,
    *,
    patch_size: int,
    seed: int,
    quarantine: Path,
    text_identity: dict[str, Any] | None,
) -> Callable[[StageConfig, int], Loader]:
    """Opens a stage's loader on all ranks together, from a number of samples on.

    Bad samples are written to ``quarantine``; ``text_identity`` is that of the text encoder where text embeddings
    are read.
    """

    def record(entry: dict[str, Any]) -> None:
        with quarantine.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"rank": dist.get_rank(), **entry}) + "\n")

    def open_stage(stage: StageConfig, samples: int) -> Loader:
        try:
            return Loader(
                dataclasses.replace(data, url=stage.data, mixture=()) if stage.data else data,
                resolution=stage.resolution,
                multiple=patch_size,
                seed=seed,
                global_batch=stage.global_batch,
                rank=dims.dp_rank(dist.get_rank()),
                world=dims.dp,
                start=samples,
                text_identity=text_identity,
                on_bad=record,
            )
        except DataError as error:
            raise RunError(str(error)) from error

    return lambda stage, samples: raise_together(lambda: open_stage(stage, samples))


def synthetic_opener(dims: ParallelDims) -> Callable[[StageConfig, int], Data]:
    """Opens random images with empty captions in place of data."""
    return lambda stage, samples: SyntheticData(stage, dims)


class SyntheticData:
    """Random images with empty captions, for ``--dry-run``."""

    counters: dict[str, int] = {}

    def __init__(self, stage: StageConfig, dims: ParallelDims) -> None:
        self._stage, self._rank, self._world = stage, dims.dp_rank(dist.get_rank()), dims.dp

    def __iter__(self) -> Iterator[Batch]:
        side, step = self._stage.resolution, 0
        while True:
            first = step * self._stage.global_batch
            sample_ids = list(range(first + self._rank, first + self._stage.global_batch, self._world))
            random = np.random.default_rng(sample_ids[0])
            shape = (len(sample_ids), side, side, 3)
            yield Batch(
                images=random.integers(0, 256, shape, dtype=np.uint8),
                captions=[""] * len(sample_ids),
                text_embeddings=None,
                labels=[0] * len(sample_ids),
                sample_ids=sample_ids,
            )
            step += 1

    def state(self, samples: int) -> dict[str, Any]:
        return {"synthetic": True, "samples": samples}

    def close(self) -> None:
        """Nothing to stop."""

"""``deco embed``: the captions' text embeddings, computed once before training."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_pipeline.console import positive_int, print_line, progress_bar
from data_pipeline.index.format import load_index
from data_pipeline.storage.base import open_store
from data_pipeline.stream.loader import access_of, text_embedding_identity
from data_pipeline.text_embeddings import Embedder
from deco_scale.config import load_config
from deco_scale.distributed.bootstrap import choose_device, read_environment
from deco_scale.errors import ConfigError
from deco_scale.models.encoders import TextEncoder, text_identity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes the text embeddings of every caption of data.url (or of each data set of data.mixture) to its "
        "text_states. Run it under torchrun to share the shards between GPUs; run it again to resume."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--batch", type=positive_int, help="texts per batch; default: the first stage's micro_batch"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    cfg = load_config(args.config, args.overrides)
    if cfg.text_encoder is None or not cfg.data.has_text_embeddings:
        raise ConfigError(
            "deco embed needs text_encoder, and data.text_states (or mixture[].text_states) to write to"
        )
    # torchrun's: a batch script of SLURM has the job's number of tasks, but runs this once.
    env = read_environment({name: value for name, value in os.environ.items() if not name.startswith("SLURM_")})
    rank, world = env.rank, env.world_size
    settings = dataclasses.replace(cfg.text_encoder, cache_captions=0)
    device = choose_device("auto", env.local_rank)
    encoder = TextEncoder.load(settings, device)
    batch = args.batch or cfg.stages[0].micro_batch
    if settings.compiles(device.type):
        encoder.model.compile([batch])
    identity = text_embedding_identity(cfg.data, text_identity(settings, encoder.width))

    def encode(texts: Sequence[str]) -> list[Any]:
        embeddings = encoder.encode_ragged(texts)
        return [e.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16) for e in embeddings]

    for source in cfg.data.sources:
        data, target = (open_store(url, access_of(cfg.data)) for url in (source.url, source.text_states))
        index = load_index(data)
        with progress_bar(console, f"embedding {source.url}", len(index.shards), enabled=rank == 0) as update:
            Embedder(data, index, target, encode, identity, batch).run(rank=rank, world=world, progress=update)
        if rank == 0:
            print_line(console, f"text embeddings of {len(index)} samples in {source.text_states}")
    return 0

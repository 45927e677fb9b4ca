"""Small real things that tests share: encoders in the transformers format, shards, a configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import Reject
from data_pipeline.index.build import build_index, save_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import open_store

WORDS = [
    "a",
    "an",
    "the",
    "photo",
    "picture",
    "of",
    "red",
    "green",
    "blue",
    "square",
    "circle",
    "on",
    "white",
    "black",
    "ground",
    "small",
    "large",
]
TEXT_TOKENS, TEXT_DIM = 6, 24


def make_text_encoder(folder: Path) -> Path:
    """A small Qwen3-architecture encoder with random weights of a fixed seed, and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_DIM,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
        )
        Qwen3Model(config).save_pretrained(folder, safe_serialization=True)
    return folder


def make_image_encoder(folder: Path) -> Path:
    """A small DINOv2 with random weights of a fixed seed."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28
        )
        Dinov2Model(config).save_pretrained(folder, safe_serialization=True)
    return folder


def make_images_folder(folder: Path, count: int, side: int = 48) -> Path:
    """Coloured noise images with captions, every third with several of them."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        shape = (side, side + i % 5, 3)
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        captions = [f"a photo of {WORDS[i % len(WORDS)]} square", "red circle", "blue circle"]
        if i % 3 == 0:
            (folder / f"{i:04d}.json").write_text(json.dumps({"captions": captions}))
        else:
            (folder / f"{i:04d}.txt").write_text(captions[0])
    return folder


def make_shards(folder: Path, count: int = 100, shard_bytes: int = 150_000) -> Path:
    """Packed and indexed shards in a local folder."""
    rejects: list[Reject] = []
    images = make_images_folder(folder / "images", count)
    store = open_store(str(folder / "shards"))
    pack(read_folder(images, rejects), store, shard_bytes=shard_bytes, rejects=rejects)
    index, _ = build_index(store)
    assert not rejects and not index.problems and len(index) == count
    save_index(store, index)
    return folder / "shards"


def tiny_config(run: Path, shards: str | Path, encoder: Path, image_encoder: Path | None = None) -> dict[str, Any]:
    """A text-to-image run of 12 steps in two stages that a CPU finishes in seconds."""
    stage = {"global_batch": 8, "lr": 1e-3, "betas": [0.9, 0.95]}
    return {
        "run": {"dir": str(run), "seed": 3, "log_every": 1},
        "model": {
            "kind": "t2i_deco",
            "dim": 32,
            "num_heads": 4,
            "num_blocks": 2,
            "num_text_blocks": 1,
            "patch_size": 16,
            "decoder_width": 8,
            "decoder_blocks": 1,
            "text_dim": TEXT_DIM,
            "text_tokens": TEXT_TOKENS,
        },
        "objective": {"repa_weight": 0.5 if image_encoder else 0.0, "repa_layer": 1},
        "text_encoder": {"path": str(encoder), "max_tokens": TEXT_TOKENS},
        "image_encoder": {"path": str(image_encoder)} if image_encoder else None,
        "data": {"url": str(shards), "streams": 4, "window": 16, "workers": 1, "ahead": 16},
        "precision": {"compute": "fp32"},
        "optimizer": {"ema_decay": 0.9},
        "checkpoint": {"every": 4, "keep_last": 2},
        "wandb": {"mode": "disabled"},
        # What ranks hold alike is compared after every step.
        "faults": {"check_replicas_every": 1},
        "watchdog": {"timeout_s": 0.0},
        "stages": [
            {"name": "small", "resolution": 16, "steps": 8, "micro_batch": 2, **stage},
            {"name": "large", "resolution": 32, "steps": 4, "micro_batch": 1, **stage},
        ],
    }

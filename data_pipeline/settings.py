"""Settings of the data pipeline."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the samples are and how they are read.

    ``url`` is ``s3://bucket/prefix`` or a local folder with tar shards and their index. ``target: label``
    reads class numbers (``.cls``) in place of captions. ``streams`` and ``window`` shape the order and are
    part of a run's identity: changing them changes which samples a step sees. ``ahead`` samples per rank are
    fetched and decoded before they are needed.
    """

    url: str
    target: Literal["caption", "label"] = "caption"
    streams: int = 64
    window: int = 1024
    workers: int = 4
    worker_kind: Literal["thread", "process"] = "thread"
    fetchers: int = 4
    ahead: int = 256
    cache_bytes: int = 512 * 2**20
    max_pixels: int = 64 * 2**20
    prefix_probability: float = 0.5
    short_caption_words: int = 30
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name in ("streams", "window", "workers", "fetchers", "ahead", "cache_bytes", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("prefix_probability", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")

"""Settings of the data pipeline."""

import logging
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.decode import DecodeMode

logger = logging.getLogger(__name__)
_RENAMED = {"leave_out": "drop", "enlarge": "upscale"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Which samples of an index are trained on; decided by the index alone, so the order never depends on a run.

    ``min_side`` and ``max_pixels`` in pixels; ``max_aspect`` is the longer side over the shorter; caption
    lengths in characters of the longest caption. ``min_scores`` names fields of the samples' ``.json`` that were
    indexed (``deco-data index --score``); a sample without the number is left out.
    """

    min_side: int = 0
    max_pixels: int | None = None
    max_aspect: float | None = None
    min_caption_chars: int = 0
    max_caption_chars: int | None = None
    min_scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set of a mixture: its share of samples relative to the others, and the URL of its embeddings."""

    url: str
    weight: float = 1.0
    text_states: str = ""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} of {self.url} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the samples are and how they are read.

    ``url`` is ``s3://bucket/prefix`` or a local folder with tar shards and their index; ``mixture`` lists
    several with weights instead. ``target: label`` reads class numbers (``.cls``) instead of captions.

    ``streams``, ``window``, ``filters``, ``mixture``, ``small`` and ``bucket_aspect`` shape the order and are part
    of a run's identity: changing them changes which samples a step sees. ``bucket_aspect`` above 1 keeps images
    up to that aspect ratio in buckets of their own shape instead of cropping squares.

    ``small``: images below a stage's resolution are left out (``drop``) or upscaled (``upscale``), as is usual for
    ImageNet. The older names ``leave_out`` and ``enlarge`` still work.

    ``decode`` is ``exact`` (the public release's preprocessing) or ``fast`` (docs/data.md has the difference).
    ``ahead`` samples per rank are fetched and decoded before they are needed; ``workers`` of ``worker_kind``
    decode them (0: the training loop decodes), ``fetchers`` read chunks into up to ``buffer_bytes`` of memory.
    ``cache_dir`` keeps up to ``cache_bytes`` of chunks on a local disk, shared by the processes of a node.
    ``text_states`` is the URL where ``deco embed`` wrote text embeddings; empty encodes captions while training.

    ``anonymous`` and ``requester_pays`` are for public buckets; other access is set the standard AWS ways. A
    request that receives nothing for ``stall_s`` seconds is tried again, one that gets nowhere for
    ``deadline_s`` ends the run.
    """

    url: str = ""
    mixture: tuple[Source, ...] = ()
    target: Literal["caption", "label"] = "caption"
    streams: int = 64
    window: int = 1024
    filters: Filters = field(default_factory=Filters)
    bucket_aspect: float = 1.0
    small: Literal["drop", "upscale", "leave_out", "enlarge"] = "drop"
    decode: DecodeMode = "exact"
    workers: int = 4
    worker_kind: Literal["thread", "process"] = "thread"
    fetchers: int = 4
    ahead: int = 256
    buffer_bytes: int = 512 * 2**20
    cache_dir: str = ""
    cache_bytes: int = 64 * 2**30
    text_states: str = ""
    anonymous: bool = False
    requester_pays: bool = False
    deadline_s: float = 300.0
    stall_s: float = 30.0
    max_pixels: int = 64 * 2**20
    prefix_probability: float = 0.5
    short_caption_words: int = 30
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.small in _RENAMED:
            logger.warning(f"data.small={self.small} is now called {_RENAMED[self.small]}")
            object.__setattr__(self, "small", _RENAMED[self.small])
        if bool(self.url) == bool(self.mixture):
            raise ValueError("set either url, or mixture with URLs of its own")
        if self.mixture and self.text_states:
            raise ValueError("text_states of a mixture are set for each of its data sets")
        if any(bool(s.text_states) != bool(self.sources[0].text_states) for s in self.sources):
            raise ValueError("text_states are set for some data sets of the mixture and not for all")
        counts = ("streams", "window", "fetchers", "ahead", "buffer_bytes", "cache_bytes", "max_pixels")
        for name, minimum in {**dict.fromkeys(counts, 1), "workers": 0, "bucket_aspect": 1}.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {minimum}")
        for name in ("deadline_s", "stall_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.bucket_aspect > 1 and self.small == "upscale":
            raise ValueError(f"small=upscale is for squares, not for bucket_aspect={self.bucket_aspect}")
        for name in ("prefix_probability", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets, one or several."""
        return self.mixture or (Source(url=self.url, text_states=self.text_states),)

    @property
    def has_text_embeddings(self) -> bool:
        """Whether text embeddings are read instead of computed."""
        return bool(self.sources[0].text_states)

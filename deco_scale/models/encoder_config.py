"""Settings of the frozen encoders."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """A ``transformers`` text encoder: a local folder, or a hub id already in the local cache.

    ``cache_captions`` keeps the states of so many captions in memory, for data with few distinct ones.
    ``ahead`` encodes the next batch while a step computes, on a stream of its own. ``zero_padding`` sets the
    states behind a caption's last token to zero, instead of keeping what the encoder makes of padding (as the
    public release does); precomputed states are then several times smaller. ``round_states`` rounds states to
    bfloat16, as precomputed ones are; on a GPU, where encoders compute in bfloat16, it changes nothing.
    """

    path: str
    max_tokens: int = 128
    zero_padding: bool = False
    round_states: bool = False
    cache_captions: int = 0
    ahead: bool = False
    allow_download: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.cache_captions < 0:
            raise ValueError("max_tokens must be positive and cache_captions not negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderConfig:
    """DINOv2 for REPA: a ``transformers`` folder, or the original ``.pth`` file of dinov2_vitb14.

    ``ahead`` encodes the next batch while a step computes, on a stream of its own.
    """

    path: str
    ahead: bool = False

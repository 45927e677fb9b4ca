"""Settings of the denoiser, its attention and the frozen encoders."""

from dataclasses import dataclass
from typing import Literal

ModelKind = Literal["t2i_deco", "c2i_deco", "c2i_baseline"]
AttentionBackend = Literal["auto", "flash", "te", "cudnn", "sdpa", "math"]
EncoderPrecision = Literal["auto", "bf16", "fp8", "fp32"]
Switch = bool | Literal["auto"]
"""On, off, or ``auto``: on for a GPU."""
ActivationCheckpointing = Literal["none", "selective", "full"]
"""What blocks recompute in backward: nothing, all but matrix products and attention, everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of a denoiser; the field names are the paper's quantities.

    ``text_dim``, ``text_tokens`` and ``num_text_blocks`` belong to t2i, ``num_classes`` to c2i,
    ``decoder_width`` and ``decoder_blocks`` to the two DeCo kinds; the others leave them at 0.
    """

    kind: ModelKind
    dim: int
    num_heads: int
    num_blocks: int
    patch_size: int = 16
    channels: int = 3
    decoder_width: int = 0
    decoder_blocks: int = 0
    num_text_blocks: int = 0
    text_dim: int = 0
    text_tokens: int = 0
    num_classes: int = 0

    def __post_init__(self) -> None:
        required = {
            "t2i_deco": {"decoder_width", "decoder_blocks", "text_dim", "text_tokens"},
            "c2i_deco": {"decoder_width", "decoder_blocks", "num_classes"},
            "c2i_baseline": {"num_classes"},
        }[self.kind]
        always = {"dim", "num_heads", "num_blocks", "patch_size", "channels"}
        for name in required | always:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive for {self.kind}")
        optional = {"num_text_blocks"} if self.kind == "t2i_deco" else set()
        for name in set(type(self).__slots__) - required - always - optional - {"kind"}:
            if getattr(self, name) != 0:
                raise ValueError(f"{name}={getattr(self, name)} has no meaning for {self.kind}")
        if self.num_text_blocks < 0:
            raise ValueError(f"num_text_blocks={self.num_text_blocks} must not be negative")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 4:
            raise ValueError(f"dim={self.dim} must be num_heads={self.num_heads} times a multiple of 4 (2-D RoPE)")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def mlp_hidden_dim(self) -> int:
        """4D for the text model, two thirds of it for the class models (same parameters as a plain MLP)."""
        return 4 * self.dim if self.kind == "t2i_deco" else int(2 * (4 * self.dim) / 3)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``height`` x ``width`` pixels."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image {height}x{width} is not a multiple of patch_size={self.patch_size}")
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The ``attention`` section of a configuration."""

    backend: AttentionBackend = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """A ``transformers`` text encoder: a local folder, or a hub id that is in the local cache.

    ``precision``: bf16 on a GPU and fp32 on a CPU by default; ``fp8`` needs torchao. ``compile`` compiles the
    layers; ``auto`` leaves them uncompiled with ``cache_captions``, where batches vary in size. ``ahead`` encodes
    the next batch during a step, on a stream of its own.

    ``zero_padding`` sets the embeddings of padding to zero instead of keeping the encoder's output for it, as the
    public release does. Only as many tokens as a batch needs are then encoded, and precomputed embeddings are
    stored without padding. ``round_states`` rounds embeddings to bfloat16 like precomputed ones; encoders that
    compute in bfloat16 do so anyway. ``cache_captions``: number of captions whose embeddings stay in memory, for
    data with few distinct captions.
    """

    path: str
    max_tokens: int = 128
    zero_padding: bool = False
    round_states: bool = False
    cache_captions: int = 0
    precision: EncoderPrecision = "auto"
    compile: Switch = "auto"
    ahead: Switch = "auto"
    allow_download: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.cache_captions < 0:
            raise ValueError("max_tokens must be positive and cache_captions not negative")

    def compiles(self, device_type: str) -> bool:
        """Whether layers are compiled on a device of ``device_type``; not by itself where batches vary in size."""
        return self.compile is True or (is_on(self.compile, device_type) and not self.cache_captions)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderConfig:
    """DINOv2 for REPA: a ``transformers`` folder, or the original ``.pth`` file of dinov2_vitb14.

    ``precision``, ``compile`` and ``ahead`` as for the text encoder.
    """

    path: str
    precision: EncoderPrecision = "auto"
    compile: Switch = "auto"
    ahead: Switch = "auto"


def is_on(setting: Switch, device_type: str) -> bool:
    """Whether ``setting`` is on for a device of ``device_type``, such as ``cuda``."""
    return device_type == "cuda" if setting == "auto" else setting

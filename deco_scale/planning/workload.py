"""What a run computes, apart from how it is spread: the model, its number format, its frozen encoders."""

from dataclasses import dataclass
from typing import Literal

from deco_scale.models import ModelConfig

PlannedCompute = Literal["fp32", "bf16", "fp8"]
IMAGE_ENCODER_PATCH = 16
"""Pixels of the model's image that one token of the image encoder stands for, along each side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A frozen encoder: parameters, those of them that every token is multiplied with, and its tokens.

    ``tokens`` is the length of a text, 0 for an image encoder, whose tokens follow from the resolution.
    ``runs`` is False where it is loaded for pictures only.
    """

    name: str
    parameters: float
    multiplied: float
    tokens: int = 0
    runs: bool = True

    def flops(self, resolution: int) -> float:
        """Of one image's forward pass: linears only, attention is a few per cent at these lengths."""
        tokens = self.tokens or (resolution // IMAGE_ENCODER_PATCH) ** 2 + 1
        return 2.0 * self.multiplied * tokens


# Qwen3-1.7B: 28 layers of width 2048 with 16 query and 8 key heads of 128, MLP 6144, vocabulary 151,936.
# all-MiniLM-L6-v2: 6 layers of width 384, MLP 1536. DINOv2-B: 12 layers of width 768.
KNOWN_TEXT_ENCODERS = {"Qwen3-1.7B": (1.721e9, 1.409e9), "all-MiniLM-L6-v2": (22.7e6, 10.6e6)}
"""Parameters, and those without the table of tokens."""
DINOV2_B = Encoder(name="DINOv2-B", parameters=86.6e6, multiplied=85.1e6)
IMAGE_ENCODER_DIM = 768


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """``repa_dim`` is the width of the image encoder's tokens, 0 without REPA.

    ``fused``: Triton kernels; ``compile``: blocks are compiled. ``persistent``, ``reduce_bucket`` and
    ``prefetch_bucket`` are DeepSpeed's, in elements.
    """

    model: ModelConfig
    compute: PlannedCompute
    repa_dim: int = 0
    fused: bool = False
    compile: bool = False
    encoders: tuple[Encoder, ...] = ()
    persistent: int = 100_000
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000

    @property
    def compute_bytes(self) -> int:
        """Of an element of an activation: FP8 is inside of linears only."""
        return 4 if self.compute == "fp32" else 2

    @property
    def repa_parameters(self) -> int:
        """Of the head: three linears with biases."""
        dim, wide = self.model.dim, self.repa_dim
        return 2 * dim * (dim + 1) + wide * (dim + 1) if wide else 0

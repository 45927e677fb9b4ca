"""What a run computes: its workload, and the FLOPs of a training image.

Counts multiply-adds of linears and attention twice, the backward pass as two forward passes; norms, activations
and frozen encoders are not counted in an image's FLOPs. For the XXL model: 1.17 T at 256 px, 4.39 T at 512 px.
"""

import math
from dataclasses import dataclass
from typing import Literal

from deco_scale.models import ModelConfig
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps
from deco_scale.training.config import StageConfig


def forward_flops_by_part(cfg: ModelConfig, height: int, width: int) -> dict[str, float]:
    """FLOPs of one image through the denoiser.

    ``linears`` are those inside attention and MLP; ``decoder`` includes the projection of its condition.
    """
    tokens, dim, text, wide = math.prod(cfg.grid(height, width)), cfg.dim, cfg.text_tokens, cfg.decoder_width
    own = 4 * dim * dim + 3 * dim * cfg.mlp_hidden_dim
    attended = cfg.num_blocks * tokens * (tokens + text) + cfg.num_text_blocks * text * text
    decoder = tokens * dim * cfg.patch_values + 2 * dim * dim
    if wide:
        pixel = wide * (2 * cfg.channels + 64 + wide + cfg.decoder_blocks * 5 * wide)
        decoder = tokens * dim * cfg.patch_size**2 * wide + height * width * pixel
    products = {
        "linears": cfg.num_blocks * (tokens * own + text * 2 * dim * dim) + cfg.num_text_blocks * text * own,
        "attention": 2 * attended * dim,
        "modulation": (cfg.num_blocks + cfg.num_text_blocks) * 6 * dim * dim,
        "embedding": tokens * cfg.patch_values * dim + 256 * dim + dim * dim + text * cfg.text_dim * dim,
        "decoder": decoder,
    }
    return {name: 2.0 * count for name, count in products.items()}


def training_flops(cfg: ModelConfig, height: int, width: int) -> float:
    """FLOPs of one training image: forward and twice that for backward."""
    return 3.0 * sum(forward_flops_by_part(cfg, height, width).values())


@dataclass(frozen=True, slots=True)
class Encoder:
    """A frozen encoder: parameters, those of them that every token is multiplied with, and its tokens.

    ``tokens`` is the length of a text, 0 for an image encoder, whose tokens follow from the resolution.
    ``operations`` counts what the host launches, eager. ``runs`` is False where it is loaded for sampling only.
    """

    name: str
    parameters: float
    multiplied: float
    operations: int
    tokens: int = 0
    runs: bool = True
    compiled: bool = False

    def flops(self, resolution: int) -> float:
        """Of one image's forward pass: linears only, attention is a few per cent at these lengths."""
        # A token of the image encoder stands for 16 x 16 pixels of the model's image.
        return 2.0 * self.multiplied * (self.tokens or (resolution // 16) ** 2 + 1)


# Qwen3-1.7B: 28 layers of width 2048 with 16 query and 8 key heads of 128, MLP 6144, vocabulary 151,936.
# all-MiniLM-L6-v2: 6 layers of width 384, MLP 1536. DINOv2-B: 12 layers of width 768.
KNOWN_TEXT_ENCODERS = {"Qwen3-1.7B": (1.721e9, 1.409e9, 28 * 40), "all-MiniLM-L6-v2": (22.7e6, 10.6e6, 6 * 20)}
"""Parameters, those without the table of tokens, and operations (assumed: 40 and 20 a layer)."""
DINOV2_B = Encoder(name="DINOv2-B", parameters=86.6e6, multiplied=85.1e6, operations=12 * 20)
IMAGE_ENCODER_DIM = 768


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """``repa_dim`` is the width of the image encoder's tokens, 0 without REPA.

    ``fused``: Triton kernels; ``compile``: blocks are compiled. ``persistent``, ``reduce_bucket`` and
    ``prefetch_bucket`` are DeepSpeed's, in elements.
    """

    model: ModelConfig
    compute: Literal["fp32", "bf16", "fp8"]
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


@dataclass(frozen=True, slots=True)
class TrainStep:
    """A training step on one rank: ``accumulation`` micro-batches of square images, ``resolution`` pixels wide."""

    work: Workload
    parallel: ParallelConfig
    dims: ParallelDims
    micro_batch: int
    accumulation: int
    resolution: int

    @classmethod
    def of_stage(
        cls, work: Workload, stage: StageConfig, parallel: ParallelConfig, dims: ParallelDims
    ) -> "TrainStep":
        """A stage's step with its own micro-batch; raises :class:`ConfigError` where sizes do not divide."""
        batch, micro, where = stage.global_batch, stage.micro_batch, f"stages.{stage.name}"
        steps = accumulation_steps(global_batch=batch, micro_batch=micro, dp=dims.dp, where=where)
        return cls(work, parallel, dims, micro, steps, stage.resolution)

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return math.prod(self.work.model.grid(self.resolution, self.resolution))

    @property
    def keeps_weights(self) -> bool:
        """Whether gathered weights stay from forward to the update; ``auto`` that nobody has decided says no."""
        return self.parallel.reshard_after_forward is False

    @property
    def recomputes(self) -> bool:
        """Whether backward computes blocks again, as a whole or in part."""
        return self.parallel.activation_checkpointing != "none"

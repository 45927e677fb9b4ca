"""The matrix products of a training step, and how fast each runs at its own shape.

A GPU computes a product tile by tile, a wave of one tile for each multiprocessor at a time, and each tile loops
over K. Lost are what the tiles overhang, what the last wave leaves idle, and the start and end of each K loop.
:func:`gemm_share` estimates this for a few tile sizes and splits of K and takes the best, as cuBLAS's heuristic
does; the model is that of NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave quantisation).
Where the GPU suite has measured a product (``benchmarks/gpu/gemm.py``), its rate corrects the estimate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from deco_scale.models import ModelConfig

Pass = Literal["forward", "dX", "dW"]
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.92), (64, 128, 0.8), (64, 64, 0.6))
"""Rows and columns of a tile, and the rate of its inner loop relative to the largest one (assumed)."""
SPLITS = (1, 2, 4, 8, 16)
"""Parts into which K is cut so that few tiles fill the GPU."""
LOOP_K = 512
"""Values of K that the start and the end of a tile's loop take the time of (assumed); twice that in FP8."""
SUSTAINED = 0.92
"""Assumed: clocks under the power of a training step, against those of a short measurement of a large product."""
LARGE = 8192
"""Side of the square product whose rate a device's ``gemm_flops`` is."""


@dataclass(frozen=True)
class Product:
    """A linear: ``rows`` (M) by ``in_features`` (K) to ``out_features`` (N), ``count`` times a micro-batch.

    ``part`` names it in the time of a step. No step computes the dX of one whose input is ``data``.
    """

    name: str
    part: Literal["linears", "modulation", "embedding", "decoder"]
    rows: int
    in_features: int
    out_features: int
    count: int
    data: bool = False

    @property
    def flops(self) -> float:
        """Of one of its three products."""
        return 2.0 * self.rows * self.in_features * self.out_features

    def shapes(self) -> Iterator[tuple[Pass, tuple[int, int, int]]]:
        """(M, N, K) of each pass that a step computes."""
        rows, k, n = self.rows, self.in_features, self.out_features
        yield "forward", (rows, n, k)
        if not self.data:
            yield "dX", (rows, k, n)
        yield "dW", (n, k, rows)


def products(model: ModelConfig, *, micro_batch: int, resolution: int, tp: int = 1) -> list[Product]:
    """The linears of a micro-batch on one of ``tp`` ranks; those that see a time alone are left out."""
    image = micro_batch * math.prod(model.grid(resolution, resolution))
    text, dim, hidden = micro_batch * model.text_tokens, model.dim, model.mlp_hidden_dim
    found = []
    for name, tokens, blocks in (("image", image, model.num_blocks), ("text", text, model.num_text_blocks)):
        found += [
            Product(f"{name} qkv", "linears", tokens, dim, 3 * dim // tp, blocks),
            Product(f"{name} proj", "linears", tokens, dim // tp, dim, blocks),
            Product(f"{name} gate+up", "linears", tokens, dim, 2 * hidden // tp, blocks),
            Product(f"{name} down", "linears", tokens, hidden // tp, dim, blocks),
        ]
    own = image // tp or 1
    wide = model.patch_size**2 * model.decoder_width
    found += [
        Product("context_kv", "linears", text, dim, 2 * dim // tp, model.num_blocks),
        Product("modulation", "modulation", micro_batch, dim, 6 * dim, model.num_blocks + model.num_text_blocks),
        Product("text_embed", "embedding", text // tp, model.text_dim, dim, 1, data=True),
        Product("patch_embed", "embedding", own, model.patch_values, dim, 1, data=True),
        Product("cond_proj", "decoder", own, dim, wide or model.patch_values, 1),
    ]
    return [product for product in found if product.count and product.flops]


@lru_cache(maxsize=4096)
def gemm_share(m: int, n: int, k: int, *, sms: int, loop_k: int = LOOP_K) -> float:
    """Share of the peak that an (M, N, K) product reaches on ``sms`` multiprocessors, at most 1."""
    best = 0.0
    for rows, columns, rate in TILES:
        tiles = -(-m // rows) * -(-n // columns)
        useful = rate * m * n / (tiles * rows * columns)
        for split in SPLITS:
            waves = -(-tiles * split // sms)
            best = max(best, useful * tiles * split / (waves * sms) * k / (k + split * loop_k))
    return best

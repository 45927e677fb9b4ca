"""Bytes that autograd keeps for backward, counted tensor by tensor from the model's formulas.

``tests/unit/test_planning.py`` compares with what autograd keeps of a small model. Small things (times,
modulations, statistics of norms) are left out.

Letters: a bytes of an element in the compute type, D model width, h hidden units over D, r text tokens over
image tokens.
"""

from deco_scale.models import ModelConfig
from deco_scale.parallel.layout import ActivationCheckpointing
from deco_scale.planning.workload import Workload

FP32 = 4
CHUNK_FIXED, CHUNK_BLOCK = 4.2, 9.06
"""Values for each pixel and unit of width that a chunk of the torch decoder holds in backward: fixed, and a block;
counted by autograd."""


def block_saved(work: Workload, *, tokens: int, context: int, tp: int) -> float:
    """Bytes of one image in one block that recomputes nothing, on one of ``tp`` ranks.

    ``context`` counts text tokens that are extra keys and values. The eager path casts to fp32 around
    each norm; fused kernels and compiled blocks keep their inputs only.
    """
    a, model = work.compute_bytes, work.model
    hidden = model.mlp_hidden_dim / model.dim
    r = context / tokens
    lean = work.fused or work.compile
    # What a norm multiplies its weight with: the class models cast it first.
    normed = FP32 if model.kind == "t2i_deco" else a
    # The residual stream before each half, each half's result, for the gate.
    own = 4 * a if lean else 2 * (FP32 + normed + a + a)
    modulated = 2 * a
    # Queries, keys and values as attention reads them; with text, keys and values are copied together.
    attended = a + (2 * (1 + r) * a if context else a)
    if lean:
        before, texts = 3 * a, 2 * r * a
    else:
        # fp32 needs no cast: the fused projection's result itself is kept.
        casts = 3 * a if a == FP32 else 2 * FP32 + (0 if context else 3 * a)
        before = casts + 2 * normed
        texts = r * (2 * a + FP32 if a == FP32 else 2 * FP32)
    products = (3 if work.compile else 4) * hidden * a
    split = before + attended + texts + a + products
    return tokens * model.dim * (own / tp + modulated + split / tp)


def block_kept(work: Workload, *, tokens: int, context: int, tp: int, mode: ActivationCheckpointing) -> float:
    """Bytes of one image and block under a recomputing ``mode``: the input, and what ``selective`` keeps."""
    if mode == "none":
        return block_saved(work, tokens=tokens, context=context, tp=tp)
    a, dim = work.compute_bytes, work.model.dim
    kept = tokens * dim * a / tp
    if mode == "selective":
        hidden = work.model.mlp_hidden_dim / dim
        # Results of qkv, attention, projection, gate, up and down, and of the text's keys and values.
        kept += tokens * dim * a * (6 + 2 * hidden + 2 * context / tokens) / tp
    return kept


def outside_saved(work: Workload, *, resolution: int, tp: int) -> dict[str, float]:
    """Bytes of one image that are kept outside of the blocks, by part."""
    a, model = work.compute_bytes, work.model
    rows, cols = model.grid(resolution, resolution)
    tokens, values = rows * cols, model.channels * resolution**2
    patches = values * (FP32 if a == FP32 else a)
    # Prediction, target and coefficients, in fp32 whatever computes.
    losses = values * 3 * FP32 / tp
    if work.repa_dim:
        losses += tokens * (5 * a * model.dim + 2 * FP32 * work.repa_dim) / tp
    # Picture and noise stay as the step's arguments.
    found = {"inputs": values * 2 * FP32 + _text_bytes(work) + patches, "losses": losses}
    semantic = 2 * a * tokens * model.dim
    if model.decoder_width:
        pixels = values * FP32 if a != FP32 else 0
        condition = a * resolution**2 * model.decoder_width
        found["decoder"] = (semantic + pixels + condition) / tp
    else:
        found["decoder"] = semantic / tp
    return found


def _text_bytes(work: Workload) -> float:
    """States as they come and as they are cast, and what embedding them keeps."""
    model = work.model
    cast = work.compute_bytes if work.compute_bytes != FP32 else 0
    states = model.text_tokens * model.text_dim * (FP32 + cast)
    return states + model.text_tokens * model.dim * 3 * FP32


def decoder_chunk(work: Workload, *, images: int, resolution: int, chunk_pixels: int, tp: int) -> float:
    """Bytes that backward through one chunk of the torch decoder holds; the fused one holds none."""
    model: ModelConfig = work.model
    if work.fused or not model.decoder_width:
        return 0.0
    pixels = min(chunk_pixels, images * resolution**2 / tp)
    return pixels * model.decoder_width * work.compute_bytes * (CHUNK_FIXED + CHUNK_BLOCK * model.decoder_blocks)

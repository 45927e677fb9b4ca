"""Bytes that operations other than large matrix products move, and how many operations there are.

Counted operation by operation from the model's formulas, reads and writes; ``tests/unit/test_planning.py``
compares with a count of every operation of a small model on a CPU. What Triton kernels and compiled blocks move is
counted from what they must read and write, and not yet measured on a GPU.

Norms are counted as the text model casts them; the class models move a few per cent less.

Letters: a bytes of an element in the compute type, h hidden units over D, r text tokens over image tokens.
"""

from typing import Literal

from deco_scale.planning.workload import Workload

FP32 = 4
RMS_PASSES = {"cuda": (8, 12), "cpu": (20, 73)}
"""Bytes an fp32 value of an RMS norm moves, forward and backward: PyTorch has one kernel for it on a GPU."""
LOSS_BYTES = 300
"""Bytes a pixel value moves in noising, patching and both losses, forward and backward, by a count of a step."""
ADAMW_BYTES = {False: 52, True: 40}
"""Bytes a parameter moves in norm, clipping, AdamW and average: apart, and in one fused pass."""
BLOCK_OPERATIONS = {False: (89, 147), True: (30, 60)}
"""Operations of a block forward and backward: eager, by a count; fused or compiled, assumed."""
DECODER_OPERATIONS = {False: (78, 214), True: (12, 20)}
OTHER_OPERATIONS = 250
"""Embedders, losses and inputs of a micro-batch, both passes."""


def block_moved(
    work: Workload, *, tokens: int, context: int, rotary: bool, tp: int, kind: Literal["cuda", "cpu"]
) -> tuple[float, float]:
    """Bytes of one image through one block, (forward, backward), matrix products and attention aside."""
    lean = work.fused or work.compile
    values = _lean(work, context / tokens) if lean else _eager(work, context / tokens, rotary, RMS_PASSES[kind])
    scale = tokens * work.model.dim / tp
    return values[0] * scale, values[1] * scale


def _eager(work: Workload, r: float, rotary: bool, rms: tuple[int, int]) -> tuple[float, float]:
    a, h = work.compute_bytes, work.model.mlp_hidden_dim / work.model.dim
    cast = 0 if a == FP32 else a + FP32
    weighted = 2 * FP32
    norm = (2 * cast + rms[0] + weighted, 2 * cast + rms[1] + 2 * FP32 + 3 * FP32 + FP32)
    modulated = (2 * a + 2 * a, 2 * a + 3 * a + 2 * a)
    gated = (5 * a, 6 * a)
    product = (5 * h * a, 9 * h * a)
    heads = 2 + (r if r else 0)
    forward = 2 * (norm[0] + modulated[0] + gated[0]) + heads * norm[0] + product[0]
    # The fused projection's gradient is put together, and both branches' gradients are added.
    backward = 2 * (norm[1] + modulated[1] + 3 * a + gated[1]) + heads * norm[1] + product[1] + 9 * a
    if rotary:
        forward += 2 * (2 * cast + 16 + 12 + 8)
        backward += 2 * (2 * cast + 16 + 4 + 12 + 8)
    if r:
        forward += 4 * (1 + r) * a
        backward += 4 * r * a
    return forward, backward


def _lean(work: Workload, r: float) -> tuple[float, float]:
    a, h = work.compute_bytes, work.model.mlp_hidden_dim / work.model.dim
    product = (3 * h * a, 5 * h * a) if work.compile else (5 * h * a, 9 * h * a)
    heads = 2 + r
    forward = 2 * (2 * a + 3 * a) + heads * 2 * a + product[0] + (4 * (1 + r) * a if r else 0)
    backward = 2 * (6 * a + 3 * a) + heads * 3 * a + product[1] + 9 * a + 4 * r * a
    return forward, backward


def decoder_moved(work: Workload, *, resolution: int, tp: int) -> tuple[float, float]:
    """Bytes of one image through the pixel decoder behind its condition's projection, both passes.

    The torch one counts its small products too, which are bound by what they move, and the recomputation.
    The fused one reads pixels and condition once and writes the velocity, or the condition's gradient, once.
    """
    model, a = work.model, work.compute_bytes
    pixels = resolution**2 / tp
    if not model.decoder_width:
        return 0.0, 0.0
    if work.fused:
        values = pixels * FP32 * model.channels
        condition = pixels * a * model.decoder_width
        return values + condition + values, 2 * condition + 2 * values
    wide = pixels * a * model.decoder_width
    return wide * (11 + 19 * model.decoder_blocks), wide * (26.5 + 73.2 * model.decoder_blocks)


def operations(work: Workload, *, recomputed: bool) -> int:
    """How many operations a micro-batch issues in both passes."""
    forward, backward = BLOCK_OPERATIONS[work.fused or work.compile]
    blocks = work.model.num_blocks + work.model.num_text_blocks
    decoder = sum(DECODER_OPERATIONS[work.fused]) if work.model.decoder_width else 0
    return blocks * (forward * (2 if recomputed else 1) + backward) + decoder + OTHER_OPERATIONS

"""Step time by a roofline: what computes, what moves memory, what waits for the network.

Matrix products and attention take FLOPs over the achieved rate; everything else takes the bytes it moves over the
copy rate; parts of a micro-batch follow one another. A GPU computes while the host launches operations, so the
slower of the two counts; on a CPU they add up. Communication that can overlap counts where it exceeds the
computation, and at least for one unit of the model; the rest is added. Waiting for data, checkpoints and image
sampling are not included.

Bytes moved are counted operation by operation from the model's formulas, reads and writes;
``tests/unit/planning/test_costs.py`` compares with every operation of a small model on a CPU. For Triton kernels
and compiled blocks they are what must be read and written, not yet measured on a GPU. Norms are counted as the
text model casts them; class models move a few per cent less.

Letters: a bytes of an element in the compute type, h hidden units over D, r text tokens over image tokens.
"""

from typing import Literal

from deco_scale.planning.comms import seconds_of, step_traffic
from deco_scale.planning.flops import TrainStep, Workload, forward_flops_by_part
from deco_scale.planning.hardware import LAUNCH_S, Device
from deco_scale.planning.memory import FP32, rank_elements

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
    norm = (2 * cast + rms[0] + 2 * FP32, 2 * cast + rms[1] + 6 * FP32)
    modulated, gated, product = (4 * a, 7 * a), (5 * a, 6 * a), (5 * h * a, 9 * h * a)
    forward = 2 * (norm[0] + modulated[0] + gated[0]) + (2 + r) * norm[0] + product[0]
    # The fused projection's gradient is put together, and both branches' gradients are added.
    backward = 2 * (norm[1] + modulated[1] + 3 * a + gated[1]) + (2 + r) * norm[1] + product[1] + 9 * a
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
    forward = 2 * (2 * a + 3 * a) + (2 + r) * 2 * a + product[0] + (4 * (1 + r) * a if r else 0)
    backward = 2 * (6 * a + 3 * a) + (2 + r) * 3 * a + product[1] + 9 * a + 4 * r * a
    return forward, backward


def decoder_moved(work: Workload, *, resolution: int, tp: int) -> tuple[float, float]:
    """Bytes of one image through the pixel decoder behind its condition's projection, both passes.

    The torch one counts its small products too, which are bound by what they move, and the recomputation.
    The fused one reads pixels and condition once and writes the velocity, or the condition's gradient, once.
    """
    model, pixels = work.model, resolution**2 / tp
    if not model.decoder_width:
        return 0.0, 0.0
    wide = pixels * work.compute_bytes * model.decoder_width
    if work.fused:
        values = pixels * FP32 * model.channels
        return values + wide + values, 2 * wide + 2 * values
    return wide * (11 + 19 * model.decoder_blocks), wide * (26.5 + 73.2 * model.decoder_blocks)


RECOMPUTED = ("linears", "attention", "modulation")
"""Parts of the FLOPs that full activation checkpointing computes once more."""
REPLICATED = ("modulation",)
"""Parts of the FLOPs that every tp rank computes in full; the rest is split over tokens, heads or hidden units."""


def compute_seconds(step: TrainStep, device: Device) -> dict[str, float]:
    """Seconds of a micro-batch on one rank by part, both passes."""
    work, tp, model, resolution = step.work, step.dims.tp, step.work.model, step.resolution
    flops = forward_flops_by_part(model, resolution, resolution)
    rate = {name: device.gemm_flops for name in flops}
    rate["attention"] = device.attention_flops
    if work.compute == "fp8" and device.fp8_flops:
        rate["linears"] = device.fp8_flops
    parts = {}
    for name, count in flops.items():
        passes = 4.0 if step.parallel.activation_checkpointing == "full" and name in RECOMPUTED else 3.0
        parts[name] = passes * count / rate[name] / (1 if name in REPLICATED else tp)
    moved = 0.0
    for blocks, length, context, rotary in (
        (model.num_blocks, step.tokens, model.text_tokens, True),
        (model.num_text_blocks, model.text_tokens, 0, False),
    ):
        if blocks:
            forward, backward = block_moved(
                work, tokens=length, context=context, rotary=rotary, tp=tp, kind=device.kind
            )
            moved += blocks * (forward * (2 if step.recomputes else 1) + backward)
    parts["norms and gates"] = moved / device.copy_bytes_per_s
    parts["decoder"] += sum(decoder_moved(work, resolution=resolution, tp=tp)) / device.copy_bytes_per_s
    pixels = model.channels * resolution**2 / tp
    head = 6.0 * work.repa_parameters * step.tokens / tp / device.gemm_flops
    parts["losses"] = head + LOSS_BYTES * pixels / device.copy_bytes_per_s
    # Encoders split the batch over tp; bf16 on a GPU whatever the model computes in.
    parts["encoders"] = sum(e.flops(resolution) for e in work.encoders if e.runs) / tp / device.gemm_flops
    return {name: step.micro_batch * seconds for name, seconds in parts.items()}


def step_by_part(step: TrainStep, device: Device) -> dict[str, float]:
    """Seconds of a step by part; they sum to the step."""
    work, dims, parts = step.work, step.dims, compute_seconds(step, device)
    forward, backward = BLOCK_OPERATIONS[work.fused or work.compile]
    blocks = work.model.num_blocks + work.model.num_text_blocks
    decoder = sum(DECODER_OPERATIONS[work.fused]) if work.model.decoder_width else 0
    operations = blocks * (forward * (2 if step.recomputes else 1) + backward) + decoder + OTHER_OPERATIONS
    issue = operations * LAUNCH_S[device.kind]
    parts["host"] = issue if device.kind == "cpu" else max(0.0, issue - sum(parts.values()))
    parts = {name: step.accumulation * seconds for name, seconds in parts.items()}
    # fsdp overlaps gathers and gradient reductions, ZeRO-3 the gathers, ZeRO-2 the gradient reductions. Tensor
    # parallelism waits for its tokens, ZeRO-1 and 2 gather updated weights at the end of the step.
    hidden = exposed = 0.0
    for line in step_traffic(step):
        seconds, stage = seconds_of(line, dims, device), 2 if line.what == "gradients" else 3
        if line.axis != "tp" and (step.parallel.engine == "fsdp" or step.parallel.zero_stage == stage):
            hidden += seconds
        else:
            exposed += seconds
    parts["communication"] = exposed + max(hidden - sum(parts.values()), hidden / (blocks + 1))
    # Norm, clipping, AdamW and average over what a rank updates.
    elements = rank_elements(work.model, dims, work.persistent)
    updated = elements.sharded + work.repa_parameters / dims.dp_shard
    if step.parallel.engine == "deepspeed" and step.parallel.zero_stage == 0:
        updated = elements.full + work.repa_parameters
    parts["optimizer"] = ADAMW_BYTES[work.fused] * updated / device.copy_bytes_per_s
    return parts

"""Step time by a roofline: what computes, what moves memory, what waits for the host and for the network.

Matrix products take their FLOPs over the rate of their own shape (:mod:`deco_scale.planning.gemm`), attention over
one that grows with the number of keys; everything else takes the bytes it moves over the copy rate; parts of a
micro-batch follow one another. A GPU computes while the host launches operations, so the slower of the two counts,
for micro-batches and for the update (:mod:`deco_scale.planning.host`); on a CPU they add up. Encoders that run
ahead share the GPU with the step and are launched by the same Python process, so they save no time here.
Communication that can overlap counts where it exceeds the computation, and at least for one unit of the model; the
rest is added. Waiting for data, checkpoints and image sampling are not included.

Bytes moved are counted operation by operation from the model's formulas, reads and writes;
``tests/unit/planning/test_costs.py`` compares with every operation of a small model on a CPU. For Triton kernels
and compiled blocks they are what must be read and written, not yet measured on a GPU. Norms are counted as the
text model casts them; class models move a few per cent less.

Letters: a bytes of an element in the compute type, h hidden units over D, r text tokens over image tokens.
"""

from typing import Literal

from deco_scale.planning.comms import seconds_of, step_traffic
from deco_scale.planning.flops import TrainStep, Workload, forward_flops_by_part
from deco_scale.planning.gemm import LARGE, LOOP_K, SUSTAINED, Product, gemm_share, products
from deco_scale.planning.hardware import CPU_LAUNCH_S, ENCODER_SHARE, Device
from deco_scale.planning.memory import FP32, num_gathered, rank_elements

RMS_PASSES = {"cuda": (8, 12), "cpu": (20, 73)}
"""Bytes an fp32 value of an RMS norm moves, forward and backward: PyTorch has one kernel for it on a GPU."""
LOSS_BYTES = 300
"""Bytes a pixel value moves in noising, patching and both losses, forward and backward, by a count of a step."""
ADAMW_BYTES = {False: 52, True: 40}
"""Bytes a parameter moves in norm, clipping, AdamW and average: apart, and in one fused pass."""
BLOCK_OPERATIONS = {False: (89, 147), True: (30, 60)}
"""On a CPU, operations of a block forward and backward: eager, by a count; fused or compiled, assumed."""
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
    modulated, gated, product = (4 * a, 7 * a), (5 * a, 6 * a), (5 * h * a, 13 * h * a)
    forward = 2 * (norm[0] + modulated[0] + gated[0]) + (2 + r) * norm[0] + product[0]
    # The fused projections' gradients are put together.
    backward = 2 * (norm[1] + modulated[1] + 3 * a + gated[1]) + (2 + r) * norm[1] + product[1] + 6 * a
    if rotary:
        forward += 2 * (2 * cast + 16 + 12 + 8)
        backward += 2 * (2 * cast + 16 + 4 + 12 + 8)
    if r:
        forward += 4 * (1 + r) * a
        backward += 4 * r * a
    return forward, backward


def _lean(work: Workload, r: float) -> tuple[float, float]:
    a, h = work.compute_bytes, work.model.mlp_hidden_dim / work.model.dim
    product = (3 * h * a, 5 * h * a)
    forward = 2 * (2 * a + 3 * a) + (2 + r) * 2 * a + product[0] + (4 * (1 + r) * a if r else 0)
    backward = 2 * (6 * a + 3 * a) + (2 + r) * 3 * a + product[1] + 6 * a + 4 * r * a
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
    return wide * (11 + 22.5 * model.decoder_blocks), wide * (22 + 72.3 * model.decoder_blocks)


RECOMPUTED = ("linears", "attention", "modulation")
"""Parts of the FLOPs that full activation checkpointing computes once more."""
ATTENTION_PASSES = 3.5
"""Forward passes that attention's three cost: a fused backward computes the scores once more."""
ATTENTION_KEYS = 512
"""Keys at which attention reaches half of its rate over many (assumed, after the figures of FlashAttention-3)."""
DECODER_SHARE = {"cuda": 0.12, "cpu": 1.0}
"""Share of the GEMM rate that the decoder's products of 32 units reach: in a fused kernel, and as plain ones."""
FP8_QUANTISED_BYTES = 4
"""Bytes that quantising a bf16 value moves: read once, written by rows and by columns."""


def product_seconds(product: Product, device: Device, *, fp8: bool, recomputed: bool) -> float:
    """Of all passes of a product of a micro-batch, with a second forward pass where it is recomputed."""
    total = 0.0
    for name, (m, n, k) in product.shapes():
        rate = device.fp8_flops if fp8 and device.fp8_flops else device.gemm_flops
        if device.sms is not None:
            loop_k = LOOP_K * (2 if fp8 else 1)
            large = gemm_share(LARGE, LARGE, LARGE, sms=device.sms, loop_k=loop_k)
            rate *= SUSTAINED * gemm_share(m, n, k, sms=device.sms, loop_k=loop_k) / large
            rate *= device.gemm_corrections.get((product.name, name), 1.0)
        moved = 2 * (m * n + m * k + n * k)
        seconds = max(2.0 * m * n * k / rate, moved / device.copy_bytes_per_s if device.sms else 0.0)
        if fp8:
            # Each operand is quantised once and read by two products.
            seconds += FP8_QUANTISED_BYTES * (m * k if name != "dW" else n * k) / device.copy_bytes_per_s
        total += seconds * (2 if recomputed and name == "forward" else 1)
    return product.count * total


def compute_seconds(step: TrainStep, device: Device) -> dict[str, float]:
    """Seconds of a micro-batch on one rank by part, both passes."""
    work, tp, model, resolution = step.work, step.dims.tp, step.work.model, step.resolution
    full = step.parallel.activation_checkpointing == "full"
    flops = forward_flops_by_part(model, resolution, resolution)
    parts = dict.fromkeys(flops, 0.0)
    for product in products(model, micro_batch=step.micro_batch, resolution=resolution, tp=tp):
        fp8 = work.compute == "fp8" and product.part == "linears"
        recomputed = full and product.part in RECOMPUTED
        parts[product.part] += product_seconds(product, device, fp8=fp8, recomputed=recomputed)
    keys = step.tokens + model.text_tokens
    reached = keys / (keys + ATTENTION_KEYS) if device.sms else 1.0
    passes = (ATTENTION_PASSES if device.sms else 3.0) + full
    parts["attention"] = step.micro_batch * passes * flops["attention"] / tp / (device.attention_flops * reached)
    images = {name: seconds / device.copy_bytes_per_s for name, seconds in _image_moved(step, device.kind).items()}
    pixels = model.channels * resolution**2 / tp
    # What the products above leave of the decoder's FLOPs are those of its pixels.
    pixel_flops = flops["decoder"] - 2.0 * step.tokens * model.dim * (
        model.patch_size**2 * model.decoder_width or model.patch_values
    )
    images["decoder"] += 3.0 * pixel_flops / tp / (device.gemm_flops * DECODER_SHARE[device.kind])
    head = 6.0 * work.repa_parameters * step.tokens / tp / device.gemm_flops
    images["losses"] = head + LOSS_BYTES * pixels / device.copy_bytes_per_s
    # Encoders split the batch over tp; bf16 on a GPU whatever the model computes in.
    images["encoders"] = sum(
        e.flops(resolution) / tp / (device.encoder_flops * ENCODER_SHARE[e.compiled])
        for e in work.encoders
        if e.runs
    )
    for name, seconds in images.items():
        parts[name] = parts.get(name, 0.0) + step.micro_batch * seconds
    return parts


def _image_moved(step: TrainStep, kind: Literal["cuda", "cpu"]) -> dict[str, float]:
    """Bytes of one image through norms and gates of all blocks, and through the pixel decoder."""
    work, tp, model = step.work, step.dims.tp, step.work.model
    moved = 0.0
    for blocks, length, context, rotary in (
        (model.num_blocks, step.tokens, model.text_tokens, True),
        (model.num_text_blocks, model.text_tokens, 0, False),
    ):
        if blocks:
            forward, backward = block_moved(work, tokens=length, context=context, rotary=rotary, tp=tp, kind=kind)
            moved += blocks * (forward * (2 if step.recomputes else 1) + backward)
    return {"norms and gates": moved, "decoder": sum(decoder_moved(work, resolution=step.resolution, tp=tp))}


def host_seconds(step: TrainStep, device: Device) -> tuple[float, float]:
    """Host time of one micro-batch and of the update."""
    work = step.work
    blocks = work.model.num_blocks + work.model.num_text_blocks
    if device.kind == "cpu":
        forward, backward = BLOCK_OPERATIONS[work.fused or work.compile]
        decoder = sum(DECODER_OPERATIONS[work.fused]) if work.model.decoder_width else 0
        operations = blocks * (forward * (2 if step.recomputes else 1) + backward) + decoder + OTHER_OPERATIONS
        return operations * CPU_LAUNCH_S, 0.0
    running = [e for e in work.encoders if e.runs]
    found = device.host.seconds(
        step.parallel,
        ranks=step.dims.dp,
        blocks=blocks,
        compiled=work.compile,
        encoder_operations=sum(e.operations // (4 if e.compiled else 1) for e in running),
    )
    return device.host_scale * found.micro_batch_s, device.host_scale * found.update_s


def step_by_part(step: TrainStep, device: Device) -> dict[str, float]:
    """Seconds of a step by part; they sum to the step. ``host``: what the device waits for the host."""
    work, dims, parts = step.work, step.dims, compute_seconds(step, device)
    host_s, update_s = host_seconds(step, device)
    parts["host"] = host_s if device.kind == "cpu" else max(0.0, host_s - sum(parts.values()))
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
    parts["communication"] = exposed + max(hidden - sum(parts.values()), hidden / num_gathered(step))
    # Norm, clipping, AdamW and average over what a rank updates.
    elements = rank_elements(work.model, dims, work.persistent)
    updated = elements.sharded + work.repa_parameters / dims.dp_shard
    if step.parallel.engine == "deepspeed" and step.parallel.zero_stage == 0:
        updated = elements.full + work.repa_parameters
    parts["optimizer"] = ADAMW_BYTES[work.fused] * updated / device.copy_bytes_per_s
    parts["host"] += max(0.0, update_s - parts["optimizer"])
    return parts

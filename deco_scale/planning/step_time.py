"""Time of a training step by a roofline: what computes, what moves memory, what waits for the network.

Rules: matrix products and attention take FLOPs over the reached rate; everything else takes the bytes it moves
over the copy rate; parts of a micro-batch follow one another. A GPU works while the host issues operations, so
the slower of the two counts; on a CPU they add up. Communication that can overlap counts where it exceeds the
computation, and at least for one unit of the model; what cannot is added (:mod:`deco_scale.planning.network`).
Waiting for data, checkpoints and pictures are not in it.
"""

from collections.abc import Iterator

from deco_scale.parallel.layout import Layout, ParallelConfig
from deco_scale.planning.communication import StepShape, Traffic, fsdp_traffic, zero_traffic
from deco_scale.planning.flops import forward_flops_by_part
from deco_scale.planning.hardware import Device
from deco_scale.planning.memory import held_elements
from deco_scale.planning.network import split_by_overlap
from deco_scale.planning.passes import ADAMW_BYTES, LOSS_BYTES, block_moved, decoder_moved, operations
from deco_scale.planning.workload import Workload

FP32 = 4
RECOMPUTED = ("linears", "attention", "modulation")
"""Parts of the FLOPs that full activation checkpointing computes once more."""
REPLICATED = ("modulation",)
"""Parts of the FLOPs that every tp rank computes whole; all else is spread over tokens, heads or hidden units."""


def step_traffic(
    work: Workload, parallel: ParallelConfig, layout: Layout, *, images: int, accumulation: int, resolution: int
) -> Iterator[Traffic]:
    """What a step sends, REPA head aside."""
    rows, cols = work.model.grid(resolution, resolution)
    shape = StepShape(
        micro_batch=images,
        accumulation=accumulation,
        tokens=rows * cols,
        compute_bytes=work.compute_bytes,
        recompute=parallel.activation_checkpointing,
    )
    if parallel.engine == "fsdp":
        return fsdp_traffic(work.model, layout, shape)
    return zero_traffic(work.model, layout, shape, stage=parallel.zero_stage, persistent=work.persistent)


def compute_seconds(
    work: Workload, parallel: ParallelConfig, layout: Layout, device: Device, *, images: int, resolution: int
) -> dict[str, float]:
    """Seconds of a micro-batch on one rank by part, both passes; ``images`` are those of its dp rank."""
    model, tp, mode = work.model, layout.tp, parallel.activation_checkpointing
    flops = forward_flops_by_part(model, resolution, resolution)
    rate = {name: device.gemm_flops for name in flops}
    rate["attention"] = device.attention_flops
    if work.compute == "fp8" and device.fp8_flops:
        rate["linears"] = device.fp8_flops
    found = {}
    for name, count in flops.items():
        passes = 4.0 if mode == "full" and name in RECOMPUTED else 3.0
        found[name] = passes * count / rate[name] / (1 if name in REPLICATED else tp)
    rows, cols = model.grid(resolution, resolution)
    moved = _blocks_moved(work, tokens=rows * cols, tp=tp, device=device, recomputed=mode != "none")
    found["norms and gates"] = moved / device.copy_bytes_per_s
    found["decoder"] += sum(decoder_moved(work, resolution=resolution, tp=tp)) / device.copy_bytes_per_s
    pixels = model.channels * resolution**2 / tp
    head = 6.0 * work.repa_parameters * rows * cols / tp / device.gemm_flops
    found["losses"] = head + LOSS_BYTES * pixels / device.copy_bytes_per_s
    # Encoders split the batch over tp; bf16 on a GPU whatever the model computes in.
    found["encoders"] = sum(e.flops(resolution) for e in work.encoders if e.runs) / tp / device.gemm_flops
    return {name: images * seconds for name, seconds in found.items()}


def _blocks_moved(work: Workload, *, tokens: int, tp: int, device: Device, recomputed: bool) -> float:
    model, total = work.model, 0.0
    for count, length, context, rotary in (
        (model.num_blocks, tokens, model.text_tokens, True),
        (model.num_text_blocks, model.text_tokens, 0, False),
    ):
        if count:
            forward, backward = block_moved(
                work, tokens=length, context=context, rotary=rotary, tp=tp, kind=device.kind
            )
            total += count * (forward * (2 if recomputed else 1) + backward)
    return total


def optimizer_seconds(work: Workload, parallel: ParallelConfig, layout: Layout, device: Device) -> float:
    """Norm, clipping, AdamW and average over what a rank updates."""
    held = held_elements(work.model, layout, work.persistent)
    whole = parallel.engine == "deepspeed" and parallel.zero_stage == 0
    ranks = 1 if whole else layout.dp_shard
    elements = (held.whole if whole else held.cut) + work.repa_parameters / ranks
    return ADAMW_BYTES[work.fused] * elements / device.copy_bytes_per_s


def step_by_part(
    work: Workload,
    parallel: ParallelConfig,
    layout: Layout,
    device: Device,
    *,
    images: int,
    accumulation: int,
    resolution: int,
) -> dict[str, float]:
    """Seconds of a step by part; they sum to the step."""
    parts = compute_seconds(work, parallel, layout, device, images=images, resolution=resolution)
    issue = operations(work, recomputed=parallel.activation_checkpointing != "none") * device.launch_s
    idle = issue if device.kind == "cpu" else max(0.0, issue - sum(parts.values()))
    found = {name: accumulation * seconds for name, seconds in {**parts, "host": idle}.items()}
    computing = sum(found.values())
    lines = step_traffic(work, parallel, layout, images=images, accumulation=accumulation, resolution=resolution)
    hidden, exposed = split_by_overlap(
        lines, layout, device, engine=parallel.engine, zero_stage=parallel.zero_stage
    )
    units = work.model.num_blocks + work.model.num_text_blocks + 1
    found["communication"] = exposed + max(hidden - computing, hidden / units)
    found["optimizer"] = optimizer_seconds(work, parallel, layout, device)
    return found

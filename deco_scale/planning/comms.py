"""Communication of a training step: bytes of each collective under either engine, and the time they take.

Bytes are those of the full tensor that a collective gathers or reduces, per rank and step: outputs of all-gathers,
inputs of reduce-scatters and all-reduces. Scalars (losses, norm) are left out.
``tests/distributed/test_communication.py`` counts a real step and compares.

A collective over n ranks moves (n - 1) / n of the full tensor through every rank, an all-reduce twice that.
Between m nodes (m - 1) / m of it enters each node, through the network adapters of the group's ranks there. NVLink
and network work at the same time, so the slower one counts; latency is left out.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deco_scale.models import ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import part_sizes
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.hardware import GPUS_PER_NODE, Device
from deco_scale.planning.parameters import layout_rows, weights_of_linears

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """One line of the table."""

    what: str
    kind: Kind
    axis: str
    bytes: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes on one rank."""

    micro_batch: int
    accumulation: int
    tokens: int
    compute_bytes: int
    recompute: ActivationCheckpointing = "none"


def fsdp_traffic(cfg: ModelConfig, dims: ParallelDims, step: StepShape) -> Iterator[Traffic]:
    """Lines for the denoiser (REPA head aside); axes of one rank send nothing."""
    rows = layout_rows(cfg, dims)
    shards, micros = dims.dp_shard, step.accumulation

    def padded(row_shape: tuple[int, ...]) -> int:
        """Elements as FSDP sends them: dimension 0 padded to a multiple of the ranks."""
        count = -(-row_shape[0] // shards) * shards
        for size in row_shape[1:]:
            count *= size
        return count

    in_units = ("blocks.", "text_blocks.", "decoder.")
    units = sum(padded(r.tp_shape) for r in rows if r.name.startswith(in_units))
    root = sum(padded(r.tp_shape) for r in rows if not r.name.startswith(in_units))
    if shards > 1:
        # Units are gathered again in backward, what is left stays gathered.
        gathered = micros * (2 * units + root) * step.compute_bytes
        yield Traffic("weights", "all-gather", "dp_shard", gathered)
        yield Traffic("gradients", "reduce-scatter", "dp_shard", (units + root) * FP32_BYTES)
    if dims.dp_replicate > 1:
        yield Traffic("gradients", "all-reduce", "dp_replicate", (units + root) * FP32_BYTES // shards)
    if dims.tp > 1:
        # FSDP hands every block its inputs in the compute type, the text tokens too.
        yield from _tensor_parallel(cfg, dims, step, reductions=1, text_bytes=step.compute_bytes)


def zero_traffic(
    cfg: ModelConfig, dims: ParallelDims, step: StepShape, *, stage: int, persistent: int
) -> Iterator[Traffic]:
    """The same for DeepSpeed's ZeRO.

    Weights of at most ``persistent`` elements stay gathered under ZeRO-3 (its
    ``stage3_param_persistence_threshold``). Its prefetch may find up to one bucket of weights still there
    when backward begins; that saving is left out.
    """
    rows = layout_rows(cfg, dims)
    linear = weights_of_linears(cfg)
    dp, micros = dims.dp, step.accumulation

    def sent(name: str) -> int:
        """Bytes an element: ZeRO sends what linears own in the compute type, the rest in fp32."""
        return step.compute_bytes if stage and name in linear else FP32_BYTES

    if dp > 1 and stage < 3:
        gradients = sum(row.tp_numel * sent(row.name) for row in rows)
        # ZeRO-2 keeps only its part of a gradient, so every micro-batch is reduced.
        yield Traffic("gradients", "all-reduce", "dp", gradients * (micros if stage == 2 else 1))
        if stage:
            alignment = 2 * dp
            elements = -(-sum(row.tp_numel for row in rows) // alignment) * alignment
            yield Traffic("weights", "all-gather", "dp", elements * FP32_BYTES)
    if dp > 1 and stage == 3:
        gathered = reduced = 0
        for row in rows:
            part = -(-row.tp_numel // dp) * dp
            reduced += micros * part * sent(row.name)
            if row.tp_numel <= persistent:
                gathered += part * FP32_BYTES
            else:
                gathered += 2 * micros * part * sent(row.name)
        yield Traffic("weights", "all-gather", "dp", gathered)
        yield Traffic("gradients", "reduce-scatter", "dp", reduced)
    if dims.tp > 1:
        yield from _tensor_parallel(cfg, dims, step, reductions=micros, text_bytes=FP32_BYTES)


def _tensor_parallel(
    cfg: ModelConfig, dims: ParallelDims, step: StepShape, *, reductions: int, text_bytes: int
) -> Iterator[Traffic]:
    """``reductions``: how often in a step the gradients of replicated weights are summed.

    ``text_bytes``: size of an element of the text tokens as they leave the last text block.
    """
    tp = dims.tp
    replicated = sum(row.tp_numel for row in layout_rows(cfg, dims) if row.split == "replicated")

    def sent(tokens: int, element_bytes: int = step.compute_bytes) -> int:
        """Bytes of one gather or scatter of a sequence, parts padded to the longest."""
        return step.micro_batch * tp * part_sizes(tokens, tp)[0] * cfg.dim * element_bytes

    image = cfg.num_blocks * 2 * sent(step.tokens)
    text = cfg.num_text_blocks * 2 * sent(cfg.text_tokens)
    whole_text = sent(cfg.text_tokens, text_bytes) if cfg.num_text_blocks else 0
    # Recomputed blocks gather and scatter once more; the last block's text gather lies outside of it.
    forwards = 1 if step.recompute == "none" else 2
    blocks = image + text
    # Backward turns every gather into a scatter and the other way round.
    gathers = forwards * blocks + blocks + whole_text
    scatters = forwards * blocks + blocks + whole_text
    yield Traffic("tokens", "all-gather", "tp", step.accumulation * gathers)
    yield Traffic("tokens", "reduce-scatter", "tp", step.accumulation * scatters)
    yield Traffic("gradients of replicated weights", "all-reduce", "tp", reductions * replicated * FP32_BYTES)


def ranks_per_node(dims: ParallelDims, axis: str, world: int) -> tuple[int, int]:
    """Ranks of one group along ``axis``, and how many of them share a node; tp is innermost."""
    size, inner = {
        "tp": (dims.tp, 1),
        "dp_shard": (dims.dp_shard, dims.tp),
        "dp": (dims.dp, dims.tp),
        "dp_replicate": (dims.dp_replicate, dims.tp * dims.dp_shard),
    }[axis]
    return size, max(1, min(size, min(world, GPUS_PER_NODE) // inner))


def seconds_of(line: Traffic, dims: ParallelDims, device: Device) -> float:
    """Time of one line of the traffic table, alone on the links."""
    world = dims.dp * dims.tp
    size, together = ranks_per_node(dims, line.axis, world)
    if size == 1:
        return 0.0
    ways = 2 if line.kind == "all-reduce" else 1
    nodes = -(-size // together)
    inside = ways * line.bytes * (size - 1) / size / device.nvlink_bytes_per_s if together > 1 else 0.0
    between = ways * line.bytes * (nodes - 1) / nodes / (together * device.network_bytes_per_s)
    return max(inside, between)


def split_by_overlap(
    lines: Iterable[Traffic], dims: ParallelDims, device: Device, *, engine: str, zero_stage: int
) -> tuple[float, float]:
    """Seconds of a step that may hide behind computation, and seconds that cannot.

    fsdp overlaps gathers and gradient reductions, ZeRO-3 the gathers, ZeRO-2 the gradient reductions. Tensor
    parallelism waits for its tokens, ZeRO-1 and 2 gather updated weights at the end of the step.
    """
    hidden = exposed = 0.0
    for line in lines:
        seconds = seconds_of(line, dims, device)
        gradients = line.what == "gradients"
        if line.axis == "tp":
            overlaps = False
        elif engine == "fsdp":
            overlaps = True
        else:
            overlaps = (zero_stage == 3 and not gradients) or (zero_stage == 2 and gradients)
        hidden, exposed = hidden + seconds * overlaps, exposed + seconds * (not overlaps)
    return hidden, exposed

"""Communication of a training step: bytes of each collective under either engine, and the time they take.

Bytes are those of the full tensor that a collective gathers or reduces, per rank and step: outputs of all-gathers,
inputs of reduce-scatters and all-reduces. Scalars (losses, norm) are left out.
``tests/distributed/test_communication.py`` counts a real step and compares.

A collective over n ranks moves (n - 1) / n of the full tensor through every rank, an all-reduce twice that.
Between m nodes (m - 1) / m of it enters each node, through the network adapters of the group's ranks there. NVLink
and network work at the same time, so the slower one counts. Each call also has a latency, which grows with the
ranks of its group and not with the bytes: a ring takes n - 1 steps, m - 1 of them between nodes. Where a message
is short for its group, this is most of the time.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from deco_scale.models.tp_plan import part_sizes
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.flops import TrainStep
from deco_scale.planning.hardware import GPUS_PER_NODE, Device
from deco_scale.planning.memory import FP32, Row, layout_rows, num_gathered


class Traffic(NamedTuple):
    """One line of the table; ``calls``: collectives among which the bytes are divided."""

    what: str
    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    axis: str
    bytes: int
    calls: int = 1


def step_traffic(step: TrainStep) -> Iterator[Traffic]:
    """What a step sends for the denoiser (REPA head aside); axes of one rank send nothing."""
    return _fsdp_traffic(step) if step.parallel.engine == "fsdp" else _zero_traffic(step)


def _fsdp_traffic(step: TrainStep) -> Iterator[Traffic]:
    shards, compute_bytes = step.dims.dp_shard, step.work.compute_bytes
    reduce_bytes = 2 if step.parallel.reduce_dtype == "bf16" else FP32
    units = root = 0
    rows = layout_rows(step.work.model, step.dims)
    num_units = num_gathered(step)
    for row in rows:
        # As FSDP sends it: dimension 0 padded to a multiple of the ranks.
        padded = -(-row.tp_shape[0] // shards) * shards * math.prod(row.tp_shape[1:])
        units, root = (units + padded, root) if row.unit else (units, root + padded)
    if shards > 1:
        # Units are gathered again in backward, what is left stays gathered; or all of it, once in a step.
        gathered, calls = units + root, num_units + 1
        if not step.keeps_weights:
            gathered, calls = step.accumulation * (2 * units + root), step.accumulation * (2 * num_units + 1)
        yield Traffic("weights", "all-gather", "dp_shard", gathered * compute_bytes, calls)
        yield Traffic("gradients", "reduce-scatter", "dp_shard", (units + root) * reduce_bytes, num_units + 1)
    if step.dims.dp_replicate > 1:
        reduced = (units + root) * reduce_bytes // shards
        yield Traffic("gradients", "all-reduce", "dp_replicate", reduced, num_units + 1)
    replicated = _replicated_bytes(step, element_bytes=reduce_bytes)
    # FSDP hands every block its inputs in the compute type, the text tokens too.
    yield from _tensor_parallel(step, replicated=replicated, calls=num_units + 1, text_bytes=compute_bytes)


def _zero_traffic(step: TrainStep) -> Iterator[Traffic]:
    """The lines of DeepSpeed's ZeRO.

    Weights of at most ``work.persistent`` elements stay gathered under ZeRO-3 (its
    ``stage3_param_persistence_threshold``). Its prefetch may find up to one bucket of weights still there
    when backward starts; that saving is left out.
    """
    stage, dp, micros = step.parallel.zero_stage, step.dims.dp, step.accumulation
    rows = layout_rows(step.work.model, step.dims)

    def sent(row: Row) -> int:
        """Bytes an element: ZeRO sends what linears own in the compute type, the rest in fp32."""
        return step.work.compute_bytes if stage and row.of_linear else FP32

    if dp > 1 and stage < 3:
        gradients = sum(row.tp_numel * sent(row) for row in rows)
        # ZeRO-2 keeps only its part of a gradient, so every micro-batch is reduced.
        reductions = micros if stage == 2 else 1
        buckets = -(-sum(row.tp_numel for row in rows) // step.work.reduce_bucket)
        yield Traffic("gradients", "all-reduce", "dp", gradients * reductions, buckets * reductions)
        if stage:
            elements = -(-sum(row.tp_numel for row in rows) // (2 * dp)) * 2 * dp
            yield Traffic("weights", "all-gather", "dp", elements * FP32)
    if dp > 1 and stage == 3:
        gathered = reduced = 0
        # A unit's weights are gathered when it runs; gradients are reduced by buckets, of each number format.
        units = {row.unit or row.name.rpartition(".")[0] for row in rows if row.tp_numel > step.work.persistent}
        buckets = -(-sum(row.tp_numel for row in rows) // step.work.reduce_bucket) + 1
        times = 1 if step.keeps_weights else 2 * micros
        for row in rows:
            part = -(-row.tp_numel // dp) * dp
            reduced += micros * part * sent(row)
            persistent = row.tp_numel <= step.work.persistent
            gathered += part * (FP32 if persistent else times * sent(row))
        yield Traffic("weights", "all-gather", "dp", gathered, times * len(units) + 1)
        yield Traffic("gradients", "reduce-scatter", "dp", reduced, micros * buckets)
    # ZeRO-3 sums a rank's parts before the update, at once; the other stages whole gradients, one by one.
    if stage == 3:
        yield from _tensor_parallel(step, replicated=_replicated_bytes(step, dp=dp), calls=1, text_bytes=FP32)
        return
    calls = micros * sum(row.split == "replicated" for row in rows)
    yield from _tensor_parallel(step, replicated=micros * _replicated_bytes(step), calls=calls, text_bytes=FP32)


def _replicated_bytes(step: TrainStep, *, dp: int = 1, element_bytes: int = FP32) -> int:
    """Of the gradients of weights that are not split over tp, each cut into ``dp`` parts of which one counts."""
    rows = layout_rows(step.work.model, step.dims)
    return element_bytes * sum(-(-row.tp_numel // dp) for row in rows if row.split == "replicated")


def _tensor_parallel(step: TrainStep, *, replicated: int, calls: int, text_bytes: int) -> Iterator[Traffic]:
    """``replicated``: bytes of the gradients of replicated weights that are summed in a step, in ``calls``.

    ``text_bytes``: size of an element of the text tokens as they leave the last text block.
    """
    cfg, tp = step.work.model, step.dims.tp
    if tp == 1:
        return

    def sent(tokens: int, element_bytes: int = step.work.compute_bytes) -> int:
        """Bytes of one gather or scatter of a sequence, parts padded to the longest."""
        return step.micro_batch * tp * part_sizes(tokens, tp)[0] * cfg.dim * element_bytes

    image = cfg.num_blocks * 2 * sent(step.tokens)
    text = cfg.num_text_blocks * 2 * sent(cfg.text_tokens)
    whole_text = sent(cfg.text_tokens, text_bytes) if cfg.num_text_blocks else 0
    # Recomputed blocks gather and scatter once more; the last block's text gather lies outside of it. Backward
    # turns every gather into a scatter and the other way round, so that both are as many.
    passes = 3 if step.recomputes else 2
    total = step.accumulation * (passes * (image + text) + whole_text)
    image_calls = passes * 2 * (cfg.num_blocks + cfg.num_text_blocks) + (whole_text > 0)
    yield Traffic("tokens", "all-gather", "tp", total, step.accumulation * image_calls)
    yield Traffic("tokens", "reduce-scatter", "tp", total, step.accumulation * image_calls)
    yield Traffic("gradients of replicated weights", "all-reduce", "tp", replicated, calls)


def seconds_of(line: Traffic, dims: ParallelDims, device: Device) -> float:
    """Time of one line of the traffic table, alone on the links."""
    # Ranks of a group, and how many ranks lie between two of them; tp is innermost.
    size, stride = {
        "tp": (dims.tp, 1),
        "dp_shard": (dims.dp_shard, dims.tp),
        "dp": (dims.dp, dims.tp),
        "dp_replicate": (dims.dp_replicate, dims.tp * dims.dp_shard),
    }[line.axis]
    if size == 1:
        return 0.0
    together = max(1, min(size, min(dims.dp * dims.tp, GPUS_PER_NODE) // stride))  # on one node
    ways = 2 if line.kind == "all-reduce" else 1
    nodes = -(-size // together)
    inside = ways * line.bytes * (size - 1) / size / device.link_bytes_per_s if together > 1 else 0.0
    between = ways * line.bytes * (nodes - 1) / nodes / (together * device.network_bytes_per_s)
    return max(inside, between) + line.calls * _latency_s(size, nodes, ways, device)


def _latency_s(size: int, nodes: int, ways: int, device: Device) -> float:
    """Of one collective: a ring's steps, or, for an all-reduce over many nodes, a tree's."""
    call_s, link_s, network_s = device.latency
    steps = (size - nodes) * link_s + (nodes - 1) * network_s
    if ways == 2:
        steps = min(steps, (-(-size // nodes) - 1) * link_s + math.ceil(math.log2(nodes)) * network_s)
    return device.latency_scale * (call_s + ways * steps)

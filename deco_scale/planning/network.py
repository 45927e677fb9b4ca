"""How long collectives take over NVLink within a node and the network between nodes.

A collective over n ranks moves (n - 1) / n of the whole tensor through every rank, an all-reduce twice that.
Between m nodes (m - 1) / m of it enters each node, through the network adapters of those ranks of the group that
are in the node. Both go on at the same time, so the slower one counts; latency is left out.
"""

from collections.abc import Iterable

from deco_scale.parallel.layout import Layout
from deco_scale.planning.communication import Traffic
from deco_scale.planning.hardware import GPUS_PER_NODE, Device


def ranks_per_node(layout: Layout, axis: str, world: int) -> tuple[int, int]:
    """Ranks of one group along ``axis``, and how many of them share a node; tp is innermost."""
    size, inner = {
        "tp": (layout.tp, 1),
        "dp_shard": (layout.dp_shard, layout.tp),
        "dp": (layout.dp, layout.tp),
        "dp_replicate": (layout.dp_replicate, layout.tp * layout.dp_shard),
    }[axis]
    return size, max(1, min(size, min(world, GPUS_PER_NODE) // inner))


def seconds_of(line: Traffic, layout: Layout, device: Device) -> float:
    """Time of one line of the traffic table, alone on the links."""
    world = layout.dp * layout.tp
    size, together = ranks_per_node(layout, line.axis, world)
    if size == 1:
        return 0.0
    ways = 2 if line.kind == "all-reduce" else 1
    nodes = -(-size // together)
    inside = ways * line.bytes * (size - 1) / size / device.nvlink_bytes_per_s if together > 1 else 0.0
    between = ways * line.bytes * (nodes - 1) / nodes / (together * device.network_bytes_per_s)
    return max(inside, between)


def split_by_overlap(
    lines: Iterable[Traffic], layout: Layout, device: Device, *, engine: str, zero_stage: int
) -> tuple[float, float]:
    """Seconds of a step that may hide behind computation, and seconds that cannot.

    fsdp overlaps gathers and gradient reductions, ZeRO-3 the gathers, ZeRO-2 the gradient reductions. Tensor
    parallelism waits for its tokens, ZeRO-1 and 2 gather updated weights at the end of the step.
    """
    hidden = exposed = 0.0
    for line in lines:
        seconds = seconds_of(line, layout, device)
        gradients = line.what == "gradients"
        if line.axis == "tp":
            overlaps = False
        elif engine == "fsdp":
            overlaps = True
        else:
            overlaps = (zero_stage == 3 and not gradients) or (zero_stage == 2 and gradients)
        hidden, exposed = hidden + seconds * overlaps, exposed + seconds * (not overlaps)
    return hidden, exposed

"""Checks of what lies between ranks: collectives by size, links between neighbours, clocks."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from launcher.preflight_report import Group, Place, Row, gathered, span

ROUNDS = 5
PINGS = 8
LINK_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}
SIZES = {
    "cuda": (4 * 2**10, 256 * 2**10, 16 * 2**20, 256 * 2**20),
    "cpu": (4 * 2**10, 256 * 2**10, 4 * 2**20),
}
"""Bytes of a message, by the kind of device."""


@dataclass(frozen=True, slots=True)
class Offset:
    """How far a clock is ahead of rank 0's, and how wrong that may be, in seconds."""

    seconds: float
    uncertainty: float


def check_collectives(
    device: torch.device,
    group: dist.ProcessGroup | None,
    places: Sequence[Place],
    *,
    least_gbps: float | None,
    sizes: Sequence[int] | None = None,
) -> Group:
    """Latency and bus bandwidth of collectives, and the links from each rank to the next. All ranks together.

    Bus bandwidth counts what each rank sends in a ring: 2(n-1)/n of an all_reduce, (n-1)/n of an all_gather.
    ``least_gbps`` (GB/s) refuses slower links.
    """
    world = len(places)
    if world == 1:
        return Group("collectives", (Row("all_reduce, all_gather", "one process: nothing to measure"),))
    rows = []
    for name, run, factor in (("all_reduce", _all_reduce, 2.0), ("all_gather", _all_gather, 1.0)):
        for size in sizes or SIZES[device.type]:
            times, right = _timed(partial(run, size, device, group, world))
            everywhere = gathered((statistics.median(times), right))
            slowest = max(found[0] for found in everywhere)
            bus = factor * (world - 1) / world * size / slowest / 1e9
            wrong = [p for p, found in zip(places, everywhere, strict=True) if not found[1]]
            advice = "wrong sums arrived: check its network card and cables"
            value = f"{1e6 * slowest:,.0f} us, {bus:.3g} GB/s"
            rows.append(Row(f"{name} of {_size(size)}", value, tuple(f"{p}: {advice}" for p in wrong)))
    return Group("collectives", (*rows, _links(device, group, places, least_gbps)))


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB"


def _timed(run: Callable[[], bool]) -> tuple[list[float], bool]:
    """Seconds of each round, the first left out, and whether all results were right."""
    times, right = [], True
    for _ in range(ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        right = run() and right
        times.append(time.perf_counter() - start)
    return times[1:], right


def _all_reduce(size: int, device: torch.device, group: dist.ProcessGroup | None, world: int) -> bool:
    values = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values, group=group)
    wanted = world * (world + 1) / 2
    return bool((values == wanted).all().item())


def _all_gather(size: int, device: torch.device, group: dist.ProcessGroup | None, world: int) -> bool:
    part = torch.full((max(1, size // 4 // world),), float(dist.get_rank()), device=device)
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part, group=group)
    return all(bool((found == rank).all().item()) for rank, found in enumerate(parts))


def _links(
    device: torch.device, group: dist.ProcessGroup | None, places: Sequence[Place], least: float | None
) -> Row:
    """GB/s from each rank to the next; every second pair at a time, so that pairs do not share a rank."""
    rank, world = dist.get_rank(), len(places)
    values = torch.zeros(LINK_BYTES[device.type] // 4, device=device)
    found: dict[int, float] = {}
    for first in (0, 1):
        dist.barrier()
        if (rank - first) % 2 == 0 and rank >= first and rank + 1 < world:
            found[rank] = _exchange(values, rank + 1, group, device)
        elif (rank - first) % 2 == 1 and rank > first:
            _exchange(values, rank - 1, group, device)
    speeds = {r: values.nbytes / seconds / 1e9 for part in gathered(found) for r, seconds in part.items()}
    order = sorted(speeds)
    value = span([speeds[r] for r in order], [places[r] for r in order], "GB/s to the next rank")
    problems = [
        f"{places[r]} to {places[r + 1]}: {speeds[r]:.3g} GB/s, wanted {least:.3g} (--min-gbps); check the "
        "network between them"
        for r in order
        if least is not None and speeds[r] < least
    ]
    return Row("links", value, tuple(problems))


def _exchange(values: torch.Tensor, other: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Seconds until a message has gone both ways at once, the faster of two tries."""
    received, best = torch.empty_like(values), float("inf")
    for _ in range(2):
        start = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, values, other, group), dist.P2POp(dist.irecv, received, other, group),
        ]  # fmt: skip
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def check_clocks(places: Sequence[Place], *, most_s: float, clock: Callable[[], float]) -> Group:
    """Clocks of all nodes against rank 0's; one surely off by over ``most_s`` is refused. All ranks together."""
    leaders = [place.rank for place in places if place.local_rank == 0 and place.rank != 0]
    mine: dict[int, Offset] = {}
    for leader in leaders:
        # One after the other: answers must not wait for each other.
        if dist.get_rank() == 0:
            mine[leader] = _ask(leader, clock)
        elif dist.get_rank() == leader:
            _answer(clock)
        dist.barrier()
    offsets = gathered(mine)[0]
    if not offsets:
        return Group("clocks", (Row("clock", "one node: nothing to compare"),))
    problems = [
        f"{places[r]}: its clock is {o.seconds:+.3f} s (+- {o.uncertainty:.3f}) from rank 0's on "
        f"{places[0].host}; start its time service (chrony or ntpd)"
        for r, o in offsets.items()
        if abs(o.seconds) - o.uncertainty > most_s
    ]
    worst = max(offsets, key=lambda r: abs(offsets[r].seconds))
    value = f"{offsets[worst].seconds:+.4f} s (+- {offsets[worst].uncertainty:.4f}) at most ({places[worst]})"
    return Group("clocks", (Row("offset from rank 0", value, tuple(problems)),))


def estimate_offset(pings: Sequence[tuple[float, float, float]]) -> Offset:
    """From (sent, clock there, received): the ping with the shortest way, in its middle (RFC 5905, section 8).

    The truth lies within half of that ping's round trip, whatever the two ways' shares.
    """
    sent, there, received = min(pings, key=lambda ping: ping[2] - ping[0])
    return Offset(there - (sent + received) / 2, (received - sent) / 2)


def _ask(leader: int, clock: Callable[[], float]) -> Offset:
    message, pings = torch.zeros(1, dtype=torch.float64), []
    for _ in range(PINGS):
        sent = clock()
        dist.send(message, leader)
        dist.recv(message, leader)
        pings.append((sent, float(message.item()), clock()))
    return estimate_offset(pings)


def _answer(clock: Callable[[], float]) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(message, 0)
        message[0] = clock()
        dist.send(message, 0)

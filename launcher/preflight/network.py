"""Checks between ranks: who joins, collectives by size, links between neighbours, clocks."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from data_pipeline.text import human_bytes
from deco_scale.distributed.bootstrap import Environment, init_distributed
from deco_scale.distributed.collectives import broadcast_object, gather_objects
from deco_scale.errors import RunError
from launcher.preflight.report import Check, RankInfo, format_range, problems_by_rank

ROUNDS = 5
PINGS = 8
_POLL_S = 0.2
LINK_BYTES = {"cuda": 64 * 2**20, "cpu": 2**20}
SIZES = {"cuda": (4 * 2**10, 256 * 2**10, 16 * 2**20, 256 * 2**20), "cpu": (4 * 2**10, 256 * 2**10, 4 * 2**20)}
"""Bytes of a message, by the kind of device."""


class Offset(NamedTuple):
    """How far a clock is ahead of rank 0's, with its uncertainty, in seconds."""

    seconds: float
    uncertainty: float


def join_process_group(env: Environment, variables: Mapping[str, str], *, timeout_s: float, host: str) -> None:
    """Form a gloo group; raises :class:`RunError` that names the ranks missing after ``timeout_s``."""
    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        init_distributed(env, torch.device("cpu"))
        return
    address, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    # torchrun's agent has the store already.
    serve = env.rank == 0 and variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    try:
        raw = dist.TCPStore(address, port, is_master=serve, timeout=timeout, wait_for_workers=False)
        store = dist.PrefixStore(f"preflight{variables.get('TORCHELASTIC_RESTART_COUNT', '')}", raw)
        store.set(f"joined{env.rank}", host)
        if env.rank == 0:
            store.set("verdict", _describe_missing(store, env.world_size, timeout_s) or "all")
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s))
        verdict = store.get("verdict").decode()
        if verdict == "all":
            dist.init_process_group("gloo", store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
            return
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise RunError(f"rank {env.rank} on {host} does not reach {address}:{port}: {error}") from error
    # Leave the server up until the others have read why.
    time.sleep(1.0 if serve else 0.0)
    raise RunError(verdict)


def _describe_missing(store: dist.Store, world: int, timeout_s: float) -> str | None:
    """A sentence about ranks that have not joined in time, None if all have."""
    missing, deadline = list(range(world)), time.monotonic() + timeout_s
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"joined{rank}"])]
        time.sleep(_POLL_S if missing else 0.0)
    if not missing:
        return None
    joined = sorted(set(range(world)) - set(missing))
    hosts = Counter(store.get(f"joined{rank}").decode() for rank in joined)
    names = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
    return (
        f"{len(missing)} of {world} ranks did not join within {timeout_s:.0f} s: {names}; joined: "
        + ", ".join(f"{count} on {host}" for host, count in hosts.items())
        + ". Check that the other nodes run and reach MASTER_ADDR"
    )


def check_collectives(
    device: torch.device, group: dist.ProcessGroup | None, ranks: Sequence[RankInfo], *, min_gbps: float | None
) -> list[Check]:
    """Latency and bus bandwidth of collectives, and the links from each rank to the next. All ranks together.

    Bus bandwidth counts what each rank sends in a ring: 2(n-1)/n of an all_reduce, (n-1)/n of an all_gather.
    ``min_gbps`` (GB/s) refuses slower links.
    """
    world = len(ranks)
    if world == 1:
        return [Check("all_reduce, all_gather", "one process: nothing to measure")]
    checks = []
    advice = "wrong sums arrived: check its network card and cables"
    for name, run, factor in (("all_reduce", _all_reduce, 2.0), ("all_gather", _all_gather, 1.0)):
        for size in SIZES[device.type]:
            times, right = _timed(partial(run, size, device, group, world))
            medians, correct = zip(*gather_objects((statistics.median(times), right)), strict=True)
            bus = factor * (world - 1) / world * size / max(medians) / 1e9
            problems = problems_by_rank(ranks, correct, lambda ok: None if ok else advice)
            value = f"{1e6 * max(medians):,.0f} us, {bus:.3g} GB/s"
            checks.append(Check(f"{name} of {human_bytes(size)}", value, problems))
    return [*checks, _links(device, group, ranks, min_gbps)]


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
    return bool((values == world * (world + 1) / 2).all().item())


def _all_gather(size: int, device: torch.device, group: dist.ProcessGroup | None, world: int) -> bool:
    part = torch.full((max(1, size // 4 // world),), float(dist.get_rank()), device=device)
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part, group=group)
    return all(bool((values == rank).all().item()) for rank, values in enumerate(parts))


def _links(
    device: torch.device, group: dist.ProcessGroup | None, ranks: Sequence[RankInfo], min_gbps: float | None
) -> Check:
    """GB/s from each rank to the next; every second pair at a time, so that pairs do not share a rank."""
    rank, world = dist.get_rank(), len(ranks)
    values = torch.zeros(LINK_BYTES[device.type] // 4, device=device)
    seconds: dict[int, float] = {}
    for first in (0, 1):
        dist.barrier()
        if (rank - first) % 2 == 0 and rank >= first and rank + 1 < world:
            seconds[rank] = _exchange(values, rank + 1, group, device)
        elif (rank - first) % 2 == 1 and rank > first:
            _exchange(values, rank - 1, group, device)
    speeds = {r: values.nbytes / s / 1e9 for part in gather_objects(seconds) for r, s in part.items()}
    order = sorted(speeds)
    value = format_range([speeds[r] for r in order], [ranks[r] for r in order], "GB/s to the next rank")
    problems = [
        f"{ranks[r]} to {ranks[r + 1]}: {speeds[r]:.3g} GB/s, expected at least {min_gbps:.3g} (--min-gbps); "
        "check the network between them"
        for r in order
        if min_gbps is not None and speeds[r] < min_gbps
    ]
    return Check("links", value, problems)


def _exchange(values: torch.Tensor, other: int, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Seconds until a message has gone both ways at once, the faster of two tries."""
    send, receive = ((dist.isend, values), (dist.irecv, torch.empty_like(values)))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        operations = [dist.P2POp(function, tensor, other, group) for function, tensor in (send, receive)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def check_clocks(ranks: Sequence[RankInfo], *, max_skew_s: float) -> list[Check]:
    """Refuses nodes whose clock surely differs from rank 0's by over ``max_skew_s``. All ranks together."""
    mine: dict[int, Offset] = {}
    for leader in [rank.rank for rank in ranks[1:] if rank.local_rank == 0]:
        # One after the other: answers must not wait for each other.
        if dist.get_rank() == 0:
            mine[leader] = _ask(leader)
        elif dist.get_rank() == leader:
            _answer()
        dist.barrier()
    offsets = broadcast_object(mine)
    if not offsets:
        return [Check("clock", "one node: nothing to compare")]
    problems = [
        f"{ranks[r]}: its clock is {o.seconds:+.3f} s (+- {o.uncertainty:.3f}) from rank 0's on "
        f"{ranks[0].host}; start its time service (chrony or ntpd)"
        for r, o in offsets.items()
        if abs(o.seconds) - o.uncertainty > max_skew_s
    ]
    worst = max(offsets, key=lambda r: abs(offsets[r].seconds))
    value = f"{offsets[worst].seconds:+.4f} s (+- {offsets[worst].uncertainty:.4f}) at most ({ranks[worst]})"
    return [Check("offset from rank 0", value, problems)]


def estimate_offset(pings: Sequence[tuple[float, float, float]]) -> Offset:
    """From (sent, clock there, received): the ping with the shortest way, in its middle (RFC 5905, section 8).

    The truth lies within half of that ping's round trip, whatever the two ways' shares.
    """
    sent, there, received = min(pings, key=lambda ping: ping[2] - ping[0])
    return Offset(there - (sent + received) / 2, (received - sent) / 2)


def _ask(leader: int) -> Offset:
    message, pings = torch.zeros(1, dtype=torch.float64), []
    for _ in range(PINGS):
        sent = time.time()
        dist.send(message, leader)
        dist.recv(message, leader)
        pings.append((sent, float(message.item()), time.time()))
    return estimate_offset(pings)


def _answer() -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(message, 0)
        message[0] = time.time()
        dist.send(message, 0)

"""CPU binding: each rank, with its threads and later children, runs on the cores of its GPU's NUMA node.

A process is only ever bound to CPUs that it may use already (cpuset of its container, taskset, SLURM's binding).
``torch.numa`` does this for torchrun's workers and needs numactl; this is for any launcher.
"""

import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from deco_scale.distributed.collectives import gather_objects

logger = logging.getLogger(__name__)

CpuBinding = Literal["auto", "numa", "none"]
SYSFS = Path("/sys")


class RankCpus(NamedTuple):
    """What a rank knows: its host, the physical cores it may use (each a set of CPUs), and its GPU's NUMA node.

    ``numa`` is the node with its CPUs; None: unknown.
    """

    host: str
    cores: tuple[frozenset[int], ...]
    numa: tuple[int, frozenset[int]] | None

    @property
    def allowed(self) -> frozenset[int]:
        return frozenset().union(*self.cores)


class Binding(NamedTuple):
    """CPUs of a rank, how many ranks of its host share them, and the reason in words."""

    cpus: frozenset[int]
    sharers: int
    reason: str


def should_bind(setting: CpuBinding, variables: Mapping[str, str]) -> bool:
    """``auto`` binds in a SLURM job; :mod:`launcher.submit` passes ``numa`` to the hosts that it starts."""
    return setting == "numa" or (setting == "auto" and "SLURM_JOB_ID" in variables)


def bind_cpus(device: torch.device) -> list[str]:
    """Bind this process to its CPUs and return lines about all ranks for the log; all ranks together.

    Data workers and the watchdog's sidecar, started later, inherit the binding. PyTorch's threads are reduced to
    the rank's share unless OMP_NUM_THREADS is set.
    """
    me = RankCpus(socket.gethostname(), allowed_cores(os.sched_getaffinity(0)), gpu_numa(pci_address(device)))
    ranks = gather_objects(me)
    bindings = plan_bindings(ranks)
    mine = bindings[dist.get_rank()]
    try:
        _bind_threads(mine.cpus)
    except OSError as error:
        logger.warning("CPUs could not be bound (%s); training continues on %s", error, format_cpus(me.allowed))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(mine.cpus) // mine.sharers))
    return describe([each.host for each in ranks], bindings)


def plan_bindings(ranks: Sequence[RankCpus]) -> list[Binding]:
    """A binding for every rank.

    With a known NUMA node: those of its CPUs that are allowed. Else the cores are divided among the ranks of the
    host that may use the same ones. A rank keeps what it has if nothing of its NUMA node is allowed, or if there
    are fewer cores than ranks.
    """
    peers: dict[tuple[str, frozenset[int]], list[int]] = {}
    for number, rank in enumerate(ranks):
        peers.setdefault((rank.host, rank.allowed), []).append(number)
    chosen = [_choose(rank, number, peers[rank.host, rank.allowed]) for number, rank in enumerate(ranks)]
    uses: dict[tuple[str, frozenset[int]], int] = {}
    for rank, (cpus, _) in zip(ranks, chosen, strict=True):
        uses[rank.host, cpus] = uses.get((rank.host, cpus), 0) + 1
    return [
        Binding(cpus, uses[rank.host, cpus], reason) for rank, (cpus, reason) in zip(ranks, chosen, strict=True)
    ]


def _choose(rank: RankCpus, number: int, peers: Sequence[int]) -> tuple[frozenset[int], str]:
    allowed = rank.allowed
    if rank.numa is not None:
        node, cpus = rank.numa
        if cpus & allowed:
            return cpus & allowed, f"NUMA node {node}"
        return allowed, f"unchanged: no allowed CPU is on NUMA node {node} of its GPU"
    if len(peers) == 1:
        return allowed, "unchanged: no other rank may use them"
    count, place = len(rank.cores), peers.index(number)
    if count < len(peers):
        return allowed, f"unchanged: {len(peers)} ranks on {count} cores"
    share = rank.cores[place * count // len(peers) : (place + 1) * count // len(peers)]
    return frozenset().union(*share), f"1/{len(peers)} of the cores"


def describe(hosts: Sequence[str], bindings: Sequence[Binding]) -> list[str]:
    """One line for all hosts that are bound alike."""
    by_host: dict[str, list[str]] = {}
    for host, binding in zip(hosts, bindings, strict=True):
        ranks = by_host.setdefault(host, [])
        ranks.append(f"local rank {len(ranks)}: CPUs {format_cpus(binding.cpus)} ({binding.reason})")
    alike: dict[str, list[str]] = {}
    for host, parts in by_host.items():
        alike.setdefault("; ".join(parts), []).append(host)
    return [
        f"CPU binding on {same[0]}" + (f" and {len(same) - 1} more hosts" if len(same) > 1 else "") + f": {text}"
        for text, same in alike.items()
    ]


def pci_address(device: torch.device) -> str | None:
    """Address of a GPU in sysfs, such as ``0000:3b:00.0``."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def gpu_numa(pci: str | None, sysfs: Path = SYSFS) -> tuple[int, frozenset[int]] | None:
    """NUMA node of a PCI device and its CPUs; None where the kernel does not know (node -1, or no such file)."""
    if pci is None:
        return None
    folder = sysfs / "bus/pci/devices" / pci
    with suppress(OSError, ValueError):
        node = int((folder / "numa_node").read_text())
        cpus = parse_cpus((folder / "local_cpulist").read_text())
        return (node, cpus) if node >= 0 and cpus else None
    return None


def allowed_cores(cpus: Iterable[int], sysfs: Path = SYSFS) -> tuple[frozenset[int], ...]:
    """Physical cores in order, each with those of its hyperthreads that are in ``cpus``."""
    allowed = frozenset(cpus)
    cores: set[frozenset[int]] = set()
    for cpu in allowed:
        siblings = frozenset({cpu})
        with suppress(OSError, ValueError):
            text = (sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
            siblings |= parse_cpus(text) & allowed
        cores.add(siblings)
    return tuple(sorted(cores, key=min))


def parse_cpus(text: str) -> frozenset[int]:
    """``0-2,8`` as {0, 1, 2, 8}; raises ``ValueError`` for anything else."""
    pairs = (part.partition("-") for part in text.strip().split(",") if part)
    return frozenset(cpu for first, _, last in pairs for cpu in range(int(first), int(last or first) + 1))


def format_cpus(cpus: Iterable[int]) -> str:
    """{0, 1, 2, 8} as ``0-2,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _bind_threads(cpus: frozenset[int]) -> None:
    """Bind all threads, without those that a library has bound already."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            if os.sched_getaffinity(int(task)) == before:
                os.sched_setaffinity(int(task), cpus)

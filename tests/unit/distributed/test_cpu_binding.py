"""CPU binding: plans from a fake /sys, never beyond what a process may use, and what threads get."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deco_scale.distributed import cpu_binding
from deco_scale.distributed.cpu_binding import (
    RankCpus,
    allowed_cores,
    bind_cpus,
    describe,
    format_cpus,
    gpu_numa,
    parse_cpus,
    plan_bindings,
    should_bind,
)

GPUS = ["0000:1b:00.0", "0000:43:00.0", "0000:9a:00.0", "0000:db:00.0"]


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Two sockets of four cores with two hyperthreads each (CPU n and n + 8), two GPUs beside each socket."""
    for number, pci in enumerate(GPUS):
        folder = tmp_path / "bus/pci/devices" / pci
        folder.mkdir(parents=True)
        node = number // 2
        (folder / "numa_node").write_text(f"{node}\n")
        (folder / "local_cpulist").write_text(["0-3,8-11\n", "4-7,12-15\n"][node])
    for cpu in range(16):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    return tmp_path


def rank(sysfs: Path, pci: str | None, allowed: str = "0-15", host: str = "a") -> RankCpus:
    return RankCpus(host, allowed_cores(parse_cpus(allowed), sysfs), gpu_numa(pci, sysfs))


def test_each_rank_gets_the_cores_beside_its_gpu(sysfs: Path) -> None:
    bindings = plan_bindings([rank(sysfs, pci, host=host) for host in "ab" for pci in GPUS])
    found = [format_cpus(binding.cpus) for binding in bindings]
    assert found == ["0-3,8-11", "0-3,8-11", "4-7,12-15", "4-7,12-15"] * 2
    assert {binding.sharers for binding in bindings} == {2}
    assert describe(list("aaaabbbb"), bindings) == [
        "CPU binding on a and 1 more hosts: local rank 0: CPUs 0-3,8-11 (NUMA node 0); "
        "local rank 1: CPUs 0-3,8-11 (NUMA node 0); local rank 2: CPUs 4-7,12-15 (NUMA node 1); "
        "local rank 3: CPUs 4-7,12-15 (NUMA node 1)"
    ]


def test_without_a_numa_node_whole_cores_are_divided(sysfs: Path) -> None:
    (sysfs / "bus/pci/devices" / GPUS[0] / "numa_node").write_text("-1\n")
    for pci in (None, GPUS[0], "0000:00:00.0"):
        bindings = plan_bindings([rank(sysfs, pci) for _ in range(3)])
        assert [format_cpus(each.cpus) for each in bindings] == ["0-1,8-9", "2-4,10-12", "5-7,13-15"]


def test_no_rank_leaves_the_cpus_that_it_may_use(sysfs: Path) -> None:
    inside, outside = rank(sysfs, GPUS[0], "2-5"), rank(sysfs, GPUS[3], "2-3")
    bindings = plan_bindings([inside, outside])
    assert format_cpus(bindings[0].cpus) == "2-3" and format_cpus(bindings[1].cpus) == "2-3"
    assert "no allowed CPU is on NUMA node 1" in bindings[1].reason
    # SLURM has given each task its own cores: nothing is left to divide.
    alone = plan_bindings([rank(sysfs, None, "0-1,8-9"), rank(sysfs, None, "2-3,10-11")])
    assert [format_cpus(each.cpus) for each in alone] == ["0-1,8-9", "2-3,10-11"]
    crowded = plan_bindings([rank(sysfs, None, "0,8") for _ in range(2)])
    assert all(each.cpus == {0, 8} and "2 ranks on 1 cores" in each.reason for each in crowded)


@pytest.mark.parametrize("text", ["", "3", "0-2,8", "0-15"])
def test_lists_of_cpus_round_trip(text: str) -> None:
    assert format_cpus(parse_cpus(text + "\n")) == text


def test_the_setting_decides() -> None:
    assert should_bind("auto", {"SLURM_JOB_ID": "7"}) and should_bind("numa", {})
    assert not should_bind("auto", {}) and not should_bind("none", {"SLURM_JOB_ID": "7"})


@pytest.fixture
def unbound() -> Iterator[frozenset[int]]:
    """The CPUs of this process, which are its own again afterwards, as is its number of threads."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield frozenset(cpus)
    for task in os.listdir("/proc/self/task"):
        # A thread may have ended since.
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cpus)
    torch.set_num_threads(threads)


def test_threads_that_run_already_are_bound_as_well(
    unbound: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(allowed_cores(unbound)) < 2:
        pytest.skip("one core cannot be divided")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(cpu_binding, "gather_objects", lambda me: [me, me])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        (line,) = bind_cpus(torch.device("cpu"))
        mine = os.sched_getaffinity(0)
        assert mine < unbound and thread.native_id is not None
        assert os.sched_getaffinity(thread.native_id) == mine
        assert f"local rank 1: CPUs {format_cpus(mine)} (1/2 of the cores)" in line
        assert torch.get_num_threads() == len(mine)
    finally:
        end.set()
        thread.join()

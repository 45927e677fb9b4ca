"""Near ties between causes, and what the coordinator concludes from peers that leave, are lost or never came."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.coordinator import LINGER_S, Coordinator
from deco_scale.watchdog.diagnosis import GRACE_S, SETTLE_S, Diagnosis, Fault, RankReport
from deco_scale.watchdog.peer import Peer
from deco_scale.watchdog.process import ProcessIdentity
from deco_scale.watchdog.protocol import LOCALHOST, Member, TerminateOrder, open_port

CFG = WatchdogConfig(timeout_s=20.0, slow_timeout_s=3600.0)


def decide(
    cfg: WatchdogConfig, ranks: dict[int, dict[str, Any]], *, silent_before: float, seconds: float
) -> Fault | None:
    """First fault on ranks of which those in phase ``step`` fell silent ``silent_before`` seconds ago."""
    decision = Diagnosis(ranks, cfg, now=0.0)
    for tick in range(int(seconds * 10)):
        now = 1000.0 + tick / 10
        for rank, fields in ranks.items():
            silent = {"silent_s": silent_before + tick / 10} if fields["phase"] == "step" else {}
            decision.update(now, RankReport(rank=rank, **{**fields, **silent}))
        fault = decision.check(now)
        if fault is not None:
            return fault
    return None


def test_a_rank_in_the_same_step_as_a_slow_one_is_waiting_not_hung() -> None:
    """A collective inside step 17 holds the ranks whose own work of step 17 is done until the slow one arrives."""
    ranks = {
        0: {"phase": "long_op", "step": 17},
        1: {"phase": "step", "step": 17},
        2: {"phase": "step", "step": 18},
    }
    assert decide(CFG, ranks, silent_before=100.0, seconds=10.0) is None
    ranks[1]["step"] = 16
    assert decide(CFG, ranks, silent_before=100.0, seconds=10.0).rank == 1


def test_of_several_slow_ranks_the_furthest_behind_excuses_waiting() -> None:
    ranks = {
        0: {"phase": "long_op", "step": 17},
        1: {"phase": "long_op", "step": 19},
        2: {"phase": "step", "step": 18},
    }
    assert decide(CFG, ranks, silent_before=100.0, seconds=10.0) is None


@pytest.mark.parametrize(
    ("silent_before", "kind", "rank"), [(SETTLE_S / 2, "error", 1), (SETTLE_S + 0.5, "hang", 0)]
)
def test_silence_that_starts_just_before_an_error_is_its_effect(
    silent_before: float, kind: str, rank: int
) -> None:
    """The failing rank leaves a collective before it reports its error, and the others already wait by then."""
    cfg = WatchdogConfig(timeout_s=1.2, slow_timeout_s=3600.0)
    ranks = {0: {"phase": "step", "step": 17}, 1: {"phase": "end", "step": 17, "code": 2, "reason": "no file"}}
    fault = decide(cfg, ranks, silent_before=silent_before, seconds=GRACE_S + 2.0)
    assert (fault.kind, fault.rank) == (kind, rank)


@pytest.mark.parametrize(("stopped_s", "rank"), [(SETTLE_S / 2, 1), (SETTLE_S, 2)])
def test_a_process_stopped_for_a_moment_is_not_the_cause_of_a_hang(stopped_s: float, rank: int) -> None:
    """A debugger or profiler stops a process for a moment; only a lasting stop explains another rank's silence."""
    ranks: dict[int, dict[str, Any]] = {
        1: {"phase": "step", "step": 17},
        2: {"phase": "end", "step": 17, "state": "T", "stopped_s": stopped_s},
    }
    assert decide(CFG, ranks, silent_before=100.0, seconds=5.0).rank == rank


class Job:
    """Sidecars of a job of which rank 0 is the test's: reports go over real connections, at times it chooses."""

    def __init__(self, world_size: int) -> None:
        me = ProcessIdentity.of(os.getpid())
        self.now = 0.0
        self.runner = asyncio.Runner()
        self.members = [
            Member(rank, f"node{rank}", ProcessIdentity(rank, 1, me.boot), me) for rank in range(world_size)
        ]
        self.coordinator = Coordinator(
            CFG, self.members[0], world_size=world_size, token="token", clock=lambda: self.now
        )
        self.peers = {rank: Peer(CFG, self.members[rank], clock=lambda: self.now) for rank in range(1, world_size)}

    async def connect(self) -> None:
        server = open_port(LOCALHOST)
        port = server.getsockname()[1]
        connecting = [peer.connect(LOCALHOST, port, "token", 5.0) for peer in self.peers.values()]
        await asyncio.gather(self.coordinator.listen(server.detach(), 5.0), *connecting)

    def run(self, start: float, seconds: float, **reports: dict[str, Any]) -> TerminateOrder | None:
        """The first order; ``rank_1={...}`` is what a rank reports, other peers are healthy."""
        return self.runner.run(self._run(start, seconds, reports))

    async def _run(self, start: float, seconds: float, reports: dict[str, Any]) -> TerminateOrder | None:
        for tick in range(int(seconds * 10)):
            self.now = start + tick / 10
            for rank, peer in self.peers.items():
                peer.tick(RankReport(rank=rank, **{"phase": "step", **reports.get(f"rank_{rank}", {})}))
            await asyncio.sleep(0.005)
            order = self.coordinator.tick(RankReport(rank=0, phase="step"))
            if order is not None:
                return order
        return None

    def leave(self, rank: int) -> None:
        self.runner.run(self.peers.pop(rank).close())

    def cut_off(self, rank: int) -> None:
        self.peers.pop(rank)._writer.transport.abort()


@contextmanager
def job_of(world_size: int, *, connect: bool = True) -> Iterator[Job]:
    job = Job(world_size)
    with job.runner as runner:
        if connect:
            runner.run(job.connect())
        yield job
        for peer in job.peers.values():
            runner.run(peer.close())
        runner.run(job.coordinator.close())


def test_a_sidecar_that_never_connects_is_named() -> None:
    with job_of(3, connect=False) as job:
        with pytest.raises(TimeoutError, match="the sidecars of ranks 1, 2 did not connect within 0.2 s"):
            job.runner.run(job.coordinator.listen(open_port(LOCALHOST).detach(), 0.2))
        job.peers.clear()


def test_nothing_is_decided_before_all_sidecars_connected() -> None:
    with job_of(2, connect=False) as job:
        job.peers.clear()
        assert job.run(1000.0, 5.0) is None and job.coordinator.missing == [1]


def test_a_closed_connection_without_a_goodbye_is_a_lost_rank() -> None:
    with job_of(3) as job:
        job.cut_off(1)
        order = job.run(1.0, 5.0)
        assert (order.fault.kind, order.member.rank) == ("lost", 1)
        assert order.orphans == (job.members[1],)


def test_a_goodbye_is_no_fault() -> None:
    with job_of(3) as job:
        job.leave(1)
        assert job.run(1.0, 5.0) is None


def test_orphans_are_all_ranks_whose_sidecar_is_not_connected() -> None:
    """Rank 2 is gone and the sidecar of rank 1 is lost: neighbours end both trainers."""
    with job_of(4) as job:
        job.cut_off(1)
        order = job.run(1.0, 5.0, rank_2={"gone": True})
        assert (order.fault.kind, order.member.rank) == ("lost", 2)
        assert [orphan.rank for orphan in order.orphans] == [1, 2]


def test_rank_0_lingers_for_the_others_and_longer_while_something_is_wrong() -> None:
    with job_of(3) as job:
        assert job.run(1.0, 0.5) is None
        assert not job.coordinator.may_exit(LINGER_S - 0.1)
        assert job.coordinator.may_exit(LINGER_S + 0.1)
        assert job.run(2.0, SETTLE_S / 2, rank_1={"gone": True}) is None
        assert not job.coordinator.may_exit(LINGER_S + 0.1)
    with job_of(2) as job:
        job.leave(1)
        assert job.run(1.0, 0.5) is None
        assert job.coordinator.may_exit(0.0)

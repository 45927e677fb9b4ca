"""The watchdog's decision, without processes: every cause, in all orders of arrival."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.diagnosis import GRACE_S, SETTLE_S, Diagnosis, Fault, RankReport

CFG = WatchdogConfig(timeout_s=300.0, slow_timeout_s=3600.0)
RANKS = 4
START = 1000.0

SIGNS: dict[str, dict[str, Any]] = {
    "gone": {"gone": True},
    "stopped": {"state": "T", "stopped_s": 301.0, "silent_s": 301.0},
    "lost": {},
    "behind": {"silent_s": 300.5, "step": 16},
    "hang": {"silent_s": 301.0},
    "error": {"code": 2, "reason": "no such file"},
    "uncertain": {"code": 1, "reason": "closed by peer", "uncertain": True},
}
"""What can be wrong with a rank, the likelier cause first."""


class Clockwork:
    """A job whose ranks report every tenth of a second what they are set to."""

    def __init__(self) -> None:
        self.now = START
        self.diagnosis = Diagnosis(range(RANKS), CFG, now=self.now)
        self.ranks: dict[int, dict[str, Any]] = {rank: {"phase": "step", "step": 17} for rank in range(RANKS)}
        self.silent: set[int] = set()

    def set(self, rank: int, sign: str) -> None:
        self.ranks[rank].update(SIGNS[sign])
        if "code" in SIGNS[sign]:
            self.ranks[rank]["phase"] = "end"
        if sign == "lost":
            self.silent.add(rank)
            self.diagnosis.mark_lost(rank, "is lost")

    def run(self, seconds: float) -> Fault | None:
        """The first fault within this time."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.1
            for rank, fields in self.ranks.items():
                if rank not in self.silent:
                    self.diagnosis.update(self.now, RankReport(rank=rank, **fields))
            found = self.diagnosis.check(self.now)
            if found is not None:
                return found
        return None


@pytest.mark.parametrize("strong, weak", itertools.combinations(SIGNS, 2))
@pytest.mark.parametrize("effect_first", [False, True])
@pytest.mark.parametrize("cause, other", [(1, 2), (2, 1)])
def test_the_likelier_cause_counts(strong: str, weak: str, effect_first: bool, cause: int, other: int) -> None:
    job = Clockwork()
    order = [(other, weak), (cause, strong)] if effect_first else [(cause, strong), (other, weak)]
    for rank, sign in order:
        job.set(rank, sign)
        early = job.run(0.4)
        assert early is None
    fault = job.run(SETTLE_S + GRACE_S)
    assert fault is not None and fault.rank == cause
    kinds = {"gone": "lost", "lost": "lost", "error": "error", "uncertain": "error"}
    assert fault.kind == kinds.get(strong, "hang")
    assert job.run(20) is None


@given(st.permutations([(rank, sign) for rank, sign in enumerate(["gone", "stopped", "behind", "uncertain"])]))
def test_in_any_order_within_a_second(order: list[tuple[int, str]]) -> None:
    job = Clockwork()
    for rank, sign in order:
        job.set(rank, sign)
        assert job.run(0.2) is None
    assert job.run(2).kind == "lost"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, RANKS - 1), st.sampled_from([*SIGNS, "left"]), st.floats(0, 3)), max_size=6)
)
def test_at_most_one_fault_and_it_has_a_ground(happenings: list[tuple[int, str, float]]) -> None:
    job = Clockwork()
    faults = []
    for rank, sign, seconds in happenings:
        if sign == "left":
            job.silent.add(rank)
            job.diagnosis.mark_left(rank)
        else:
            job.set(rank, sign)
        faults.append(job.run(seconds))
    faults.append(job.run(30))
    given_ = [fault for fault in faults if fault is not None]
    assert len(given_) <= 1
    for fault in given_:
        assert fault.rank in {rank for rank, sign, _ in happenings if sign != "left"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, RANKS - 1), st.sampled_from([None, 0, 75]), st.booleans()), max_size=12))
def test_ends_in_order_are_no_fault(happenings: list[tuple[int, int | None, bool]]) -> None:
    """Ranks work, say that they are done or saved, go, and their sidecars leave or are cut off."""
    job = Clockwork()
    for rank, code, gone in happenings:
        if rank in job.silent:
            continue
        job.ranks[rank].update(silent_s=299.0)
        if code is not None:
            job.ranks[rank].update(code=code, phase="end", gone=gone)
        assert job.run(0.3) is None
        if code is not None and gone:
            job.silent.add(rank)
            job.diagnosis.mark_lost(rank, "is lost")
    assert job.run(10) is None


def test_a_hang_that_ends_in_time_is_withdrawn() -> None:
    job = Clockwork()
    job.set(1, "hang")
    assert job.run(0.8) is None
    job.ranks[1]["silent_s"] = 0.1
    assert job.run(5) is None
    job.set(1, "hang")
    began = job.now
    assert job.run(5).rank == 1 and job.now - began >= SETTLE_S


def test_waiting_for_a_slow_rank_is_no_hang() -> None:
    """Rank 0 writes images at step 17; the others wait for it in step 18, and have their time again after it."""
    job = Clockwork()
    job.ranks[0].update(phase="long_op", silent_s=3000.0)
    for rank in (1, 2, 3):
        job.ranks[rank].update(step=18, silent_s=2900.0)
    assert job.run(10) is None
    job.ranks[0].update(phase="step", step=18, silent_s=0.0)
    assert job.run(290) is None
    assert job.run(20).rank in (1, 2, 3)


def test_a_slow_rank_ahead_does_not_clear_the_others() -> None:
    job = Clockwork()
    job.ranks[0].update(phase="long_op", step=18, silent_s=100.0)
    job.set(1, "hang")
    assert job.run(5).rank == 1


@pytest.mark.parametrize("phase", ["start", "long_op"])
def test_slow_work_has_its_own_time(phase: str) -> None:
    job = Clockwork()
    job.ranks[2].update(phase=phase, silent_s=3599.0)
    assert job.run(3) is None
    job.ranks[2].update(silent_s=3601.0)
    assert job.run(3) is not None
    stopped = Clockwork()
    stopped.ranks[2].update(phase=phase, silent_s=400.0, stopped_s=301.0, state="T")
    assert "stopped (state T)" in stopped.run(3).how


def test_a_rank_that_does_not_go_after_its_word() -> None:
    job = Clockwork()
    job.ranks[3].update(phase="end", code=0, silent_s=301.0)
    fault = job.run(3)
    assert (fault.kind, fault.rank) == ("hang", 3)
    others = Clockwork()
    others.ranks[0].update(phase="end", code=75, gone=True)
    others.set(2, "hang")
    assert others.run(3).rank == 2


def test_a_silent_sidecar_is_lost() -> None:
    job = Clockwork()
    job.silent.add(2)
    assert job.run(299) is None
    fault = job.run(5)
    assert (fault.kind, fault.rank) == ("lost", 2)


def test_after_an_error_the_others_have_time_to_end() -> None:
    job = Clockwork()
    job.set(1, "error")
    assert job.run(GRACE_S - 0.2) is None
    fault = job.run(0.5)
    assert (fault.kind, fault.rank, fault.code) == ("error", 1, 2)
    alone = Clockwork()
    alone.set(1, "error")
    assert alone.run(2) is None
    for fields in alone.ranks.values():
        fields.update(phase="end", code=1, gone=True)
    assert alone.run(20) is None and alone.diagnosis.finished
    # Nobody is left to wait for once all have said their end.
    every = Clockwork()
    for rank in range(RANKS):
        every.set(rank, "uncertain")
    assert every.run(2).kind == "error"


def test_a_late_loss_is_the_cause_of_doubtful_errors_only() -> None:
    """A process with much memory is gone seconds after its connections; an abort after an error is its effect."""
    doubtful = Clockwork()
    doubtful.set(1, "uncertain")
    assert doubtful.run(3) is None
    doubtful.set(2, "gone")
    assert doubtful.run(3).rank == 2
    named = Clockwork()
    named.set(1, "error")
    assert named.run(3) is None
    named.set(2, "gone")
    assert named.run(3).rank == 1


def test_who_fell_silent_with_an_error_waits_for_it() -> None:
    job = Clockwork()
    job.set(1, "error")
    for step in range(60):
        for rank in (0, 2, 3):
            job.ranks[rank]["silent_s"] = 299.5 + step / 10
        fault = job.run(0.1)
        if fault is not None:
            break
    assert fault.rank in (0, 2, 3)  # silent for long before
    short = Clockwork()
    short.diagnosis = Diagnosis(range(RANKS), WatchdogConfig(timeout_s=0.7), now=short.now)
    short.set(1, "error")
    for step in range(80):
        for rank in (0, 2, 3):
            short.ranks[rank]["silent_s"] = step / 10
        fault = short.run(0.1)
        if fault is not None:
            break
    assert (fault.kind, fault.rank) == ("error", 1)

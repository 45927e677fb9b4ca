"""Goodput: every second of a run's history is in the class that it was for."""

import json
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale.observability import goodput
from deco_scale.observability.events import Event, append_event, parse_event
from deco_scale.observability.goodput import CLASSES, Goodput, compute_goodput

BEGAN = 1_700_000_000.0


def start(time: float, attempt: int = 1, world: int = 4) -> Event:
    fields = {"world_size": world, "layout": {"tp": 1}, "hosts": ["a"], "attempt": attempt}
    return Event(time, "start", fields)


class History:
    """A run played second by second, which knows of each second what it was for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.step, self.attempt = BEGAN, 0, 0
        self.events: list[Event] = []
        self.metrics: list[dict[str, Any]] = []
        self.saved = [0]
        self.spent: list[tuple[str, int, float]] = []
        """Class, step and seconds; what is beyond a later resume becomes lost."""
        self.resumes: list[tuple[int, int]] = []
        """Length of ``spent`` at a resume, and its step."""

    def spend(self, name: str, seconds: float) -> None:
        self.spent.append((name, self.step, seconds))
        self.now += seconds

    def note(self, kind: str, **fields: Any) -> None:
        self.events.append(Event(self.now, kind, fields))

    def one_step(self, seconds: float, *, first: bool = False) -> None:
        self.step += 1
        waited = 0.0 if first else self.random.randint(0, int(seconds))
        self.spend("compile" if first else "step", seconds - waited)
        self.spend("data_wait", waited)
        if first:
            self.note("first_step", step=self.step, seconds=seconds)
        else:
            line = {"time": self.now, "step": self.step, "step_s": seconds, "data_wait_s": waited}
            self.metrics.append(line)

    def attempt_once(self, steps: int) -> None:
        self.attempt += 1
        self.events.append(start(self.now, self.attempt))
        resumed = self.saved[0] if self.attempt == 1 else self.random.choice(self.saved[-2:])
        self.step = resumed
        self.spend("start", self.random.randint(0, 50))
        self.resumes.append((len(self.spent), resumed))
        self.one_step(self.random.randint(1, 30), first=True)
        for _ in range(steps):
            self.one_step(self.random.randint(1, 9))
            if self.random.random() < 0.2:
                seconds = self.random.randint(1, 20)
                self.spend("evaluation", seconds)
                self.note("evaluation", step=self.step, seconds=seconds)
            if self.random.random() < 0.2:
                stall = self.random.randint(1, 5)
                self.spend("checkpoint_stall", stall)
                self.note("checkpoint", step=self.step, stall_s=stall, total_s=stall)
                self.saved.append(self.step)
            if self.random.random() < 0.1:
                to_step = self.random.choice(self.saved[-2:])
                if resumed <= to_step < self.step:
                    self.note("rollback", step=self.step, to_step=to_step)
                    self.resumes.append((len(self.spent), to_step))
                    self.step = to_step

    def down(self) -> None:
        kind = self.random.choice(["end", "hang", "lost_rank", "killed"])
        silent_s = self.random.randint(1, 40)
        self.spend("down", silent_s)
        if kind == "end":
            self.note("end", reason="failed", exit_code=1)
        elif kind == "hang":
            if self.random.random() < 0.5:
                # The step that hung is logged as its process ends.
                line = {"time": self.now, "step": self.step + 1, "step_s": silent_s, "data_wait_s": 0}
                self.metrics.append(line)
            self.note("hang", rank=1, host="b", silent_s=silent_s)
        elif kind == "lost_rank":
            self.note("lost_rank", rank=2)
        self.spend("down", self.random.randint(0, 40))

    def truth(self) -> dict[str, float]:
        totals = dict.fromkeys(CLASSES, 0.0)
        for i, (name, step, seconds) in enumerate(self.spent):
            kept = min((to for at, to in self.resumes if at > i), default=math.inf)
            # Starting and compiling are no work that could be lost; the first step is lost with its compilation.
            fixed = name in ("start", "compile", "down")
            totals[name if fixed or step <= kept else "lost"] += seconds
        return totals


@given(st.integers(0, 10**9), st.lists(st.integers(0, 25), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_second_is_in_the_class_that_it_was_for(seed: int, attempts: list[int]) -> None:
    history = History(seed)
    for number, steps in enumerate(attempts):
        if number:
            history.down()
        history.attempt_once(steps)
    found = compute_goodput(history.events, history.metrics, now=history.now)
    assert found is not None
    for name, seconds in history.truth().items():
        assert found.seconds(name) == pytest.approx(seconds, abs=1e-3), name
    assert sum(found.microseconds.values()) == found.wall_us
    assert found.attempts[-1].running and found.attempts[-1].to_step is not None


_TIMES = st.floats(-1e3, 1e5) | st.floats(allow_nan=False, allow_infinity=False)
_SECONDS = st.floats(0, 1e4) | st.just(1e18)
_STEPS = st.integers(0, 100)


@st.composite
def junk_event(draw: st.DrawFn) -> Event:
    """Any event with fields of the right form and no sense."""
    kind = draw(
        st.sampled_from(["start", "first_step", "checkpoint", "evaluation", "rollback", "hang", "end", "x"])
    )
    fields = {
        "world_size": 2, "layout": {}, "hosts": [], "attempt": 1, "rank": 0, "host": "a", "reason": "r",
        "step": draw(_STEPS), "to_step": draw(_STEPS), "seconds": draw(_SECONDS), "stall_s": draw(_SECONDS),
        "total_s": draw(_SECONDS), "exit_code": draw(st.integers(-9, 80)),
    }  # fmt: skip
    time = draw(_TIMES)
    return Event(time if abs(time) < 2**62 else 0.0, kind, fields)


_LINE = st.fixed_dictionaries(
    {"step": _STEPS}, optional={"time": _TIMES, "step_s": st.floats() | st.none(), "data_wait_s": st.floats()}
)


@given(st.lists(junk_event(), max_size=25), st.lists(_LINE, max_size=25), st.floats(-1e3, 2e5), st.floats(0, 1e5))
@settings(max_examples=200, deadline=None)
def test_the_classes_add_up_to_the_wall_clock_whatever_the_files_say(
    events: list[Event], metrics: list[dict[str, Any]], now: float, silent_s: float
) -> None:
    with mock.patch.object(goodput, "SILENT_S", silent_s):
        found = compute_goodput(events, metrics, now=now)
    if not any(event.kind == "start" for event in events):
        assert found is None
        return
    assert found is not None
    assert sum(found.microseconds.values()) == found.wall_us >= 0
    assert all(value >= 0 for value in found.microseconds.values())
    assert set(found.microseconds) == set(CLASSES)
    assert 0 <= found.effective <= 1


def test_lost_work_between_two_logged_steps_is_taken_by_steps() -> None:
    lines = [{"time": BEGAN + t, "step": s} for t, s in ((110, 10), (210, 20))]
    events = [
        start(BEGAN),
        Event(BEGAN + 10, "first_step", {"step": 1, "seconds": 5}),
        start(BEGAN + 300, 2),
        Event(BEGAN + 310, "first_step", {"step": 17, "seconds": 10}),
    ]
    found = compute_goodput(events, lines, now=BEGAN + 310)
    assert found is not None
    # From step 16 on: 4 of the 10 steps of the last 100 seconds.
    expected = {"start": 5, "compile": 15, "step": 100 + 60, "lost": 40, "down": 90}
    assert {name: found.seconds(name) for name in expected} == expected
    assert found.wall_s == 310


def test_a_finished_run_costs_nothing_more_and_a_stopped_one_is_down() -> None:
    def after(code: int) -> Goodput:
        events = [
            start(BEGAN),
            Event(BEGAN + 1, "first_step", {"step": 1, "seconds": 1}),
            Event(BEGAN + 10, "checkpoint", {"step": 4, "stall_s": 2, "total_s": 2}),
            Event(BEGAN + 12, "end", {"reason": "done", "exit_code": code}),
        ]
        found = compute_goodput(events, [], now=BEGAN + 1000)
        assert found is not None
        return found

    assert after(0).wall_s == 12 and after(0).seconds("down") == 2
    assert after(75).wall_s == 1000 and after(75).seconds("down") == 990
    assert not after(0).attempts[-1].running


def test_a_line_after_a_successful_end_is_the_end() -> None:
    events = [start(BEGAN), Event(BEGAN + 5, "end", {"reason": "done", "exit_code": 0})]
    found = compute_goodput(events, [{"step": 1, "time": BEGAN + 6}], now=BEGAN + 7)
    assert found is not None and found.wall_s == 6 and not found.attempts[-1].running


def test_events_survive_the_file_and_wrong_ones_are_named(tmp_path: Path) -> None:
    event = Event(BEGAN, "evaluation", {"step": 3, "seconds": 1.5, "note": "more is allowed"})
    append_event(tmp_path, event)
    append_event(tmp_path, start(BEGAN + 1))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert parse_event(json.loads(lines[0])) == event and len(lines) == 2
    for wrong, said in (
        ({"time": 1.0, "kind": "hang", "rank": 1}, "host is missing"),
        ({"time": 1.0, "kind": "lost_rank", "rank": "1"}, "rank='1'"),
        ({"time": 1.0, "kind": "lost_rank", "rank": -1}, "rank=-1"),
        ({"time": 1.0, "kind": "lost_rank", "rank": True}, "rank=True"),
        ({"time": float("nan"), "kind": "x"}, "time=nan"),
        ({"time": 10**400, "kind": "x"}, "finite number"),
        ({"kind": "x"}, "time=None"),
        ({"time": 1.0}, "kind=None"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_event(wrong)

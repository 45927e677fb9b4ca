"""Where a run's time goes: the accounting of its histories, and the model that predicts it."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deco_scale import cli
from deco_scale.errors import ConfigError
from deco_scale.planning.goodput import (
    LLAMA3_GPU_MTBF_HOURS,
    Faults,
    best_interval,
    daly_interval,
    expected_s,
    goodput,
    segments_of,
    simulate,
    young_interval,
)
from deco_scale.watching.accounting import CLASSES, Accounting, account
from deco_scale.watching.events import Event, append_event, parse_event

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "t2i_tiny.yaml"
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
        self.spend("down", self.random.randint(0, 40))
        if kind == "end":
            self.note("end", reason="failed", exit_code=1)
        elif kind == "hang":
            self.note("hang", rank=1, host="b")
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
    found = account(history.events, history.metrics, now=history.now)
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
    found = account(events, metrics, now=now, silent_s=silent_s)
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
    found = account(events, lines, now=BEGAN + 310)
    assert found is not None
    # From step 16 on: 4 of the 10 steps of the last 100 seconds.
    expected = {"start": 5, "compile": 15, "step": 100 + 60, "lost": 40, "down": 90}
    assert {name: found.seconds(name) for name in expected} == expected
    assert found.wall_s == 310


def test_a_finished_run_costs_nothing_more_and_a_stopped_one_is_down() -> None:
    def after(code: int) -> Accounting:
        events = [
            start(BEGAN),
            Event(BEGAN + 1, "first_step", {"step": 1, "seconds": 1}),
            Event(BEGAN + 10, "checkpoint", {"step": 4, "stall_s": 2, "total_s": 2}),
            Event(BEGAN + 12, "end", {"reason": "done", "exit_code": code}),
        ]
        found = account(events, [], now=BEGAN + 1000)
        assert found is not None
        return found

    assert after(0).wall_s == 12 and after(0).seconds("down") == 2
    assert after(75).wall_s == 1000 and after(75).seconds("down") == 990
    assert not after(0).attempts[-1].running


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


CASES = [
    Faults(mtbf_s=1000, checkpoint_s=50, stall_s=5, restart_s=60),
    Faults(mtbf_s=300, checkpoint_s=100, stall_s=10, restart_s=120),
    Faults(mtbf_s=400, checkpoint_s=10, stall_s=10, restart_s=0),
    Faults(mtbf_s=200, checkpoint_s=80, stall_s=1, restart_s=30),
]


@pytest.mark.parametrize(("faults", "segments"), [(CASES[0], 60), (CASES[1], 20), (CASES[2], 1), (CASES[3], 30)])
def test_simulated_runs_agree_with_the_closed_form(faults: Faults, segments: int) -> None:
    work = 40.0 * segments
    played = simulate(faults, work, segments, runs=8000, seed=3)
    assert played is not None
    expected = expected_s(faults, work, segments)
    assert abs(played.mean_s - expected) < 4 * played.error_s
    assert played.error_s < 0.02 * expected
    # Faults come at one rate all the time: their number less that of the time passed has the variance of both.
    drift = played.faults - played.mean_s / faults.mtbf_s
    assert abs(drift) < 4 * math.sqrt(expected / faults.mtbf_s / played.runs)
    again = simulate(faults, work, segments, runs=8000, seed=3)
    assert played == again


def test_without_faults_only_saves_and_the_start_cost() -> None:
    faults = Faults(mtbf_s=1e12, checkpoint_s=5, stall_s=2, restart_s=30)
    assert expected_s(faults, 1000, 10) == pytest.approx(30 + 10 * 102 + 3, rel=1e-6)
    assert goodput(faults, 1000, 10) == pytest.approx(1000 / 1053, rel=1e-6)


@pytest.mark.parametrize("faults", CASES)
def test_the_best_interval_is_the_best_and_dalys_is_near(faults: Faults) -> None:
    best = best_interval(faults)
    work = 1e6

    def cost(interval: float) -> float:
        # The limit of many segments, where the number of them need not be whole.
        return math.expm1(faults.segment_s(interval) / faults.mtbf_s) / interval

    assert all(cost(best) <= cost(best * factor) for factor in (0.7, 0.95, 0.999, 1.001, 1.05, 1.4))
    if best > faults.lag_s:
        assert daly_interval(faults) == pytest.approx(best, rel=1e-3)
        assert young_interval(faults) == pytest.approx(best, rel=0.15)
    assert segments_of(work, best) * best == pytest.approx(work, rel=0.01)


def test_numbers_beyond_reason_are_refused_or_infinite() -> None:
    with pytest.raises(ConfigError, match="at least its stall"):
        Faults(mtbf_s=10, checkpoint_s=1, stall_s=2, restart_s=0)
    with pytest.raises(ConfigError, match="mean time between faults"):
        Faults(mtbf_s=math.nan, checkpoint_s=1, stall_s=1, restart_s=0)
    hopeless = Faults(mtbf_s=1, checkpoint_s=1, stall_s=1, restart_s=1000)
    assert expected_s(hopeless, 1e6, 10) == math.inf
    assert simulate(hopeless, 1e6, 10, runs=2, seed=0, max_faults=5) is None


def test_llama_3s_interruptions_give_the_mtbf_that_is_cited() -> None:
    assert pytest.approx(54 * 24 / 419 * 16384) == LLAMA3_GPU_MTBF_HOURS
    assert 3.0 < LLAMA3_GPU_MTBF_HOURS / 16384 < 3.2


def _plan(*arguments: str) -> int:
    return cli.main(["plan", "--simulate", "--config", str(TINY), "--runs", "50", *arguments])


def test_the_command_shows_8_to_4096_gpus_and_says_where_numbers_are_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        _plan("--nodes", "3", "--step-s", "8.0", "--mtbf-hours", "50000", "--mtbf-of", "gpu", "--price", "2") == 0
    )
    shown = capsys.readouterr().out
    sizes = [
        line.split()[1]
        for line in shown.splitlines()
        if line.startswith("\u2502") and line.split()[1][0].isdigit()
    ]
    assert [int(size.replace(",", "")) for size in sizes] == [8, 16, 24, *(2**n for n in range(5, 13))]
    for part in (
        "one in 50,000 h of one GPU",
        "assumed: MegaScale",
        "as given on 24 GPUs",
        "checkpoint.every=200",
    ):
        assert part in shown, part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8", "--step-s", "1"], "needs --mtbf-hours"),
        (["--step-s", "1", "--mtbf-hours", "5"], "needs --gpus or --nodes"),
        (["--gpus", "8", "--nodes", "1", "--step-s", "1", "--mtbf-hours", "5"], "give one"),
        (["--gpus", "8", "--mtbf-hours", "5"], "needs one of --gpu"),
        (
            ["--gpus", "8", "--mtbf-hours", "5", "--step-s", "1", "2"],
            "one positive time for each of the stages demo",
        ),
        (["--gpus", "8", "--mtbf-hours", "5", "--step-s", "1", "--stall-s", "200"], "at least its stall"),
        (["--gpus", "8", "--mtbf-hours", "5", "--from-run", "nowhere"], "no events.jsonl"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(*arguments) == 2
    assert said in capsys.readouterr().err


def test_what_a_run_measured_goes_into_its_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        start(BEGAN, world=8),
        Event(BEGAN + 10, "first_step", {"step": 1, "seconds": 5}),
        Event(BEGAN + 60, "checkpoint", {"step": 50, "stall_s": 2, "total_s": 7}),
        start(BEGAN + 80, 2, world=8),
        Event(BEGAN + 90, "first_step", {"step": 51, "seconds": 5}),
    ]
    for event in events:
        append_event(tmp_path, event)
    line = {"time": BEGAN + 50, "step": 40, "stage": "demo", "step_s": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert _plan("--gpus", "8", "--mtbf-hours", "1000", "--from-run", str(tmp_path)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("checkpoint_s=7: mean", "stall_s=2: mean", "restart_s=30: mean"):
        assert part in shown, part

"""The model that predicts where a run's time goes."""

import json
import math
from pathlib import Path

import pytest

from deco_scale.errors import ConfigError
from deco_scale.observability.events import Event, append_event
from deco_scale.planning.goodput_sim import (
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
from tests.support import CONFIGS
from tests.support.commands import deco

TINY = CONFIGS / "t2i_tiny.yaml"
BEGAN = 1_700_000_000.0


def start(time: float, attempt: int = 1, world: int = 4) -> Event:
    fields = {"world_size": world, "layout": {"tp": 1}, "hosts": ["a"], "attempt": attempt}
    return Event(time, "start", fields)


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
    assert abs(drift) < 4 * math.sqrt(expected / faults.mtbf_s / 8000)
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


def test_faults_during_every_save_still_have_a_best_interval() -> None:
    faults = Faults(mtbf_s=1.0, checkpoint_s=150.0, stall_s=150.0, restart_s=900.0)
    assert best_interval(faults) == pytest.approx(1.0)


def test_llama_3s_interruptions_give_the_mtbf_that_is_cited() -> None:
    assert pytest.approx(54 * 24 / 419 * 16384) == LLAMA3_GPU_MTBF_HOURS
    assert 3.0 < LLAMA3_GPU_MTBF_HOURS / 16384 < 3.2


def _plan(*arguments: str) -> int:
    return deco(["plan", "--simulate", "--config", str(TINY), "--runs", "50", *arguments])


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
        (["--gpus", "8", "--nodes", "1", "--step-s", "1", "--mtbf-hours", "5"], "give either --nodes or --gpus"),
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

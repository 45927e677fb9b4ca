"""The chaos test's own checks find what they are for: each is given a run with one thing wrong."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from deco_scale.checkpoint.format import encode_checksums
from deco_scale.observability.run_dir import COMPLETE, RunDir
from tests.fault_injection.chaos.checks import (
    MODEL_FAULTS,
    compare_model,
    compare_samples,
    compare_traces,
    lost_checkpoints,
)
from tests.fault_injection.chaos.faults import KINDS, folder_of
from tests.fault_injection.chaos.scenario import LONG, SHORT, Scenario, make_nans, make_plan
from tests.fault_injection.chaos.watch import Watch
from tests.support import ROOT

STEPS, BATCH, NAN_STEP = 6, 4, 2
Lines = list[dict[str, Any]]
RECORDED = ROOT / "tests" / "fixtures" / "chaos"


def write(path: Path, lines: Lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics() -> Lines:
    norm = {step: float("nan") if step == NAN_STEP else 1.0 + step for step in range(1, STEPS + 1)}
    return [{"step": step, "loss": 1.0 / step, "grad_norm": norm[step]} for step in norm]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: None, None),
        (lambda lines: lines[3].update(loss=lines[3]["loss"] * (1 + 9e-6)), None),
        (lambda lines: lines[3].update(loss=lines[3]["loss"] * (1 + 2e-5)), "differ by"),
        (lambda lines: lines[4].update(loss=float("nan")), "differ by"),
        (lambda lines: lines[1].update(grad_norm=3.0), "planted were"),
        (lambda lines: lines.pop(2), "has logged 5 of 6"),
    ],
)
def test_traces(change: Callable[[Lines], Any], said: str | None, tmp_path: Path) -> None:
    lines = metrics()
    change(lines)
    write(tmp_path / "found" / "metrics.jsonl", lines)
    write(tmp_path / "wanted" / "metrics.jsonl", metrics())
    problems = compare_traces(tmp_path / "found", tmp_path / "wanted", STEPS, {NAN_STEP})["problems"]
    assert any(said in problem for problem in problems) if said else not problems, problems


def samples(rank: int, attempts: list[range]) -> Lines:
    """Two ranks, each with every other sample; the checksum of a sample is ten times its number."""
    lines = []
    for attempt, steps in enumerate(attempts, 1):
        for step in steps:
            numbers = list(range((step - 1) * BATCH + rank, step * BATCH, 2))
            sums = [10 * number for number in numbers]
            lines.append({"attempt": attempt, "step": step, "numbers": numbers, "sums": sums})
    return lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: None, None),
        # A rank that died before it could note a step that is done again.
        (lambda lines: lines.pop(3), None),
        (lambda lines: lines[-1]["numbers"].__setitem__(0, 0), "was trained on"),
        (lambda lines: lines.append(lines[-1]), "was trained on"),
        (lambda lines: lines[-1]["sums"].__setitem__(0, 7), "other images"),
        (lambda lines: lines.pop(), "was trained on"),
        (lambda lines: lines.pop(4), "attempt 2, rank 1"),
    ],
)
def test_samples(change: Callable[[Lines], Any], said: str | None, tmp_path: Path) -> None:
    again = [range(1, 5), range(3, STEPS + 1)]
    for rank in range(2):
        lines = samples(rank, again)
        if rank == 1:
            change(lines)
        write(tmp_path / "found" / f"samples_rank_{rank}.jsonl", lines)
        write(tmp_path / "wanted" / f"samples_rank_{rank}.jsonl", samples(rank, [range(1, STEPS + 1)]))
    attempts = [{"from": 0}, {"from": 2}]
    found = compare_samples(tmp_path / "found", tmp_path / "wanted", STEPS, BATCH, attempts)
    assert found["replayed"] == 2
    assert any(said in problem for problem in found["problems"]) if said else not found["problems"], found


@pytest.mark.parametrize("scenario", [LONG, SHORT])
def test_plans(scenario: Scenario) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        nans, plan = make_nans(scenario, chance, 4), make_plan(scenario, list(KINDS), chance)
        assert len(plan) + len(nans) == scenario.count
        assert [one.step for one in plan] == sorted(one.step for one in plan)
        for before, one in zip(plan, plan[1:], strict=False):
            assert one.moment != "start" or before.moment == "start" or KINDS[before.kind].ends
        assert plan[0].moment != "start" and max(*nans, plan[-1].step) < scenario.total_steps


def test_own_measure_of_down_time(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.lines = [
        (10.0, "start", {}), (12.0, "first_step", {}), (13.0, "metrics", {}), (14.0, "lost_rank", {}),
        (20.0, "start", {}), (26.0, "start", {}), (28.0, "first_step", {}), (31.0, "checkpoint", {}),
        (31.5, "end", {}),
    ]  # fmt: skip
    assert watch.down_s() == (20 - 13) + (26 - 20)
    # The step of a rank that hung, logged when its process ended.
    watch.lines[3:4] = [(18.0, "metrics", {}), (18.5, "hang", {"silent_s": 5.0})]
    assert watch.down_s() == (20 - 13) + (26 - 20)


@pytest.mark.parametrize("recorded", sorted(RECORDED.glob("chaos_seed_*.json")), ids=lambda path: path.stem)
def test_recorded_runs_agree_with_the_model_of_the_plan(recorded: Path, tmp_path: Path) -> None:
    """Events and steps of long runs among faults, as they were written; times count from the first start."""
    raw = json.loads(recorded.read_text())
    write(tmp_path / "events.jsonl", raw["events"])
    names = ("time", "step", "step_s", "data_wait_s")
    write(tmp_path / "metrics.jsonl", [dict(zip(names, step, strict=True)) for step in raw["steps"]])
    found = compare_model(RunDir(tmp_path).refresh(), every=raw["every"], total_steps=raw["total_steps"])
    print(
        f"seed {raw['seed']}: training {found['expected_training_s']:.0f} s by the model, "
        f"{found['trained_s']:.0f} measured; whole run {found['expected_wall_s']:.0f} s, "
        f"{found['wall_s']:.0f} measured"
    )
    assert found["met"] >= MODEL_FAULTS and not found["problems"]


def test_lost_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        folder = folder_of(tmp_path, step)
        folder.mkdir()
        (folder / "data").write_bytes(b"weights")
        (folder / COMPLETE).write_bytes(encode_checksums({"data": (7, google_crc32c.value(b"weights"))}))
    assert not lost_checkpoints(tmp_path, {10, 20, 30}, set(), 3)
    (folder_of(tmp_path, 10) / "data").write_bytes(b"what is retired soon")
    assert not lost_checkpoints(tmp_path, {10, 20, 30}, set(), 3)
    (folder_of(tmp_path, 30) / "data").write_bytes(b"Weights")
    assert "30" in lost_checkpoints(tmp_path, {10, 20, 30}, set(), 3)[0]
    assert not lost_checkpoints(tmp_path, {10, 20, 30}, {30}, 3)
    assert "50" in lost_checkpoints(tmp_path, {50}, {30}, 3)[0]

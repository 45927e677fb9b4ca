"""``deco watch``: growing files, half lines, runs that have not begun, and what is shown of one that has."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.text import duration
from deco_scale.cli import watch
from deco_scale.cli.main import main
from deco_scale.observability import run_dir
from deco_scale.observability.events import Event, append_event
from deco_scale.observability.run_dir import RunDir
from deco_scale.observability.summary import ASCII_BARS, sparkline, summary_rows

BEGAN = 1_700_000_000.0
CONFIG = """
stages:
  - {name: small, steps: 100}
  - {name: large, steps: 50}
"""


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "time": BEGAN + 20 + step, "step": step, "stage": "small", "loss": 1 / step, "grad_norm": 2.0, "lr": 1e-4,
        "images_per_s": 64.0, "mfu": 0.25, "step_s": 1.0, "data_wait_s": 0.25, "memory_bytes": 3 * 2**30,
        "skipped": 0, **more,
    }  # fmt: skip


def write_run(folder: Path, *, steps: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    fields = {"world_size": 4, "layout": {"dp_shard": 4}, "hosts": ["a", "b"], "attempt": 1}
    append_event(folder, Event(BEGAN, "start", fields))
    append_event(folder, Event(BEGAN + 21, "first_step", {"step": 1, "seconds": 6}))
    append_event(folder, Event(BEGAN + 50, "checkpoint", {"step": 30, "stall_s": 1, "total_s": 3}))
    append_event(folder, Event(BEGAN + 55, "skip", {"step": 35}))
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(2, steps + 1):
            file.write(json.dumps(line(step, rank_step_s=[1.0, 1.5, 1.1, 1.0])) + "\n")


def test_a_view_of_a_growing_run_equals_one_of_the_grown(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    grown, growing = RunDir(tmp_path / "whole"), RunDir(tmp_path / "part")
    growing.refresh()
    assert "has not started" in summary_rows(growing, now=BEGAN)[0][1]
    names = ("config.yaml", "events.jsonl", "metrics.jsonl")
    (tmp_path / "part").mkdir()
    for share in (0.3, 0.55, 1.0):
        for name in names:
            data = (tmp_path / "whole" / name).read_bytes()
            # Appended to, as a run does.
            target = tmp_path / "part" / name
            have = target.stat().st_size if target.exists() else 0
            with target.open("ab") as file:
                file.write(data[have : max(int(len(data) * share), have)])
        growing.refresh()
        assert summary_rows(growing, now=BEGAN + 70)
    grown.refresh()
    assert summary_rows(grown, now=BEGAN + 70)[1:] == summary_rows(growing, now=BEGAN + 70)[1:]
    assert growing.problems == []


def test_the_rows_say_what_the_files_say(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "quarantine.jsonl").write_text('{"rank": 0}\n')
    run = RunDir(tmp_path)
    run.refresh()
    shown = dict(summary_rows(run, now=BEGAN + 60, bars=ASCII_BARS))
    assert shown["state"].startswith("running, attempt 1 on 4 ranks")
    assert shown["step"] == "40 of 150, stage small"
    assert shown["loss"].startswith("0.0250") and shown["loss"][-1] == ASCII_BARS[0]
    assert shown["MFU"] == "25.0%" and shown["data wait"] == "250 ms a step, 25.0%"
    assert shown["memory"].startswith("3.00 GiB")
    assert shown["ranks"] == "rank 1 is slowest, 1.5 s a step; median of 4: 1.05 s"
    assert shown["checkpoint"] == "step 30, 10 s ago"
    assert shown["ETA of small"] == "40 of 100 steps, 1 min 0 s to go"
    # Nothing is known of the second stage's pace, and nothing is made up.
    assert "not timed yet" in shown["ETA of large"] and "unknown" in shown["ETA"]
    assert shown["faults"].startswith("1 skip; the last: skip step=35")
    assert shown["bad samples"].startswith("1 ")
    # 60 s: 15 of start, 6 of compilation, 1 of stall, and a quarter of the other 38 on waiting.
    assert shown["effective time"].startswith("47.5% of 1 min 0 s")
    assert shown["gradient norm"].startswith("2.000")
    late = dict(summary_rows(run, now=BEGAN + 10_000))
    assert late["state"].startswith("no sign of life")


def test_a_slow_accounting_is_kept_for_a_while_and_an_event_ends_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    run = RunDir(tmp_path)
    run.refresh()
    clock = iter(range(100))
    monkeypatch.setattr(run_dir.time, "perf_counter", lambda: next(clock))
    first = run.goodput(BEGAN + 60)
    assert run.goodput(BEGAN + 79) is first
    later = run.goodput(BEGAN + 81)
    assert later is not None and later.wall_s == 81
    append_event(tmp_path, Event(BEGAN + 82, "skip", {"step": 41}))
    run.refresh()
    newest = run.goodput(BEGAN + 82)
    assert newest is not None and newest.wall_s == 82


def test_a_run_without_events_and_one_with_broken_lines_are_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 3, "loss": NaN, "stage": "[red]x\\u001b[2J"}\nnot json\n{"step"'
    )
    (tmp_path / "config.yaml").write_text("stages: [unclosed")
    (tmp_path / "events.jsonl").write_text('{"kind": "hang", "time": 1}\n')
    run = RunDir(tmp_path)
    run.refresh()
    shown = summary_rows(run, now=BEGAN)
    said = dict(shown)
    assert said["loss"] == "nan (not finite)"
    assert "\x1b" not in said["step"] and "[red]x?[2J" in said["step"]
    assert said["effective time"].startswith("unknown")
    problems = [value for label, value in shown if label == "problem"]
    assert len(problems) == 3 and any("config.yaml is not valid YAML" in text for text in problems)


def test_once_prints_plain_lines_without_a_terminal_and_a_panel_on_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "step: 40 of 150, stage small\n" in shown and shown.isascii()
    console = Console(force_terminal=True, width=120, record=True)
    watch._print(summary_rows(RunDir(tmp_path), now=BEGAN), console)
    assert "deco watch" in console.export_text()
    assert main(["watch", str(tmp_path / "new"), "--once"]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    assert main(["watch", str(tmp_path / "new"), "--once"]) == 0
    assert "has not started" in capsys.readouterr().out
    assert main(["watch", str(tmp_path), "--every", "0"]) == 2


def test_the_view_follows_until_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, steps=5)
    looks = iter([lambda: None, lambda: write_more(tmp_path, 6), lambda: None])

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        action = next(looks, None)
        if action is None:
            raise KeyboardInterrupt
        action()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert main(["watch", str(tmp_path), "--every", "0.5"]) == 130
    shown = capsys.readouterr().out
    # Shown again only where something came.
    assert shown.count("step: 5 of 150") == 1 and shown.count("step: 6 of 150") == 1
    console = Console(force_terminal=True, width=120, file=(tmp_path / "screen").open("w"))
    looks = iter([lambda: write_more(tmp_path, 7)])
    with pytest.raises(KeyboardInterrupt):
        watch._live(RunDir(tmp_path), console, 0.5)
    console.file.close()
    assert "7 of 150" in (tmp_path / "screen").read_text()


def write_more(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(step)) + "\n")


def test_bars_and_durations() -> None:
    assert sparkline([0, 1, 2, float("nan"), None, 7], width=4, bars=ASCII_BARS) == "_.-@"
    assert sparkline([5, 5], width=4, bars=ASCII_BARS) == "__" and sparkline([], width=4) == ""
    expected = {0.04: "0.0 s", 59: "59 s", 61: "1 min 1 s", 3600: "1 h 0 min", 200_000: "2 d 7 h"}
    assert {seconds: duration(seconds) for seconds in expected} == expected

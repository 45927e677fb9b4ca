"""Profiles: steps of a launch that begins or ends elsewhere, traces that cannot be written, refused settings.

tests/end_to_end/test_class_training.py reads the trace of a run.
"""

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from deco_scale.config import load_config
from deco_scale.distributed.bootstrap import Environment
from deco_scale.errors import ConfigError
from deco_scale.training.config import ProfileConfig
from deco_scale.training.profiling import ProfileSteps
from deco_scale.watchdog.client import NoWatchdog
from launcher.build.trainer import check
from tests.support import CONFIGS

TRAINER = cast(Any, SimpleNamespace(device=torch.device("cpu"), heartbeat=NoWatchdog()))


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def train(callback: ProfileSteps, first: int, last: int) -> None:
    for step in range(first, last + 1):
        callback.on_step_start(TRAINER, step)
        torch.ones(2).cumsum(0)
        callback.on_step_end(TRAINER, step)


@pytest.mark.parametrize(("first", "steps"), [(1, 3), (4, 3), (5, 3), (1, 1)])
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path: Path, first: int, steps: int) -> None:
    callback = ProfileSteps(ProfileConfig(at_step=5, steps=steps), tmp_path / "profile")
    train(callback, first, 9)
    callback.on_train_end(TRAINER)
    with gzip.open(tmp_path / "profile" / "step_00000005_rank_00000.trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::cumsum") == steps


def test_a_run_that_ends_earlier_keeps_what_was_recorded(tmp_path: Path) -> None:
    callback = ProfileSteps(ProfileConfig(at_step=2, steps=3), tmp_path)
    train(callback, 1, 3)
    callback.on_train_end(TRAINER)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("first", [1, 6])
def test_a_launch_without_the_steps_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int) -> None:
    caplog.set_level(logging.INFO)
    callback = ProfileSteps(ProfileConfig(at_step=5), tmp_path)
    train(callback, first, first + 2)
    callback.on_train_end(TRAINER)
    assert "nothing is profiled" in caplog.text and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    train(ProfileSteps(ProfileConfig(at_step=1, steps=1), tmp_path / "file"), 1, 2)
    assert "could not be written" in caplog.text


def test_other_ranks_are_not_profiled(tmp_path: Path) -> None:
    train(ProfileSteps(ProfileConfig(at_step=1, steps=1, ranks=(1,)), tmp_path), 1, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.profile.at_step=0", "at_step=0"),
        ("run.profile.steps=0", "steps=0"),
        ("run.profile.ranks=[]", "at least one rank"),
        ("run.profile.ranks=[1]", "there is no rank 1; possible: 0 to 0"),
        ("run.profile.at_step=699", "step 701 is beyond the 700 steps"),
        ("run.gc_every=-1", "gc_every=-1"),
        ("run.cpu_binding=core", "run.cpu_binding"),
    ],
)
def test_settings_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(load_config(CONFIGS / "t2i_tiny.yaml", [override]), Environment(0, 1, 0))

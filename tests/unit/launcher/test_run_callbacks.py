"""What callbacks record of a run, and that its log is closed with it."""

import gc
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError, StoreError
from data_pipeline.stream.loader import Batch
from deco_scale.errors import ConfigError, RunError
from deco_scale.observability.config import WandbConfig
from deco_scale.observability.run_logger import PACKAGES, RunLogger
from deco_scale.training.callbacks import Callback
from deco_scale.training.config import RunSettings, StageConfig
from deco_scale.training.train_step import StepResult
from deco_scale.training.trainer import Progress, Stage, Trainer
from launcher.build.callbacks import CheckReplicas, CollectGarbage, LogRun, SampleImages

TRAINER = cast(Any, None)


def a_logger(folder: Path, *, active: bool = True) -> RunLogger:
    return RunLogger(folder, active=active, total_steps=1, wandb=WandbConfig(mode="disabled"), config={})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), 2), (RunError("failed"), 1), (DataError("damaged"), 1), (StoreError("refused"), 1),
        (ValueError("a bug"), None), (KeyboardInterrupt(), None),
    ],
)  # fmt: skip
def test_an_error_with_a_name_is_the_recorded_end(error: BaseException, code: int | None, tmp_path: Path) -> None:
    run_logger = a_logger(tmp_path)
    LogRun(run_logger, {}).on_exception(TRAINER, error)
    run_logger.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["reason"], e["exit_code"]) for e in events] == (
        [] if code is None else [("end", str(error), code)]
    )


@pytest.mark.parametrize("active", [True, False])
def test_a_closed_run_leaves_loggers_as_they_were(active: bool, tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(list(each.handlers), each.level, each.propagate) for each in loggers]
    run_logger = a_logger(tmp_path, active=active)
    run_logger.close()
    assert [(each.handlers, each.level, each.propagate) for each in loggers] == before


@pytest.mark.parametrize("active", [True, False])
def test_lines_come_once_on_rank_0_whatever_handlers_a_library_adds(
    active: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """caplog's own handler is one of the root logger."""
    run_logger = a_logger(tmp_path, active=active)
    logging.getLogger("deco_scale.training").warning("100% of it")
    run_logger.close()
    assert not caplog.messages
    assert capsys.readouterr().out.count("WARNING: 100% of it") == (1 if active else 0)


class Slow(Callback):
    """Moves the clock on by 3 s after an update and by 100 s at the end of a step."""

    now = 0.0

    def on_update_end(self, trainer: Trainer, step: int) -> None:
        self.now += 3.0

    def on_step_end(self, trainer: Trainer, step: int) -> None:
        self.now += 100.0

    def on_log(self, trainer: Trainer, metrics: Any) -> None:
        self.step_s = metrics["step_s"]


class Stub(Trainer):
    """Steps that take no time."""

    def step(self, *_: Any, **__: Any) -> StepResult:
        return StepResult({"loss": torch.tensor(1.0)}, torch.tensor(1.0), torch.tensor(False))


class Data:
    counters: dict[str, int] = {}

    def __iter__(self) -> Any:
        while True:
            yield Batch(np.zeros((1, 16, 16, 3), np.uint8), ["a"], [], [0], None)

    def state(self, samples: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def test_checks_of_a_step_are_part_of_its_time_and_images_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CheckReplicas.on_update_end is not Callback.on_update_end
    assert SampleImages.on_step_end is not Callback.on_step_end
    slow, nothing = Slow(), lambda *_, **__: None
    monkeypatch.setattr(time, "perf_counter", lambda: slow.now)
    stage = StageConfig(name="s", resolution=16, global_batch=1, micro_batch=1, steps=2, lr=1e-3)
    trainer = Stub(
        settings=RunSettings(dir="x", log_every=2),
        stages=[Stage(cfg=stage, accumulation=1, image_flops=1.0)],
        engine=cast(Any, None),
        build_inputs=cast(Any, SimpleNamespace(null=torch.zeros(1))),
        open_data=cast(Any, lambda *_: Data()),
        checkpoints=cast(
            Any,
            SimpleNamespace(
                reserve=nothing, due=nothing, export_due=nothing, start=nothing, finished=nothing,
                take_stall=nothing, observe=nothing,
            ),
        ),
        device=torch.device("cpu"),
        config={},
        callbacks=[slow],
    )  # fmt: skip
    trainer.train(Progress())
    # Step 2 is logged after one of each.
    assert slow.step_s == 3.0 / 2


@pytest.mark.parametrize("ending", ["on_train_end", "on_exception"])
def test_garbage_is_collected_between_steps_only_and_python_does_it_again_afterwards(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, collections = TRAINER, []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collections.append(generation))
    frozen = gc.get_freeze_count()
    callback = CollectGarbage(2)
    callback.on_train_start(trainer)
    assert not gc.isenabled()
    for step in range(1, 41):
        callback.on_update_end(trainer, step)
    # After the first step all, then young objects every second step, and all of them every twentieth.
    assert collections == [2, *[1] * 9, 2, *[1] * 9, 2]
    assert gc.get_freeze_count() > frozen
    getattr(callback, ending)(trainer, *([ValueError()] if ending == "on_exception" else []))
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_is_off_stays_off() -> None:
    trainer = cast(Any, None)
    never = CollectGarbage(0)
    never.on_train_start(trainer)
    assert gc.isenabled()
    gc.disable()
    try:
        callback = CollectGarbage(2)
        callback.on_train_start(trainer)
        callback.on_train_end(trainer)
        assert not gc.isenabled()
    finally:
        gc.enable()

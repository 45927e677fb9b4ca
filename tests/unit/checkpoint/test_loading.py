"""What a checkpoint gives back: each counter its own number, none of them the number of the step."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from deco_scale.checkpoint.format import read_meta
from deco_scale.errors import Damaged
from deco_scale.parallel.engines.base import Engine
from tests.support.crash import PlainEngine, content, meta_of
from tests.support.saving import alone, make, save


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with alone():
        yield


def test_updates_are_restored_as_they_were_counted(tmp_path: Path) -> None:
    """With skipped steps a run has made fewer updates than steps; bias correction needs the updates."""
    source, target = PlainEngine(content(1)), PlainEngine(content(2))
    source.optimizer_steps, target.optimizer_steps = 5, 99
    checkpoints = make(tmp_path)
    # The engine's count is what is stored, not what the caller's meta says.
    path = save(checkpoints, cast(Engine, source), meta_of(7, samples=1000, optimizer_steps=3))
    assert read_meta(path).optimizer_steps == 5
    found = checkpoints.load(cast(Engine, target), path)
    assert target.optimizer_steps == 5
    assert (found.step, found.samples, found.optimizer_steps) == (7, 1000, 5)


def test_a_resumed_run_gets_the_newest_counters(tmp_path: Path) -> None:
    checkpoints, target = make(tmp_path, keep_last=3), PlainEngine(content(9))
    target.optimizer_steps = 99
    for step, updates in ((4, 3), (12, 8)):
        source = PlainEngine(content(step))
        source.optimizer_steps = updates
        save(checkpoints, cast(Engine, source), meta_of(step))
    found = checkpoints.resume(cast(Engine, target), "auto")
    assert found is not None and found[0].step == 12 and target.optimizer_steps == 8


def test_a_meta_that_is_no_json_object_is_damaged(tmp_path: Path) -> None:
    path = save(make(tmp_path), cast(Engine, PlainEngine(content(1))), meta_of(1))
    for text in ("[]", "7", '{"schema_version": 2}', "{"):
        (path / "meta.json").write_text(text)
        with pytest.raises(Damaged, match=r"meta\.json is damaged"):
            read_meta(path)

"""Faults within two processes: a flipped bit, a slow rank, steps that go wrong and are rolled back."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deco_scale.checkpoint.format import read_meta, read_tensors
from deco_scale.config import build_config
from deco_scale.distributed.bootstrap import Environment
from deco_scale.errors import RunError
from deco_scale.observability.run_dir import RunDir
from tests.support.assets import tiny_config
from tests.support.process_groups import in_group

FLIPPED_AT = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "hsdp": {"engine": "fsdp", "dp_replicate": 2},
    "tp": {"engine": "fsdp", "tp": 2},
    "zero1": {"engine": "deepspeed", "zero_stage": 1},
    "zero0": {"engine": "deepspeed", "zero_stage": 0},
}
SKIPPING: dict[str, dict[str, Any]] = {
    "skip_fsdp": {"engine": "fsdp"},
    "skip_zero0": {"engine": "deepspeed", "zero_stage": 0},
    "skip_zero1": {"engine": "deepspeed", "zero_stage": 1},
    # The last of all runs: it changes functions of PyTorch for the whole process.
    "skip_zero3": {"engine": "deepspeed", "zero_stage": 3},
}


@contextmanager
def after_update(action: Callable[[Any, int], None]) -> Iterator[None]:
    """Call ``action(engine, number of the update)`` after each update of either engine in this process."""
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.engines.fsdp import FsdpEngine

    count = 0
    originals = {kind: kind.update for kind in (FsdpEngine, DeepSpeedEngine)}

    def patched(engine: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        result = originals[type(engine)](engine, **kwargs)
        action(engine, count)
        return result

    for kind in originals:
        kind.update = patched  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.update = original  # type: ignore[method-assign]


def train(config: dict[str, Any], rank: int) -> str:
    """Run to the end; the error's text if there is one."""
    from launcher.train import run

    try:
        run(build_config(config, source="test"), Environment(rank, 2, rank))
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Told:
    """Replaces what all ranks are told of a step's loss; ``added`` by the number of the step since it was set."""

    def __init__(self) -> None:
        from deco_scale.training import train_step

        self.added: dict[int, float] = {}
        self._count = 0
        self._original, train_step._mean_over_ranks = train_step._mean_over_ranks, self._told

    def set(self, **added: float) -> None:
        self.added, self._count = {int(name.removeprefix("step")): value for name, value in added.items()}, 0

    def _told(self, losses: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        found = self._original(losses)
        return {**found, "loss": found["loss"] + self.added.get(self._count, 0.0)}


def in_two(folder: str, shards: str, encoder: str) -> None:
    """All runs of this module, on two processes."""
    root, rank = Path(folder), dist.get_rank()
    said: dict[str, str] = {}

    def config(name: str, **sections: Any) -> dict[str, Any]:
        made = tiny_config(root / name, shards, Path(encoder))
        for section, changes in sections.items():
            made[section] = {**made.get(section, {}), **changes}
        return made

    def slow_down(engine: Any, count: int) -> None:
        # Nothing else shows who is slow, since steps take all ranks as long.
        if count == 1 and rank == 1:
            linear = next(m for block in engine.blocks for m in block.modules() if type(m) is torch.nn.Linear)
            forward = linear.forward
            linear.forward = lambda x: (time.sleep(0.2), forward(x))[1]  # type: ignore[method-assign]

    with after_update(slow_down):
        said["slow"] = train(config("slow", run={"stop_at_step": 6}), rank)

    told = Told()
    faults = {"spike_window": 3, "spike_deviations": 20.0}
    often = {"every": 2, "keep_last": 4}
    for policy in ("ignore", "skip", "stop", "rollback"):
        told.set(step7=100.0)
        changes = {"faults": {**faults, "spike": policy}, "checkpoint": often}
        said[policy] = train(config(policy, run={"log_every": 12}, **changes), rank)

    changes = {"faults": {"spike": "rollback", **faults, "max_rollbacks": 1}, "checkpoint": often}
    # Step 12 is the fourth of the second stage after the first roll back, told as the fourteenth.
    told.set(step7=100.0, step14=100.0)
    said["hopeless"] = train(config("hopeless", run={"log_every": 12}, **changes), rank)

    def flip(engine: Any, count: int) -> None:
        if count == FLIPPED_AT and rank == 1:
            name, tensor = sorted(engine.replicas()[0].tensors.items())[-1]
            assert name.startswith("model.")
            # The lowest bit of one weight.
            tensor.flatten().view(torch.int32)[0] ^= 1

    for name, parallel in LAYOUTS.items():
        with after_update(flip):
            said[name] = train(config(name, parallel=parallel), rank)
    for name, parallel in SKIPPING.items():
        told.set(step6=100.0)
        changes = {"faults": {**faults, "spike": "skip"}, "checkpoint": {"every": 1, "keep_last": 2}}
        said[name] = train(config(name, parallel=parallel, run={"stop_at_step": 6}, **changes), rank)
    (root / f"said_{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path, text_encoder: Path) -> Path:
    root = tmp_path_factory.mktemp("faults")
    scratch = tmp_path_factory.mktemp("scratch")
    in_group(in_two, 2, scratch, str(root), str(shards), str(text_encoder))
    return root


def said(runs: Path, name: str) -> str:
    """What both ranks said of a run, which must be the same."""
    first, second = (json.loads((runs / f"said_{rank}.json").read_text())[name] for rank in (0, 1))
    assert first == second
    return str(first)


def events(runs: Path, name: str, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
    folder = RunDir(runs / name)
    folder.refresh()
    return [(e.kind, dict(e.fields)) for e in folder.events if e.kind in kinds]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_is_detected_at_the_next_check(runs: Path, layout: str) -> None:
    text = said(runs, layout)
    assert (
        text.startswith(f"ReplicaMismatchError: step {FLIPPED_AT}:") and f"after step {FLIPPED_AT - 1}:" in text
    ), text
    # Between two ranks nobody knows who is right.
    assert "either may be wrong" in text
    found = [fields for _, fields in events(runs, layout, "corruption")]
    assert [each["rank"] for each in found] == [0, 1] and all(each["tensors"] == 1 for each in found)
    assert not (runs / layout / "checkpoints" / f"step_{FLIPPED_AT:08d}").exists()
    (ended,) = events(runs, layout, "end")
    assert ended[1]["exit_code"] == 1


def test_the_mismatching_rank_of_many_is_named() -> None:
    from deco_scale.distributed.replica_check import bit_digest, compare_digests
    from deco_scale.errors import ReplicaMismatch

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((3, 5), (1,), (0,), (7,))]
    rows = torch.stack([bit_digest(tensors)] * 4)
    assert compare_digests(rows, "abcd", [4, 5, 6, 7]) == []
    tensors[3].view(torch.int32)[2] ^= 1 << 30
    rows[2] = bit_digest(tensors)
    assert compare_digests(rows, "abcd", [4, 5, 6, 7]) == [ReplicaMismatch(6, 1, "d", True)]
    for place in range(7):
        for bit in range(32):
            flipped = tensors[3].clone()
            flipped.view(torch.int32)[place] ^= -(2**31) if bit == 31 else 1 << bit
            assert bit_digest([flipped]) != bit_digest([tensors[3]])


def test_a_slow_rank_is_named(runs: Path) -> None:
    assert said(runs, "slow") == ""
    found = events(runs, "slow", "straggler")
    assert [fields["rank"] for _, fields in found] == [1] and found[0][1]["factor"] > 1.3
    folder = RunDir(runs / "slow")
    folder.refresh()
    for line in folder.metrics[2:]:
        assert len(line["rank_step_s"]) == 2 and line["rank_step_s"][1] > 0.2 + 0.5 * line["rank_step_s"][0]


def test_policies_for_a_spike(runs: Path) -> None:
    assert said(runs, "ignore") == said(runs, "skip") == said(runs, "rollback") == ""
    assert "step 7: a spike of the loss to 1" in said(runs, "stop") and "faults.spike=stop" in said(runs, "stop")
    assert events(runs, "ignore", "spike", "skip", "rollback") == []
    for policy in ("skip", "stop", "rollback"):
        assert [fields["step"] for _, fields in events(runs, policy, "spike")] == [7]


def test_a_roll_back_goes_on_from_an_older_checkpoint_with_newer_data(runs: Path) -> None:
    # The spike of step 7 is read after step 8, which ends the stage: step 6 is the newest that is old enough.
    assert events(runs, "rollback", "rollback") == [("rollback", {"step": 8, "to_step": 6})]
    whole, rolled = (read_samples(runs / name) for name in ("ignore", "rollback"))
    assert whole[12] == 12 * 8 and rolled[12] == (12 + 8 - 6) * 8
    log = (runs / "rollback" / "log.txt").read_text()
    assert "rolled back from step 8 to 6; 16 samples are skipped" in log
    steps = sorted(int(p.name[-8:]) for p in (runs / "rollback" / "checkpoints").glob("step_*"))
    assert steps == [6, 8, 10, 12]
    folder = RunDir(runs / "rollback")
    folder.refresh()
    found = folder.goodput(folder.events[-1].time)
    assert found is not None and found.seconds("lost") > 0


@pytest.mark.parametrize("name", SKIPPING)
def test_an_update_that_is_left_out_changes_no_bit(runs: Path, name: str) -> None:
    assert said(runs, name) == ""
    assert [fields["step"] for _, fields in events(runs, name, "spike")] == [6]
    folders = [runs / name / "checkpoints" / f"step_{step:08d}" for step in (5, 6)]
    before, after = (read_tensors(folder, "") for folder in folders)
    assert before.keys() == after.keys() and any(key.startswith("exp_avg_sq.") for key in after)
    assert all(torch.equal(before[key], after[key]) for key in after)
    assert [read_meta(folder).optimizer_steps for folder in folders] == [5, 5]


def read_samples(folder: Path) -> dict[int, int]:
    run = RunDir(folder)
    run.refresh()
    return {line["step"]: line["samples"] for line in run.metrics if "loss" in line}


def test_too_many_roll_backs_end_the_run(runs: Path) -> None:
    assert "rolled back 1 times already" in said(runs, "hopeless")
    assert [fields["step"] for _, fields in events(runs, "hopeless", "spike")] == [7, 12]
    assert len(events(runs, "hopeless", "rollback")) == 1
    assert events(runs, "hopeless", "end")[0][1]["exit_code"] == 1

"""The same run under every engine and layout: same losses, same weights, resumable everywhere.

All runs go through the launcher's code: real data, encoders, REPA, two stages (16 px, then 32 px) with
accumulation, dropout of captions, EMA, checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deco_scale.checkpoint.format import read_tensors
from tests.support.assets import tiny_config
from tests.support.process_groups import Job, run_jobs, trace, worst_difference

TOLERANCE = 1e-5
"""Relative, loss and gradient norm over 20 steps in fp32; summation order alone gives about 1e-6."""
WEIGHT_TOLERANCE = 5e-5
"""Absolute, weights of order 0.1 after 20 steps of 1e-3: AdamW divides by tiny second moments, which
lifts rounding of gradients near zero to a few percent of one step."""
FSDP = {"engine": "fsdp"}
# On a CPU reshard_after_forward=auto keeps weights gathered; here they are gathered anew.
HSDP = {"engine": "fsdp", "dp_replicate": 2, "reshard_after_forward": True}


def zero(stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage}


class Jobs:
    """Runs of a folder, by name."""

    def __init__(self, root: Path, shards: Path, text_encoder: Path, image_encoder: Path) -> None:
        self._root, self._assets = root, (shards, text_encoder, image_encoder)

    def whole(self, name: str, parallel: dict[str, Any], resume: str = "none", **extra: Any) -> Job:
        config = tiny_config(self._root / name, *self._assets)
        config["parallel"] = parallel
        # Images between the steps: swapping the average in and out must leave no trace.
        config["samples"] = {"every": 4, "prompts": ["a red circle", "blue"], "sampler": {"num_steps": 2}}
        config["checkpoint"] = {"every": 10, "keep_last": 5}
        for stage, steps in zip(config["stages"], (12, 8), strict=True):
            stage["steps"] = steps
        return Job(name, config | extra, resume)

    def from_10(self, name: str, parallel: dict[str, Any], origin: str) -> Job:
        """Goes on at step 10 of another run."""
        return self.whole(name, parallel, str(self._root / origin / "checkpoints" / "step_00000010"))


BF16 = {"precision": {"compute": "bf16"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path, text_encoder: Path, image_encoder: Path) -> Path:
    """Folder with one run per name; see the jobs."""
    root = tmp_path_factory.mktemp("runs")
    jobs = Jobs(root, shards, text_encoder, image_encoder)
    run_jobs([jobs.whole("one", FSDP)], 1, root)
    ahead = jobs.whole("fsdp_2_ahead", FSDP)
    for encoder in ("text_encoder", "image_encoder"):
        ahead.config[encoder] |= {"ahead": True}
    # ZeRO-3 replaces F.linear for the whole process, which moves the last bit of gradients: what must be
    # bit-equal under FSDP runs before it.
    two = [
        jobs.whole("fsdp_2", FSDP),
        jobs.from_10("fsdp_2_again", FSDP, "fsdp_2"),
        ahead,
        jobs.whole("zero1_2", zero(1)),
        jobs.from_10("fsdp_to_zero0_2", zero(0), "fsdp_2"),
        jobs.whole("zero3_2", zero(3)),
        jobs.from_10("zero3_2_again", zero(3), "zero3_2"),
    ]
    run_jobs(two, 2, root)
    run_jobs([jobs.whole("hsdp_2x2", HSDP), jobs.from_10("zero3_2_to_fsdp_4", FSDP, "zero3_2")], 4, root)
    return root


@pytest.fixture(scope="module")
def long_runs(runs: Path, shards: Path, text_encoder: Path, image_encoder: Path) -> Path:
    """The same folder with more of them."""
    jobs = Jobs(runs, shards, text_encoder, image_encoder)
    run_jobs([jobs.whole("one_bf16", FSDP, **BF16)], 1, runs)
    two = [
        jobs.whole("fsdp_2_bf16", FSDP, **BF16),
        jobs.from_10("zero3_to_fsdp_2", FSDP, "zero3_2"),
        jobs.whole("zero0_2", zero(0)),
        jobs.whole("zero2_2", zero(2)),
        jobs.from_10("zero1_to_zero2_2", zero(2), "zero1_2"),
        jobs.whole("zero3_2_bf16", zero(3), **BF16),
        jobs.from_10("one_to_zero3_2", zero(3), "one"),
    ]
    run_jobs(two, 2, runs)
    four = [
        jobs.whole("fsdp_4", FSDP),
        jobs.from_10("fsdp_2_to_zero1_4", zero(1), "fsdp_2"),
        jobs.whole("zero3_4", zero(3) | {"reshard_after_forward": True}),
    ]
    run_jobs(four, 4, runs)
    run_jobs([jobs.from_10("zero3_4_to_one", FSDP, "zero3_4")], 1, runs)
    return runs


WHOLE, LONG_WHOLE = ("fsdp_2", "zero1_2", "zero3_2", "hsdp_2x2"), ("zero0_2", "zero2_2", "fsdp_4", "zero3_4")
RESUMED = ("fsdp_to_zero0_2", "zero3_2_to_fsdp_4")
LONG_RESUMED = ("zero3_to_fsdp_2", "one_to_zero3_2", "zero1_to_zero2_2", "fsdp_2_to_zero1_4", "zero3_4_to_one")
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")


def check_trace(runs: Path, name: str, *, first: int) -> None:
    found = trace(runs / name)
    assert sorted(found) == list(range(first, 21))
    assert worst_difference(found, trace(runs / "one")) < TOLERANCE


def check_state(runs: Path, name: str, kind: str) -> None:
    def load(run: str) -> dict[str, Any]:
        return read_tensors(runs / run / "checkpoints" / "step_00000020", f"{kind}.")

    found, wanted = load(name), load("one")
    assert found.keys() == wanted.keys()
    worst = max((found[n] - wanted[n]).abs().max().item() for n in wanted)
    assert worst < WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
def test_trace_is_that_of_one_process(runs: Path, name: str) -> None:
    check_trace(runs, name, first=1)


@pytest.mark.parametrize("name", RESUMED)
def test_resume_under_another_engine_or_world_continues_the_trace(runs: Path, name: str) -> None:
    check_trace(runs, name, first=11)


@pytest.mark.parametrize("name", WHOLE + RESUMED)
@pytest.mark.parametrize("kind", KINDS)
def test_state_after_the_run_is_that_of_one_process(runs: Path, name: str, kind: str) -> None:
    check_state(runs, name, kind)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_WHOLE + LONG_RESUMED)
def test_more_engines_layouts_and_resumes(long_runs: Path, name: str) -> None:
    check_trace(long_runs, name, first=1 if name in LONG_WHOLE else 11)
    for kind in KINDS:
        check_state(long_runs, name, kind)


@pytest.mark.parametrize("name", ["fsdp_2", "zero3_2"])
def test_resume_under_the_same_layout_is_bit_equal(runs: Path, name: str) -> None:
    found, wanted = trace(runs / f"{name}_again"), trace(runs / name)
    assert sorted(found) == list(range(11, 21))
    assert found == {step: wanted[step] for step in found}


def test_encoding_ahead_is_bit_equal(runs: Path) -> None:
    assert trace(runs / "fsdp_2_ahead") == trace(runs / "fsdp_2")


def check_bf16(runs: Path, name: str) -> None:
    found = trace(runs / name)
    # bf16 has 8 bits: relative rounding 4e-3 an operation, averaged over many in the loss.
    losses: Callable[[dict[int, tuple[float, float]]], dict[int, tuple[float, float]]]
    losses = lambda t: {step: (loss, loss) for step, (loss, _) in t.items()}  # noqa: E731
    assert worst_difference(losses(found), losses(trace(runs / "one"))) < 2e-2
    assert worst_difference(losses(found), losses(trace(runs / "one"))) > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["one_bf16", "fsdp_2_bf16", "zero3_2_bf16"])
def test_bf16_tracks_fp32(long_runs: Path, name: str) -> None:
    check_bf16(long_runs, name)

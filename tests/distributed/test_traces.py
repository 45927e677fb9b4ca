"""The same run under every engine and layout: same losses, same weights, resumable everywhere.

All runs go through the launcher's code: real data, encoders, REPA, two stages (16 px, then 32 px) with
accumulation, dropout of captions, EMA, checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deco_scale.training.checkpoint import read_tensors
from tests.assets import tiny_config
from tests.distributed.harness import Job, run_jobs, trace, worst_difference

TOLERANCE = 1e-5
"""Relative, loss and gradient norm over 20 steps in fp32; summation order alone gives about 1e-6."""
WEIGHT_TOLERANCE = 5e-5
"""Absolute, weights of order 0.1 after 20 steps of 1e-3: AdamW divides by tiny second moments, which
lifts rounding of gradients near zero to a few percent of one step."""
FSDP = {"engine": "fsdp"}
HSDP = {"engine": "fsdp", "dp_replicate": 2}


def zero(stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path, text_encoder: Path, image_encoder: Path) -> Path:
    """Folder with one run per name; see the jobs."""
    root = tmp_path_factory.mktemp("runs")

    def job(name: str, parallel: dict[str, Any], resume: str = "none", **extra: Any) -> Job:
        config = tiny_config(root / name, shards, text_encoder, image_encoder)
        config["parallel"] = parallel
        # Pictures between the steps: swapping the average in and out must leave no trace.
        config["samples"] = {"every": 4, "prompts": ["a red circle", "blue"], "sampler": {"num_steps": 2}}
        config["checkpoint"] = {"every": 10, "keep_last": 5}
        for stage, steps in zip(config["stages"], (12, 8), strict=True):
            stage["steps"] = steps
        return Job(name, config | extra, resume)

    def at_10(name: str) -> str:
        return str(root / name / "checkpoints" / "step_00000010")

    bf16 = {"precision": {"compute": "bf16"}}
    run_jobs([job("one", FSDP), job("one_bf16", FSDP, **bf16)], 1, root)
    # ZeRO-3 replaces F.linear for the whole process, which moves the last bit of gradients: what must be
    # bit-equal under FSDP runs before it.
    two = [job("fsdp_2", FSDP), job("fsdp_2_again", FSDP, at_10("fsdp_2"))]
    ahead = job("fsdp_2_ahead", FSDP)
    ahead.config["text_encoder"] |= {"ahead": True}
    two += [ahead]
    two += [job(f"zero{stage}_2", zero(stage)) for stage in (0, 1, 2, 3)]
    two += [job("fsdp_2_bf16", FSDP, **bf16), job("zero3_2_bf16", zero(3), **bf16)]
    two += [
        job("zero3_2_again", zero(3), at_10("zero3_2")),
        job("one_to_zero3_2", zero(3), at_10("one")),
        job("zero3_to_fsdp_2", FSDP, at_10("zero3_2")),
        job("zero1_to_zero2_2", zero(2), at_10("zero1_2")),
        job("fsdp_to_zero0_2", zero(0), at_10("fsdp_2")),
    ]
    run_jobs(two, 2, root)
    four = [
        job("fsdp_4", FSDP),
        job("hsdp_2x2", HSDP),
        job("zero3_4", zero(3)),
        job("zero3_2_to_fsdp_4", FSDP, at_10("zero3_2")),
        job("fsdp_2_to_zero1_4", zero(1), at_10("fsdp_2")),
    ]
    run_jobs(four, 4, root)
    run_jobs([job("zero3_4_to_one", FSDP, at_10("zero3_4"))], 1, root)
    return root


WHOLE = ("fsdp_2", "zero0_2", "zero1_2", "zero2_2", "zero3_2", "fsdp_4", "hsdp_2x2", "zero3_4")
RESUMED = (
    "one_to_zero3_2",
    "zero3_to_fsdp_2",
    "zero1_to_zero2_2",
    "fsdp_to_zero0_2",
    "zero3_2_to_fsdp_4",
    "fsdp_2_to_zero1_4",
    "zero3_4_to_one",
)


@pytest.mark.parametrize("name", WHOLE)
def test_trace_is_that_of_one_process(runs: Path, name: str) -> None:
    found = trace(runs / name)
    assert sorted(found) == list(range(1, 21))
    assert worst_difference(found, trace(runs / "one")) < TOLERANCE


@pytest.mark.parametrize("name", WHOLE + RESUMED)
@pytest.mark.parametrize("kind", ["model", "ema", "exp_avg", "exp_avg_sq"])
def test_state_after_the_run_is_that_of_one_process(runs: Path, name: str, kind: str) -> None:
    def load(run: str) -> dict[str, Any]:
        return read_tensors(runs / run / "checkpoints" / "step_00000020", f"{kind}.")

    found, wanted = load(name), load("one")
    assert found.keys() == wanted.keys()
    worst = max((found[n] - wanted[n]).abs().max().item() for n in wanted)
    assert worst < WEIGHT_TOLERANCE


@pytest.mark.parametrize("name", RESUMED)
def test_resume_under_another_engine_or_world_continues_the_trace(runs: Path, name: str) -> None:
    found = trace(runs / name)
    assert sorted(found) == list(range(11, 21))
    assert worst_difference(found, trace(runs / "one")) < TOLERANCE


@pytest.mark.parametrize("name", ["fsdp_2", "zero3_2"])
def test_resume_under_the_same_layout_is_bit_equal(runs: Path, name: str) -> None:
    found, wanted = trace(runs / f"{name}_again"), trace(runs / name)
    assert sorted(found) == list(range(11, 21))
    assert found == {step: wanted[step] for step in found}


def test_text_encoded_ahead_is_bit_equal(runs: Path) -> None:
    assert trace(runs / "fsdp_2_ahead") == trace(runs / "fsdp_2")


@pytest.mark.parametrize("name", ["one_bf16", "fsdp_2_bf16", "zero3_2_bf16"])
def test_bf16_tracks_fp32(runs: Path, name: str) -> None:
    found = trace(runs / name)
    # bf16 has 8 bits: relative rounding 4e-3 an operation, averaged over many in the loss.
    losses: Callable[[dict[int, tuple[float, float]]], dict[int, tuple[float, float]]]
    losses = lambda t: {step: (loss, loss) for step, (loss, _) in t.items()}  # noqa: E731
    assert worst_difference(losses(found), losses(trace(runs / "one"))) < 2e-2
    assert worst_difference(losses(found), losses(trace(runs / "one"))) > 0

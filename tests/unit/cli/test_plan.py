"""``deco plan``: the table and its recommendation, the layout of parameters, and what is refused."""

from pathlib import Path

import pytest

from deco_scale.config import load_config
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.flops import Workload
from deco_scale.planning.forecast import plan_as_configured
from deco_scale.planning.hardware import gpu_device
from deco_scale.planning.memory import layout_rows
from tests.support import CONFIGS
from tests.support.commands import deco

XXL = CONFIGS / "t2i_xxl.yaml"
TINY = CONFIGS / "t2i_tiny.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0", "--gpu", "h100"], "--gpus: 0 is not at least 1"),
        (
            ["--gpus", "8", "--gpu", "v100"],
            "--gpu v100: unknown; possible: 4090, a100, a100-40, a800, b200, h100, h20",
        ),
        (["--gpus", "8"], "needs --layout, --precision, --simulate or --gpu"),
        (["--gpus", "7", "--gpu", "h100"], "no layout takes the global batches"),
        (["--gpus", "8", "--gpu", "h100", "--price", "0"], "--price: 0 is not above 0"),
        (["--gpus", "8", "--gpu", "h100", "--network-gbps", "-1"], "--network-gbps -1.0 must be positive"),
        (["--gpus", "8", "--gpu", "h100", "--top", "0"], "--top: 0 is not at least 1"),
        (["--gpus", "2", "--gpu", "a100", "model.dim=12288", "model.num_heads=96"], "nothing fits on 2 x a100"),
    ],
)
def test_the_impossible_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert deco(["plan", "--config", str(XXL), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_table_has_both_engines_the_cost_and_the_recommendation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command = ["plan", "--config", str(XXL), "--gpus", "8", "--gpu", "h100", "--results", str(tmp_path)]
    assert deco([*command, "--price", "3"]) == 0
    shown = capsys.readouterr().out
    for part in ("fsdp", "ZeRO-3", "recommended: parallel.engine=", "cost", "assumed", "measured", "own"):
        assert part in shown, part
    assert f"no throughput result in {tmp_path}" in shown
    assert deco(command) == 0
    assert "cost" not in capsys.readouterr().out
    # What is recommended can be given to the trainer as it stands.
    line = next(line for line in shown.splitlines() if line.startswith("recommended: "))
    cfg = load_config(XXL, line.removeprefix("recommended: ").split())
    dims = resolve_parallel_dims(cfg.parallel, 8)
    check_tp(cfg.model, dims.tp)
    device = gpu_device("h100", compute=cfg.precision.compute)
    plan = plan_as_configured(
        Workload(model=cfg.model, compute="bf16", fused=True), cfg.stages, cfg.parallel, device, gpus=8
    )
    assert device.fits(plan.memory_bytes)


@pytest.mark.parametrize(
    ("gpus", "micro", "compiled", "enough_batch"),
    [
        pytest.param(1, 96, True, None, marks=pytest.mark.slow),
        (8, 96, True, None),
        pytest.param(64, 24, True, None, marks=pytest.mark.slow),
        (512, 3, True, 12288),
        (512, 3, False, 24576),
    ],
)
def test_the_plan_says_whether_the_host_keeps_up(
    gpus: int,
    micro: int,
    compiled: bool,
    enough_batch: int | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The published batch on 1 to 512 GPUs: FSDP2, and what to do where a GPU has three images."""
    command = ["plan", "--config", str(XXL), "--gpus", str(gpus), "--gpu", "h100", "--results", str(tmp_path)]
    assert deco([*command, f"compile={str(compiled).lower()}"]) == 0
    shown = capsys.readouterr().out.splitlines()
    best = next(line for line in shown if line.startswith("recommended: "))
    assert "engine=fsdp" in best and f"pretrain_256.micro_batch={micro} " in best
    verdicts = [line for line in shown if line.startswith("host time of")]
    host = "below" if enough_batch is None else "NOT below"
    assert len(verdicts) == 2 and all(f", {host} half of the step;" in line for line in verdicts), verdicts
    advice = [line for line in shown if "larger global batches" in line or "with these global batches" in line]
    assert len(advice) == (0 if enough_batch is None else 2)
    if advice:
        assert f"stages.pretrain_256.global_batch={enough_batch} " in advice[1] and "fsdp" in advice[0]
    assert any("predicted" in line and "(" in line for line in shown)
    assert any("torchtitan" in line for line in shown) and any("Megatron" in line for line in shown)


def test_layout_table_still_lists_every_parameter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert deco(["plan", "--config", str(TINY), "--gpus", "2", "--layout"]) == 0
    shown = capsys.readouterr().out
    for row in layout_rows(load_config(TINY).model, ParallelDims(1, 2)):
        assert row.name in shown
    assert "state of a rank" in shown and "all-gather" in shown

"""The planner against result files: the error of a forecast, ceilings of a machine, and malformed files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from deco_scale.config import load_config
from deco_scale.errors import ConfigError
from deco_scale.planning.calibration import predict, read_gemm_corrections, read_results
from deco_scale.planning.gemm import gemm_share
from deco_scale.planning.host import HOST_TIMES, read_host_times
from tests.support import CONFIGS
from tests.support.commands import deco

XXL = CONFIGS / "t2i_xxl.yaml"
TINY = CONFIGS / "t2i_tiny.yaml"


def _result(**changes: Any) -> dict[str, Any]:
    model = dataclasses.asdict(load_config(XXL).model)
    return {
        "kind": "throughput", "date": "2026-01-02", "commit": "abc", "machine": "x86_64", "python": "3.11",
        "torch": "2.13.0", "config": "t2i_xxl.yaml", "config_digest": "0", "model": model,
        "device": "NVIDIA H100 80GB HBM3", "threads": 1, "world": 1, "engine": "fsdp", "zero_stage": None,
        "layout": {"dp_replicate": 1, "dp_shard": 1, "tp": 1}, "compute": "bf16", "kernels": "triton",
        "attention": "auto", "compile": False, "activation_checkpointing": "none", "resolution": 256,
        "micro_batch": 32, "accumulation": 1, "step_s": 1.0, "images_per_s": 32.0, "tflops_per_s": 1.0,
        "gemm_tflops_per_s": 700.0, "copy_gb_per_s": 2900.0, "mfu_of_gemm": 0.1, "mfu_of_datasheet": 0.1,
        "peak_memory_bytes": 2**35, "data_wait_s": 0.0, "parts": {}, **changes,
    }  # fmt: skip


def _write(folder: Path, name: str, content: Any) -> Path:
    path = folder / f"throughput_{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_error_is_stated_for_every_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, "a", _result())
    measured, _ = read_results(tmp_path)
    step_s, memory = predict(measured[0])
    # Files whose true values are known: the prediction is half, and one and a half times, of what was measured.
    _write(tmp_path, "a", _result(step_s=2 * step_s, peak_memory_bytes=2 * memory))
    _write(tmp_path, "b", _result(step_s=step_s / 1.5, peak_memory_bytes=memory / 1.5))
    _write(tmp_path, "other", {"kind": "throughput_straightforward"})
    measured, skipped = read_results(tmp_path)
    assert skipped == 1 and [m.file for m in measured] == ["throughput_a.json", "throughput_b.json"]
    for m in measured:
        assert predict(m) == pytest.approx((step_s, memory))
    arguments = ["plan", "--config", str(XXL), "--gpus", "8", "--results", str(tmp_path)]
    for other in (["--gpu", "h200"], ["--gpu", "h100", "precision.compute=fp32"]):
        assert deco([*arguments, *other]) == 0
        assert "measured: throughput_" not in capsys.readouterr().out
    assert deco([*arguments, "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "throughput_a.json (1 x NVIDIA H100 80GB HBM3): step" in shown and "measured (-50%)" in shown
    assert "throughput_b.json" in shown and "measured (+50%)" in shown
    assert "median error: step time 50%, memory 50%" in shown
    # The file's own ceilings are the rates, marked as measured.
    assert "GEMM 700 TFLOP/s (measured: throughput_a.json)" in shown


def test_measured_products_and_host_times_replace_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files as the GPU suite and benchmarks.host_time write them."""
    shape = {"name": "image qkv", "rows": 16384, "in_features": 1536, "out_features": 4608}
    ceilings = {"gemm_tflops_per_s": 800.0, "copy_gb_per_s": 3000.0, "device": "NVIDIA H100 80GB HBM3"}
    share = gemm_share(16384, 4608, 1536, sms=132) / gemm_share(8192, 8192, 8192, sms=132)
    rates = {"forward_tflops_per_s": 800 * share / 2, "dW_tflops_per_s": 800.0}
    parts = {"ceilings": ceilings, "image_qkv": {**shape, **rates}}
    (tmp_path / "gemm.json").write_text(json.dumps({"parts": parts}))
    found, source = read_gemm_corrections(tmp_path, "h100")
    assert source == "gemm.json" and found["image qkv", "forward"] == pytest.approx(0.5)
    assert set(found) == {("image qkv", "forward"), ("image qkv", "dW")}
    assert read_gemm_corrections(tmp_path, "h200") == ({}, "")
    medians = {
        name: {"micro_batch_additions": 1e4 * n, "update_additions": 1e3}
        for n, name in enumerate(("plain", "fsdp", "zero3"))
    }
    (tmp_path / "host_time_2_2026-01-02.json").write_text(json.dumps({"medians": medians}))
    times = read_host_times(tmp_path)
    assert (
        times.engines["zero3"] == pytest.approx((0.02, 0.001)) and read_host_times(tmp_path / "none") is HOST_TIMES
    )
    command = ["plan", "--config", str(XXL), "--gpus", "8", "--gpu", "h100", "--results", str(tmp_path)]
    assert deco(command) == 0
    shown = capsys.readouterr().out
    assert "measured: gemm.json" in shown and "measured: host_time_2_2026-01-02.json" in shown
    for name in ("gemm.json", "host_time_2_2026-01-02.json"):
        (tmp_path / name).write_text("{}")
        assert deco(command) == 2
        assert name in capsys.readouterr().err
        (tmp_path / name).unlink()


def test_a_cpu_file_is_predicted_by_its_own_ceilings(tmp_path: Path) -> None:
    model = dataclasses.asdict(load_config(TINY).model)
    slow = _result(
        model=model, device="AMD EPYC 7B13", resolution=32, compute="fp32", kernels="torch",
        gemm_tflops_per_s=0.1, copy_gb_per_s=10.0, memory_before_bytes=2**29, mfu_of_datasheet=None,
    )  # fmt: skip
    _write(tmp_path, "a", slow)
    _write(tmp_path, "b", {**slow, "gemm_tflops_per_s": 0.2, "copy_gb_per_s": 20.0})
    measured, _ = read_results(tmp_path)
    (slow_s, slow_bytes), (fast_s, fast_bytes) = map(predict, measured)
    assert 1 < slow_s / fast_s <= 2
    assert slow_bytes == fast_bytes > 2**29
    assert measured[0].device.kind == "cpu"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, not list"),
        ({k: v for k, v in _result().items() if k != "step_s"}, "'step_s' is missing"),
        (_result(step_s=0), "step_s=0 must be a positive number"),
        (_result(step_s="fast"), "step_s='fast'"),
        (_result(world=2), "is not world=2"),
        (_result(micro_batch=1.5), "micro_batch=1.5 must be a whole number"),
        (_result(compute="fp4"), "compute='fp4'"),
        (_result(engine="deepspeed", zero_stage=0, layout={"dp_replicate": 2, "dp_shard": 1, "tp": 1}, world=2),
         "dp_replicate > 1"),
        (_result(model={"dim": 3}), "missing"),
    ],
)  # fmt: skip
def test_a_malformed_result_file_is_named(content: Any, said: str, tmp_path: Path) -> None:
    path = _write(tmp_path, "bad", content)
    with pytest.raises(ConfigError) as caught:
        read_results(tmp_path)
    assert str(path) in str(caught.value) and said in str(caught.value)

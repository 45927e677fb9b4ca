"""The benchmarks measure what they say they do; sizes are tiny, and no time is looked at."""

import copy
import dataclasses
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import measure, throughput
from benchmarks.kernels import run as kernels
from benchmarks.train import compare as straightforward
from benchmarks.train.eager_reference import REFERENCE_CLASSES, make_reference
from benchmarks.train.parts import PARTS, Timeline, watch
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.yaml import dump_yaml

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"dim": 48, "num_heads": 4, "num_blocks": 3, "patch_size": 16}
DECODER = {"decoder_width": 8, "decoder_blocks": 2}
MODELS = {
    "t2i_deco": {**SIZES, **DECODER, "num_text_blocks": 1, "text_dim": 24, "text_tokens": 6},
    "c2i_deco": {**SIZES, **DECODER, "num_classes": 5},
    "c2i_baseline": {**SIZES, "num_classes": 5},
}
MICRO = {"micro_batch": 2, "lr": 1e-3}
CEILINGS = ["--gemm-side", "64", "--copy-bytes", "65536"]

pytestmark = pytest.mark.usefixtures("one_thread")


def made(kind: str) -> tuple[Objective, tuple[Tensor, ...]]:
    """An objective with normal weights (none has a gradient of zero), and its inputs."""
    torch.manual_seed(0)
    cfg = ModelConfig(kind=kind, **MODELS[kind])  # type: ignore[arg-type]
    objective = Objective(Denoiser(cfg), ObjectiveConfig(repa_layer=2), encoder_dim=16)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.1)
    condition = torch.randn(2, 6, 24) if kind == "t2i_deco" else torch.tensor([1, 4])
    images = torch.randn(2, 2, 3, 32, 48).unbind()
    return objective, (*images, torch.rand(2), condition, torch.randn(2, 6, 16))


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_its_formulas_written_op_by_op(kind: str) -> None:
    objective, inputs = made(kind)
    twin = make_reference(copy.deepcopy(objective)).double()
    assert not {type(module) for module in twin.modules()} & set(REFERENCE_CLASSES)
    found = objective(*inputs)
    wanted = twin(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert set(found) == set(wanted) == {"loss", "loss_flow", "loss_freq", "loss_repa"}
    for losses in (found, wanted):
        losses["loss"].backward()
    for name, value in found.items():
        # Means of 9,216 squares in fp32.
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-6)
    for (name, one), (_, other) in zip(objective.named_parameters(), twin.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and other.grad.any(), name
        # fp32 against float64 through three blocks and 3,072 pixels; a wrong eps of a norm would be 2e-5.
        assert (one.grad - other.grad).norm() / other.grad.norm() < 5e-6, name


def test_differing_gradients_are_detected() -> None:
    objective, inputs = made("c2i_deco")
    twin = make_reference(copy.deepcopy(objective))
    with torch.no_grad():
        twin.denoiser.blocks[0].norm1.weight *= 1 + 1e-3  # type: ignore[union-attr,operator]
    for module in (objective, twin):
        module(*inputs)["loss"].backward()
    assert straightforward.relative_difference(objective, twin) > straightforward.DIFFERENCE
    twin.denoiser.blocks[0].norm1.weight.grad = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1\.weight has no gradient"):
        straightforward.relative_difference(objective, twin)


def test_comparison_keeps_promises_and_numbers_apart(capsys: pytest.CaptureFixture[str]) -> None:
    case = straightforward.Case(
        side=32, batch=2, dim=32, num_heads=2, num_blocks=1, text_dim=16, text_tokens=4, encoder_dim=16
    )
    result = straightforward.compare(case, CPU, repeats=1, console=Console(width=200))
    assert result["same_numbers"]
    assert len(result["promises"]) == 7
    assert json.loads(json.dumps(result))["decoder"]["seconds"].keys() == set(straightforward.NAMES)
    printed = capsys.readouterr().out
    assert printed.count("at least") + printed.count("at most") == 7
    assert not straightforward.Promise("", 1.5, 1.4).met
    assert not straightforward.Promise("", 0.25, 0.3, at_most=True).met


def test_parts_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, inputs = made("t2i_deco")
    plain = copy.deepcopy(objective)
    timeline = Timeline(CPU)
    watch(objective, timeline)
    now = 0.0

    def mark(stopwatch: measure.Stopwatch) -> float:
        nonlocal now
        now += 1.0
        return now

    # A clock that every mark moves on by one.
    monkeypatch.setattr(measure.Stopwatch, "mark", mark)
    for _ in range(3):
        objective.zero_grad()
        now = 0.0
        with timeline.step():
            objective(*inputs)["loss"].backward()
        # Marks are contiguous: all time between the first and the last of them belongs to a part.
        assert sum(timeline._steps[-1].values()) == now - 1.0 > len(PARTS)
    assert set(timeline.medians()) == set(PARTS) - {"inputs", "optimizer"}
    plain(*inputs)["loss"].backward()
    for one, other in zip(objective.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        # Watching changes nothing but the order in which the gradients of a tensor with several uses are summed.
        assert (one.grad - other.grad).norm() <= 5e-6 * other.grad.norm()


@pytest.mark.parametrize(("module", "part"), [("mlp", "MLP"), ("attn", "attention"), ("modulation", "modulation")])
def test_time_goes_to_the_part_that_takes_it(module: str, part: str) -> None:
    objective, inputs = made("t2i_deco")
    slept = 0.3

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            time.sleep(slept)
            return grads[0]

    timeline = Timeline(CPU)
    target = getattr(objective.denoiser.blocks[1], module)
    forward = target.forward
    target.forward = lambda *args: Slow.apply(forward(*args))
    watch(objective, timeline)
    with timeline.step():
        objective(*inputs)["loss"].backward()
    assert timeline.medians()[part] >= slept


def test_medians_take_turns_and_leave_out_the_warm_up() -> None:
    calls: list[str] = []
    found = measure.medians_s(
        {name: partial(calls.append, name) for name in "ab"}, repeats=3, device=CPU, warmup=1
    )
    assert calls == ["a", "b"] * 4 and set(found) == {"a", "b"}
    with pytest.raises(ValueError, match="repeats=0"):
        measure.median_s(lambda: None, repeats=0, device=CPU)


def config_file(folder: Path) -> Path:
    """A text model with REPA whose encoders are not there, in two micro-batches a step."""
    raw = {
        "run": {"dir": str(folder / "run")},
        "model": {"kind": "t2i_deco", **MODELS["t2i_deco"]},
        "objective": {"repa_layer": 1},
        "text_encoder": {"path": "none", "max_tokens": 6},
        "image_encoder": {"path": "none"},
        "data": {"url": "none"},
        "precision": {"compute": "fp32"},
        "stages": [{"name": "small", "resolution": 32, "steps": 1, "global_batch": 4, **MICRO}],
    }
    path = folder / "small.yaml"
    path.write_text(dump_yaml(raw))
    return path


CONTRACT = {
    "kind", "date", "commit", "machine", "python", "torch", "config", "config_digest", "model", "device",
    "threads", "world", "engine", "zero_stage", "layout", "compute", "kernels", "attention", "compile",
    "activation_checkpointing", "resolution", "micro_batch", "accumulation", "step_s", "images_per_s",
    "tflops_per_s", "gemm_tflops_per_s", "copy_gb_per_s", "mfu_of_gemm", "mfu_of_datasheet", "peak_memory_bytes",
    "data_wait_s", "parts",
}  # fmt: skip


def throughput_words(folder: Path) -> list[str]:
    config = ["--config", str(config_file(folder)), "--device", "cpu", "--out", str(folder / "out"), "--name", "t"]
    return [*config, "--repeats", "1", "--warmup", "1", *CEILINGS]


def check_throughput(folder: Path, world: int) -> None:
    out = folder / "out"
    assert next(out.glob("t_*.png")).stat().st_size > 0
    result = json.loads(next(out.glob("t_*.json")).read_text())
    assert set(result) >= CONTRACT
    assert result["kind"] == "throughput" and result["world"] == world and result["engine"] == "fsdp"
    assert result["layout"] == {"dp_replicate": 1, "dp_shard": 1, "tp": world}
    assert result["accumulation"] == 2 and result["mfu_of_datasheet"] is None and result["zero_stage"] is None
    assert result["images_per_s"] == pytest.approx(4 / result["step_s"])
    assert result["mfu_of_gemm"] == pytest.approx(result["tflops_per_s"] / result["gemm_tflops_per_s"])
    assert set(result["parts"]) == set(PARTS)
    assert len(result["config_digest"]) == 12
    assert ModelConfig(**result["model"]).dim == 48


@pytest.mark.slow
def test_throughput_of_the_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set, so that what the launcher sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert throughput.main(throughput_words(tmp_path)) == 0
    check_throughput(tmp_path, 1)


@pytest.mark.long
def test_throughput_starts_several_processes(tmp_path: Path) -> None:
    words = ["--world", "2", "parallel.tp=2", "parallel.activation_checkpointing=full"]
    command = [sys.executable, "-m", "benchmarks.throughput", *throughput_words(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_throughput(tmp_path, 2)


def test_digest_names_the_configuration_and_wrong_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_file(tmp_path))
    args = throughput.parse(["--config", path, "--micro-batch", "3", "--accumulation", "5"])
    stage = throughput.configured(args, 1).stages[0]
    assert (stage.micro_batch, stage.global_batch) == (3, 15)
    assert throughput.main(["--config", path, "--stage", "large"]) == 2
    assert "['small']" in capsys.readouterr().err
    assert throughput.main(["--config", path, "--micro-batch", "0"]) == 2
    assert "micro_batch=0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        throughput.parse(["--repeats", "0"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_kernels_against_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--repeats", "1", "--batch", "1", "--no-compiled", *CEILINGS]
    assert kernels.main(["--config", str(config_file(tmp_path)), *options, "--out", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("kernels_*.json")).read_text())
    assert len(result["cases"]) == 9
    for name, case in result["cases"].items():
        assert case["seconds"] and not case["failed"], name
        assert "triton" not in case["seconds"]
        assert case["min_bytes"] or case["flops"], name
    assert "Triton kernels are not timed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter; kernels have tests of their own")
def test_triton_variants_compute_what_their_twins_do() -> None:
    pytest.importorskip("triton")
    cfg = ModelConfig(kind="t2i_deco", **{**MODELS["t2i_deco"], "num_blocks": 1, "num_text_blocks": 0})
    setting = kernels.Setting(model=cfg, batch=1, side=2, device=CPU, dtype=torch.float32, triton=True)
    # A decoder draws its weights when its variant is made, and AdamW works in place on tensors of its own.
    cases = [case for case in kernels.all_cases(setting) if case.name not in ("pixel decoder", "AdamW + EMA")]
    compared = 0
    for case in cases:
        if "triton" not in case.variants:
            continue
        compared += 1
        found, wanted = case.variants["triton"](), case.variants["eager"]()
        assert isinstance(found, tuple) and isinstance(wanted, tuple)
        for one, other in zip(found, wanted, strict=True):
            # Sums of at most 2,048 products in another order, relative to the largest entry.
            assert (one - other).abs().max() <= 5e-6 * other.abs().max(), case.name
    assert compared == 5


def test_least_bytes_of_the_decoder() -> None:
    cfg = dataclasses.replace(ModelConfig(kind="c2i_deco", **MODELS["c2i_deco"]))
    setting = kernels.Setting(model=cfg, batch=2, side=3, device=CPU, dtype=torch.float32, triton=False)
    case = next(kernels.all_cases(setting))
    pixels = 2 * 9 * 16 * 16
    # Three channels four times (pixels twice, output, its gradient), eight of the condition three times, fp32.
    assert case.min_bytes == pixels * 4 * (3 * 4 + 8 * 3)

"""The second call of the GPU suite: each check passes on a CPU in its tiny form, and each can fail."""

import dataclasses
import functools
import importlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import record
from benchmarks.gpu import host_time as gpu_host_time
from benchmarks.gpu import parity as gpu_parity
from benchmarks.gpu import rates as gpu_rates
from benchmarks.gpu import second as gpu_second
from benchmarks.gpu_suite import sums_s
from benchmarks.jobs.runner import CheckFailed, Job, NotAvailable, Where, run_jobs
from benchmarks.train import compare as straightforward
from deco_scale.errors import ConfigError
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.training.train_step import StepResult
from tests.support.saving import alone

TRACE = [(2.0, 1.0), (1.5, 0.5)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def group() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def where(tmp_path: Path) -> Where:
    return Where("cpu", True, tmp_path / "job")


def parts(where: Where) -> dict[str, Any]:
    return where.parts_of("job")


def in_a_process(function: str, folder: Path, **options: Any) -> dict[str, Any]:
    """The outcome of a function job: DeepSpeed keeps the first process group of a process."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    job = Job("job", 120.0, function=function, options=options)
    return run_jobs([job], folder, 150.0, Console(quiet=True), quick=True, fork=False)["job"]


def perturbed(trace: gpu_parity.Trace, by: float) -> gpu_parity.Trace:
    return [(loss, norm * (1 + by)) for loss, norm in trace]


class TestJobs:
    def test_every_module_of_gpu_tests_is_in_and_none_stops_at_a_failure(self) -> None:
        jobs = [job for job in gpu_second.jobs("cuda") if job.is_pytest]
        tests = record.ROOT / "tests"
        modules = {*(tests / "gpu").glob("test_*.py"), *(tests / "unit").rglob("test_triton_*.py")}
        assert len(modules) >= 9
        path_of = {job.name: next(word for word in job.command if word.endswith(".py")) for job in jobs}
        assert {record.ROOT / path for path in path_of.values()} == modules
        assert all("-x" not in job.command for job in jobs)
        # What one job leaves out, the other takes.
        named = {job.name: job.command[-1] for job in jobs if "-k" in job.command}
        assert named == {"tests_gpu_engines_zero3": "zero3", "tests_gpu_engines_not_zero3": "not zero3"}
        assert {path_of[name] for name in named} == {"tests/gpu/test_engines.py"}

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_what_is_timed_runs_alone_after_all_that_is_not(self, device: str) -> None:
        jobs = gpu_second.jobs(device)
        names = [job.name for job in jobs]
        beside = sum(job.background for job in jobs)
        assert jobs[0].gate and all(job.background for job in jobs[1 : beside + 1])
        assert all(job.alone for job in jobs[beside + 1 :])
        assert len(set(names)) == len(names)

    def test_estimates_fit_the_call(self) -> None:
        _, estimates = sums_s(gpu_second.jobs("cuda"))
        # Some seconds are the runner's own.
        assert estimates + 8 <= gpu_second.BUDGET_S

    def test_every_function_exists_and_takes_its_options(self, where: Where) -> None:
        for job in gpu_second.jobs("cuda"):
            if job.function is not None:
                module, _, name = job.function.partition(":")
                inspect.signature(getattr(importlib.import_module(module), name)).bind(where, **job.options)

    def test_without_a_gpu_the_gate_stops_what_needs_one(self, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        jobs = [job for job in gpu_second.jobs("cuda") if job.gate or job.name == "attention"]
        # However busy this machine is.
        jobs = [dataclasses.replace(job, limit_s=600.0) for job in jobs]
        outcomes = run_jobs(jobs, tmp_path, 1200.0, Console(quiet=True), device="cuda", fork=False)
        assert {outcome["status"] for outcome in outcomes.values()} == {"not available"}


def test_a_failure_is_in_the_log_before_the_tests_end(tmp_path: Path) -> None:
    module = tmp_path / "test_it.py"
    module.write_text(
        "import time\n"
        "def test_wrong(): assert 2 == 3\n"
        "def test_right(): pass\n"
        "def test_endless(): time.sleep(600)\n"
    )
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.jobs.stream_failures", str(module)]
    log = tmp_path / "log"
    environment = {"PYTHONPATH": str(record.ROOT), "PYTHONUNBUFFERED": "1", "PATH": "/usr/bin:/bin"}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=out, env=environment)
    try:
        deadline = time.monotonic() + 60
        while "assert 2 == 3" not in (text := log.read_text()) or "\n." not in text:
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert "call of test_it.py::test_wrong failed" in text


@pytest.mark.slow
def test_gpu_tests_are_collected_without_an_s3_client() -> None:
    code = (
        "import sys; sys.modules['boto3'] = sys.modules['botocore'] = None; import pytest; "
        "raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/gpu', '--collect-only']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_traces_that_differ_or_are_not_finite_fail() -> None:
    assert gpu_parity.worst(perturbed(TRACE, 1e-3), TRACE) == pytest.approx(1e-3)
    with pytest.raises(CheckFailed, match="not finite"):
        gpu_parity.worst([(2.0, 1.0), (float("nan"), 0.5)], TRACE)
    with pytest.raises(CheckFailed, match=r"a 2\.0e-05"):
        gpu_parity.require_same({"a": 2e-5, "b": 0.0})
    with pytest.raises(CheckFailed):
        gpu_parity.require_same({"a": float("nan")})


@pytest.mark.usefixtures("group")
def test_fp8_in_emulation_is_near_bf16(where: Where) -> None:
    found = gpu_parity.fp8(where)
    assert 0 < found.numbers["torchao"] < found.numbers["between_seeds"]
    assert "not available: te" in found.line and len(parts(where)["torchao"]["losses"]) == 10


@pytest.mark.parametrize(
    ("far", "error", "message"),
    [
        ({"te": 1e-3, "torchao": 1e-3}, None, None),
        ({"te": 0.5, "torchao": 1e-3}, CheckFailed, r"te: mean .*5.00e-01, but between two seeds"),
        ({"te": 0.0, "torchao": 1e-3}, CheckFailed, "te: mean"),
        ({"te": RuntimeError("no kernel image"), "torchao": 1e-3}, CheckFailed, "no kernel image; torchao"),
        ({"te": ConfigError("not installed"), "torchao": 1e-3}, None, None),
        (
            {"te": ConfigError("not installed"), "torchao": ConfigError("gone")},
            NotAvailable,
            "not installed; .*gone",
        ),
    ],
)
def test_fp8_fails_for_each_backend_by_itself(
    far: dict[str, Any],
    error: type[Exception] | None,
    message: str | None,
    where: Where,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trace(cfg: Any, steps: int) -> gpu_parity.Trace:
        shift = 0.1 * cfg.run.seed
        if cfg.precision.compute == "fp8":
            shift = far[cfg.precision.fp8_backend]
        if isinstance(shift, Exception):
            raise shift
        return [(2.0 + shift, 1.0)] * steps

    monkeypatch.setattr(gpu_parity, "trace", trace)
    if error is None:
        assert "torchao (emulated) 1.00e-03" in gpu_parity.fp8(where).line
    else:
        with pytest.raises(error, match=message):
            gpu_parity.fp8(where)
    # One backend's end does not take the other's figures with it.
    assert ("torchao" in parts(where)) == (far["torchao"] == 1e-3)


@pytest.mark.slow
def test_engines_give_the_same_trace(tmp_path: Path) -> None:
    found = in_a_process("benchmarks.gpu.parity:engines", tmp_path)
    assert found["status"] == "pass", found
    assert 0 <= found["numbers"]["ZeRO-3 against FSDP2"] <= gpu_parity.SAME
    assert len(found["parts"]["zero3"]["trace"]) == 4


def test_engines_that_differ_fail(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    by = {"fsdp": 0.0, "deepspeed": 1e-4}
    monkeypatch.setattr(gpu_parity, "trace", lambda cfg, steps: perturbed(TRACE, by[cfg.parallel.engine]))
    with pytest.raises(CheckFailed, match=r"ZeRO-3 against FSDP2 1\.0e-04"):
        gpu_parity.engines(where)


@pytest.mark.long
@pytest.mark.usefixtures("group")
def test_tensor_parallelism_gives_the_same_trace(where: Where) -> None:
    found = gpu_parity.tensor_parallel(where)
    assert 0 < found.numbers["tp 2 against tp 1"] <= gpu_parity.SAME


def test_tensor_parallelism_that_differs_fails(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(target: Any, *, args: tuple[Where, str], **options: Any) -> None:
        (Path(args[1]) / "trace.json").write_text(json.dumps(perturbed(TRACE, -1e-4)))

    monkeypatch.setattr(gpu_parity.mp, "start_processes", ranks)
    monkeypatch.setattr(gpu_parity, "trace", lambda cfg, steps: TRACE)
    with pytest.raises(CheckFailed, match="tp 2 against tp 1"):
        gpu_parity.tensor_parallel(where)


def test_the_model_is_its_formulas(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(gpu_parity.twins(where).numbers.values()) <= gpu_parity.SAME
    make = straightforward.make_objectives

    def made(*arguments: Any) -> Any:
        objectives = make(*arguments)
        with torch.no_grad():
            objectives["ours"].denoiser.blocks[0].norm1.weight *= 1 + 1e-3  # type: ignore[union-attr,operator]
        return objectives

    monkeypatch.setattr(straightforward, "make_objectives", made)
    with pytest.raises(CheckFailed, match="step gradients"):
        gpu_parity.twins(where)


@pytest.mark.usefixtures("group")
class TestHostTime:
    def test_figures_of_each_micro_batch_are_on_disk(self, where: Where) -> None:
        found = gpu_host_time.host_time(where, engine="fsdp")
        self.check(found.numbers, parts(where))

    @pytest.mark.slow
    def test_zero3_has_the_same_figures(self, tmp_path: Path) -> None:
        found = in_a_process("benchmarks.gpu.host_time:host_time", tmp_path, engine="zero3")
        assert found["status"] == "pass", found
        self.check(found["numbers"], found["parts"])

    def check(self, numbers: dict[str, Any], on_disk: dict[str, Any]) -> None:
        assert on_disk.keys() == {"build", "micro_1", "micro_2"}
        for name, found in numbers.items():
            assert on_disk[name] == found
            calls = found["host_forward_backward_s"] + found["host_update_s"]
            # Each figure is a median of its own, and a sum of medians may exceed that of the sums.
            assert 0 < calls <= 1.5 * found["host_s"]
            assert 0 < found["host_s"] <= found["wall_s"]

    def test_a_loss_that_is_not_finite_fails(self, where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken(gpu_host_time.TrainingSteps):
            def step(self, *arguments: Any) -> StepResult:
                nan = torch.tensor(float("nan"))
                return StepResult({"loss": nan}, nan, nan)

        monkeypatch.setattr(gpu_host_time, "TrainingSteps", Broken)
        with pytest.raises(CheckFailed, match="loss is nan"):
            gpu_host_time.host_time(where, engine="fsdp")


def test_host_time_is_that_of_the_engines_calls() -> None:
    class Slow:
        def forward_backward(self, inputs: Any, **options: Any) -> dict[str, Tensor]:
            time.sleep(0.05)
            return {}

        def update(self, **options: Any) -> None:
            time.sleep(0.02)

    timed = gpu_host_time.HostTimed(Slow())
    inputs: Any = None
    for _ in range(2):
        timed.forward_backward(inputs, scale=1.0, last=True)
    timed.update(lr=1.0)
    assert timed.forward_backward_s >= 0.1 and timed.update_s >= 0.02


def test_time_in_which_a_kernel_runs_counts_once() -> None:
    assert gpu_host_time.covered([(5.0, 7.0), (0.0, 4.0), (1.0, 2.0), (3.0, 5.0)]) == 7.0
    assert gpu_host_time.covered([(0.0, 1.0), (2.0, 3.0)]) == 2.0
    assert gpu_host_time.covered([]) == 0.0


def test_decoder_has_rates_of_both_directions(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_rates.decoder(where)
    rates = parts(where)["batch_2"]
    assert found.numbers["largest_difference"] < 1e-5
    assert rates["forward_gb_per_s"] > 0 and rates["forward_of_copy"] > 0
    # Patches and output have 3 x 64 values each, the condition 64 x 32; backward writes one of these more.
    rows = 2 * 4
    assert rates["least_bytes"] == {
        "forward": rows * 4 * (2 * 192 + 2048),
        "backward": rows * 4 * (2 * 192 + 2 * 2048),
    }
    forward = PixelDecoder.forward

    def wrong(self: PixelDecoder, *inputs: Tensor) -> Tensor:
        out = forward(self, *inputs)
        return out * 1.001 if self.kernels == "triton" else out

    monkeypatch.setattr(gpu_rates, "choose_kernels", lambda setting, device: "triton")
    monkeypatch.setattr(gpu_rates, "use_kernels", lambda module, kernels: setattr(module, "kernels", kernels))
    monkeypatch.setattr(PixelDecoder, "forward", wrong)
    monkeypatch.setattr("deco_scale.models.pixel_decoder.render_pixels", with_torch_kernels())
    with pytest.raises(CheckFailed, match=r"out 1\.0e-03"):
        gpu_rates.decoder(where)


def with_torch_kernels() -> Any:
    """The pixels' function with PyTorch's operators, whatever kernels it is asked for."""
    from deco_scale.kernels.pixel_decoder import render_pixels

    return lambda *arguments, **options: render_pixels(*arguments, **{**options, "kernels": "torch"})


@pytest.mark.usefixtures("group")
def test_saving_reads_back_what_it_wrote(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_rates.saving(where)
    assert found.numbers["bytes"] == 64 << 20
    assert 0 < parts(where)["save_2"]["stall_2_s"] <= parts(where)["save_2"]["total_2_s"]
    read = gpu_rates.read_tensors

    def flipped(path: Path, prefix: str) -> dict[str, Tensor]:
        stored = read(path, prefix)
        stored["denoiser.1"].view(torch.int32)[5, 7] ^= 1
        return stored

    monkeypatch.setattr(gpu_rates, "read_tensors", flipped)
    with pytest.raises(CheckFailed, match=r"1 were read back wrong: \['denoiser\.1'\]"):
        gpu_rates.saving(where)


def test_sampling_draws_images_for_each_batch(where: Where) -> None:
    found = gpu_rates.sampling(where)
    assert found.numbers.keys() == parts(where).keys() == {"eager_1", "eager_2"}
    assert all(numbers["images_per_s"] > 0 for numbers in found.numbers.values())


def test_images_that_differ_or_are_empty_fail() -> None:
    images = np.random.default_rng(0).integers(0, 250, (2, 8, 8, 3)).astype(np.uint8)
    same = functools.partial(gpu_rates._require_same_images)
    same({"eager": images, "graphs": images})
    with pytest.raises(CheckFailed, match="graphs differ by 2"):
        same({"eager": images, "graphs": images + 2})
    with pytest.raises(CheckFailed, match="one colour"):
        same({"eager": np.full_like(images, 7)})


@pytest.mark.long
def test_the_whole_call_on_a_cpu(tmp_path: Path) -> None:
    jobs = [dataclasses.replace(job, limit_s=600.0) for job in gpu_second.jobs("cpu")]
    outcomes = run_jobs(jobs, tmp_path, 1800.0, Console(quiet=True), device="cpu", quick=True)
    missing = {job.name for job in jobs if job.name.startswith("tests_gpu_")}
    statuses = {name: outcome["status"] for name, outcome in outcomes.items()}
    assert statuses == {job.name: "not available" if job.name in missing else "pass" for job in jobs}, outcomes

"""The GPU suite's first call without a GPU, and what it says of itself: without git, without boto3."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import gpu_attention, gpu_first, gpu_sizes, gpu_steps, gpu_suite, record
from benchmarks.gpu_gemm import products
from benchmarks.jobs import RESERVE_S, CheckFailed, Job, NotAvailable, Where
from deco_scale.config import load_config
from tests.saving import alone


def without_git(folder: Path) -> str:
    """A PATH on which there is no git."""
    bare = folder / "bin"
    bare.mkdir()
    return str(bare)


def test_the_commit_is_gits_or_told_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECO_COMMIT", "abc1234")
    # A tree without .git, inside of another repository too.
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(record, "ROOT", outer / "inner")
        assert record.commit() == "abc1234"
        subprocess.run(["git", "init", "-q", str(outer)], check=True)
        assert record.commit() == "abc1234"
        # A repository of its own, without a commit.
        subprocess.run(["git", "init", "-q", str(outer / "inner")], check=True)
        assert record.commit() == "abc1234"
    monkeypatch.setenv("PATH", without_git(tmp_path))
    assert record.commit() == "abc1234"
    monkeypatch.delenv("DECO_COMMIT")
    assert record.commit() == "unknown"


def test_the_commit_of_a_tree_with_git_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECO_COMMIT", "abc1234")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert record.commit() == head
    (tmp_path / "file").write_text("two")
    assert record.commit() == f"{head}+"


BLOCKER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("boto3", "botocore"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def first_call(folder: Path, *names: str) -> tuple[dict[str, Any], str]:
    """The first call on a CPU without git, without boto3 and with DECO_COMMIT; its file and what it printed."""
    (folder / "sitecustomize.py").write_text(BLOCKER)
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "DECO_COMMIT": "abc1234", "OMP_NUM_THREADS": "1",
        # A compiler of the host may be needed, git not.
        "PATH": without_git(folder),
    }  # fmt: skip
    only = ["--only", *names] if names else []
    words = ["-m", "benchmarks.gpu_suite", "--out", str(folder / "out"), "--first", "--device", "cpu", *only]
    done = subprocess.run(
        [sys.executable, *words], cwd=record.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    whole = json.loads(next((folder / "out").glob("gpu_suite_first_*.json")).read_text())
    logs = "\n".join(path.read_text() for path in sorted((folder / "out").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return whole, done.stdout


def test_first_call_without_git_and_boto3(tmp_path: Path) -> None:
    whole, printed = first_call(tmp_path, "gemm")
    assert whole["commit"] == "abc1234" and whole["kind"] == "gpu_suite_first" and whole["device"] == "cpu"
    assert {name: check["status"] for name, check in whole["checks"].items()} == {
        "machine": "pass",
        "gemm": "pass",
    }
    assert "estimated s" in printed and "nothing about speed" in printed
    parts = whole["checks"]["gemm"]["parts"]
    assert {"ceilings", "image_qkv", "cond_proj"} < set(parts)
    assert all(parts["image_qkv"][f"{kind}_tflops_per_s"] > 0 for kind in ("forward", "dX", "dW"))
    # Torch and the product are loaded once, without boto3.
    assert "torch loaded already" in (tmp_path / "out" / "gemm.log").read_text()


@pytest.mark.long
def test_whole_first_call_on_a_cpu(tmp_path: Path) -> None:
    whole, _ = first_call(tmp_path)
    statuses = {name: check["status"] for name, check in whole["checks"].items()}
    assert {statuses.pop(name) for name in ("fp8_te", "warm_up_te_256")} == {"not available"}
    assert set(statuses.values()) <= {"pass"} | ({"not available"} if not _torchao() else set())
    steps = whole["checks"]["xxl_256"]["parts"]
    assert set(steps) == {"straightforward", "eager", "compiled", "compiled_accumulation_4", "trace"}
    rates = {name: numbers["images_per_s"] for name, numbers in steps.items() if "images_per_s" in numbers}
    assert steps["trace"]["variant"] == max(rates.keys() - {"straightforward"}, key=rates.__getitem__)
    assert len(steps["trace"]["kernels"]) == 10 and (tmp_path / "out/xxl_256/trace.json.gz").stat().st_size > 0
    assert set(whole["checks"]["encoders"]["parts"]) == {"dinov2", "qwen3"}


def _torchao() -> bool:
    import importlib.util

    return importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However busy this machine is.
    jobs = [dataclasses.replace(job, limit_s=600.0) for job in gpu_first.jobs("cuda")]
    monkeypatch.setattr(gpu_first, "jobs", lambda device: jobs)
    monkeypatch.setattr(gpu_first, "BUDGET_S", 1200.0)
    assert gpu_suite.main(["--out", str(tmp_path), "--first"]) == 0
    whole = json.loads(next(tmp_path.glob("gpu_suite_first_*.json")).read_text())
    assert {check["status"] for check in whole["checks"].values()} == {"not available"}
    assert {"gemm", "xxl_256", "xxl_256_fsdp", "xxl_512", "fp8_te", "fp8_torchao", "encoders"} < set(
        whole["checks"]
    )


def test_with_neither_flag_both_calls_run_whatever_ends_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setattr(gpu_suite, "__file__", str(tmp_path / "suite.py"))
    # Notes what it was called with; the first call is killed.
    (tmp_path / "suite.py").write_text(
        f"import os, sys\nopen({str(seen)!r}, 'a').write(sys.argv[-1])\n"
        "if '--first' in sys.argv: os.kill(os.getpid(), 9)\n"
    )
    for words in ([], ["--first", "--second"], ["--second", "--first", "--device", "cpu"]):
        seen.unlink(missing_ok=True)
        assert gpu_suite.main([*words, "--out", str(tmp_path)]) == 9
        assert seen.read_text() == "--first--second"


def test_both_calls_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    began = tmp_path / "began"
    waits = f"import os, time; open({str(began)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import sys; from benchmarks.gpu_suite import run_each; run_each([sys.executable, '-c', {waits!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=record.ROOT)
    while not began.exists() or not began.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{began.read_text()}").exists()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_limits_of_the_first_call_fit_its_budget(device: str) -> None:
    jobs = gpu_first.jobs(device)
    limits, _ = gpu_suite.sums_s(jobs)
    assert limits + RESERVE_S <= gpu_first.BUDGET_S <= 255
    assert all(job.estimate_s is not None and job.estimate_s <= job.limit_s for job in jobs)
    assert json.loads(json.dumps([dict(job.options) for job in jobs])) == [dict(job.options) for job in jobs]


def test_some_jobs_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = gpu_first.jobs("cuda")
    assert [job.name for job in gpu_suite.chosen(jobs, ["gemm"])] == ["machine", "gemm"]
    for words in (["--first", "--only", "nothing"], ["--only", "gemm"]):
        with pytest.raises(SystemExit) as ended:
            gpu_suite.main(["--out", str(tmp_path), "--device", "cpu", *words])
        assert ended.value.code == 2
    assert "no job ['nothing']" in capsys.readouterr().err


def test_running_some_jobs_again_keeps_the_others_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(name, 60, command=("-c", f"print({name!r})")) for name in ("one", "two")]
    monkeypatch.setattr(gpu_first, "jobs", lambda device: jobs)

    def lines(*words: str) -> dict[str, str]:
        gpu_suite.main(["--out", str(tmp_path), "--first", "--device", "cpu", *words])
        (file,) = tmp_path.glob("gpu_suite_first_*.json")
        return {name: check["line"] for name, check in json.loads(file.read_text())["checks"].items()}

    monkeypatch.setenv("DECO_COMMIT", "abc")
    monkeypatch.setattr(record, "_git", lambda *arguments: None)
    assert lines() == {"one": "one", "two": "two"}
    jobs[1] = Job("two", 60, command=("-c", "print('again')"))
    assert lines("--only", "two") == {"one": "one", "two": "again"}
    # Figures of another commit are not put beside these.
    monkeypatch.setenv("DECO_COMMIT", "def")
    assert lines("--only", "two") == {"two": "again"}


def test_the_largest_kernels_of_a_profiled_step_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"gemm<[float], {n}>" for n in range(3)]
    kernels = [{"name": name, "ms": 9.0, "calls": 2, "share": 0.1} for name in names]
    trace = {"variant": "compiled", "total_ms": 90.0, "kernels": kernels}
    outcomes: dict[str, Any] = {"gemm": {"parts": {}}, "xxl_256": {"parts": {"trace": trace}}}
    gpu_suite.print_kernels(outcomes, Console(width=100))
    printed = capsys.readouterr().out
    assert "xxl_256, compiled: largest of 90 ms" in printed
    places = [printed.index(name) for name in names]
    assert places == sorted(places)


def test_promises_are_stated_where_both_figures_are_there() -> None:
    def part(rate: float, micro_batch: int = 64, share: float | None = None) -> dict[str, Any]:
        return {"images_per_s": rate, "micro_batch": micro_batch, "mfu_of_datasheet": share}

    def outcomes(**jobs: dict[str, Any]) -> dict[str, Any]:
        return {name: {"parts": parts} for name, parts in jobs.items()}

    assert gpu_suite.promises({}) == []
    assert gpu_suite.promises(outcomes(xxl_256={"compiled": part(3.0), "straightforward": {"failed": "x"}})) == []
    lines = gpu_suite.promises(
        outcomes(
            xxl_256={
                "straightforward": part(10.0, 32),
                "compiled": part(29.0),
                "compiled_accumulation_4": part(30.0, share=0.451),
            },
            xxl_512={"compiled": part(7.0, 16, share=0.449)},
            fp8_te={"compiled": part(34.0)},
        )
    )
    assert lines == [
        "met    MFU at 256 px, accumulation 4, no engine: 45.1% of the datasheet (45% promised)",
        "MISSED MFU at 512 px, no engine: 44.9% of the datasheet (45% promised)",
        "MISSED compiled against straightforward eager: 2.90 times (3.0 promised, micro-batch 64 against 32)",
        "met    FP8 by Transformer Engine against bf16: 1.17 times (1.15 promised)",
    ]


# What it measures.


@pytest.fixture
def group(one_thread: None) -> Iterator[None]:
    """A process group that goes with the test."""
    with alone():
        yield


def test_products_are_the_linears_of_the_model() -> None:
    model = load_config(gpu_sizes.XXL, []).model
    found = {product.name: product for product in products(model, micro_batch=64, resolution=256)}
    shapes = {name: (p.rows, p.in_features, p.out_features, p.count) for name, p in found.items()}
    assert shapes["image qkv"] == (16384, 1536, 4608, 16)
    assert shapes["image gate, up"] == (16384, 1536, 6144, 32)
    assert shapes["image down"] == (16384, 6144, 1536, 16)
    assert shapes["text proj"] == (8192, 1536, 1536, 4)
    assert shapes["context_kv"] == (8192, 1536, 3072, 16)
    assert shapes["cond_proj"] == (16384, 1536, 8192, 1)


def test_steps_without_an_engine_train_as_with_one(tmp_path: Path, group: None) -> None:
    where = Where("cpu", True, tmp_path)
    variant = gpu_steps.Variant("eager", 2, accumulation=2, compile=False)
    cfg = gpu_steps.config(where, resolution=256, variant=variant, precision={"compute": "fp32"})
    env = gpu_steps.Environment(0, 1, 0)
    sharded = gpu_steps.TrainingSteps(cfg, env)
    plain = gpu_steps.TrainingSteps(cfg, env, plain=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in sharded.engine.state().items()}
    with torch.no_grad():
        for name, parameter in plain.engine.objective.named_parameters():
            parameter.copy_(weights[name].full_tensor())
    # The averages start at the weights; they have no part in the losses.
    for one, other in zip(plain.trace(3), sharded.trace(3), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_straightforward_modules_are_put_back(tmp_path: Path, group: None) -> None:
    where = Where("cpu", True, tmp_path)
    variant = gpu_steps.Variant("eager", 2, compile=False)
    cfg = gpu_steps.config(where, resolution=256, variant=variant, precision={"compute": "fp32"})
    made = gpu_steps.TrainingSteps(cfg, gpu_steps.Environment(0, 1, 0), plain=True)
    objective = made.engine.objective
    before = [type(module) for module in objective.modules()]
    batch, _ = made.next_batch()
    inputs = next(made._inputs(batch, None))
    wanted = objective(*inputs)["loss"].item()
    with gpu_steps.straightforward(objective):
        assert not {type(module) for module in objective.modules()} & set(gpu_steps.TWINS)
        assert objective(*inputs)["loss"].item() == pytest.approx(wanted, rel=1e-5)
    assert [type(module) for module in objective.modules()] == before


def test_a_variant_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    real = gpu_steps.time_steps

    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        if made.stage.accumulation == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(made, warmup=0, repeats=1)

    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    where = Where("cpu", True, tmp_path / "steps")
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in (1, 2, 3)]
    with pytest.raises(CheckFailed, match=r"by_2 failed \(OutOfMemoryError: out of memory\); by_1 .* by_3 "):
        gpu_steps.steps(where, resolution=256, variants=sizes)
    parts = where.parts_of("steps")
    assert list(parts) == ["by_1", "by_2", "by_3"] and parts["by_2"] == {
        "failed": "OutOfMemoryError: out of memory"
    }
    for name in ("by_1", "by_3"):
        assert parts[name]["images_per_s"] == pytest.approx(2 * int(name[-1]) / parts[name]["step_s"])
        assert parts[name]["mfu_of_datasheet"] is None and parts[name]["engine"] == "none"
    with pytest.raises(ValueError, match="holds one variant's model"):
        gpu_steps.steps(where, resolution=256, variants=sizes, engine="fsdp")


def test_after_a_gpu_that_is_lost_no_variant_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    monkeypatch.setattr(gpu_steps, "gpu_lost", lambda device: "AcceleratorError: CUDA error")
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in (1, 2)]
    where = Where("cpu", True, tmp_path / "steps")
    with pytest.raises(CheckFailed, match=r"^by_1 failed .* nothing after by_1 ran: the GPU answers no more"):
        gpu_steps.steps(where, resolution=256, variants=sizes, trace=True)
    assert list(where.parts_of("steps")) == ["by_1"]


def test_the_fastest_variant_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    real, seconds = gpu_steps.time_steps, {1: 1.0, 2: 1.0, 3: 9.0}

    def time_steps(made: Any, **options: int) -> dict[str, Any]:
        return {**real(made, warmup=0, repeats=1), "step_s": seconds[made.stage.accumulation]}

    profiled: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu_steps, "time_steps", time_steps)
    monkeypatch.setattr(
        gpu_steps, "profiled", lambda made, name, where: profiled.append((name, made.stage.accumulation))
    )
    sizes = [{"name": f"by_{n}", "micro_batch": 2, "accumulation": n, "compile": False} for n in seconds]
    where = Where("cpu", True, tmp_path / "steps")
    gpu_steps.steps(where, resolution=256, variants=sizes, trace=True)
    assert profiled == [("by_2", 2)]


def test_the_gemm_jobs_ceilings_serve_later_jobs(tmp_path: Path) -> None:
    Where("cpu", True, tmp_path / "gemm").write("ceilings", {"gemm_tflops_per_s": 700.0, "copy_gb_per_s": 2600.0})
    found = gpu_steps.measured_ceilings(Where("cpu", True, tmp_path / "steps"))
    assert (found.gemm_tflops_per_s, found.copy_gb_per_s) == (700.0, 2600.0)


def race(folder: Path) -> tuple[Where, Any]:
    """The attention job of a suite in ``folder``, as a function, and where a later job runs."""
    (folder / "attention.log").touch()
    where = Where("cpu", True, folder / "attention")
    return Where("cpu", True, folder / "steps"), lambda: gpu_attention.attention(
        where, sizes=[(256, 64), (512, 16)]
    )


def test_attention_is_raced_once(tmp_path: Path, one_thread: None) -> None:
    later = Where("cpu", True, tmp_path / "steps")
    assert gpu_attention.raced_attention(later) == [] and gpu_attention.attention_overrides(later) == []
    later, run = race(tmp_path)
    run()
    found = gpu_attention.raced_attention(later)
    # Tiny: 4 and 16 patches with 16 text tokens, and text alone.
    assert [(c.shape.queries, c.shape.keys) for c in found] == [(4, 20), (16, 16), (16, 32)]
    assert {choice.kernel for choice in found} == {"sdpa"} and found[0].times_ms[0][1] > 0
    assert gpu_attention.attention_overrides(later) == []


def test_a_race_that_broke_off_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    later, run = race(tmp_path)

    class Crash(BaseException):
        pass

    def crash(*inputs: torch.Tensor) -> torch.Tensor:
        raise Crash

    # A kernel whose package ends the process: PyTorch's own was measured before.
    monkeypatch.setattr(gpu_attention, "RACED", ("te", "sdpa"))
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda *arguments: None)
    monkeypatch.setitem(gpu_attention.KERNELS, "te", crash)
    with pytest.raises(Crash):
        run()
    found = gpu_attention.raced_attention(later)
    assert [[name for name, _ in choice.times_ms] for choice in found] == 3 * [["sdpa"]]
    # And one that ended it before anything was measured.
    (tmp_path / "attention" / "parts" / "choices.json").unlink()
    assert gpu_attention.attention_overrides(later) == ["attention.backend=sdpa"]
    assert "takes sdpa" in capsys.readouterr().out
    variant = gpu_steps.Variant("eager", 2, compile=False)
    cfg = gpu_steps.config(later, resolution=256, variant=variant, precision={})
    assert cfg.attention.backend == "sdpa"


def test_an_attention_kernel_that_is_wrong_fails_and_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    later, run = race(tmp_path)
    monkeypatch.setattr(gpu_attention, "RACED", ("te", "sdpa"))
    monkeypatch.setattr(gpu_attention, "kernel_missing", lambda *arguments: None)
    monkeypatch.setitem(gpu_attention.KERNELS, "te", lambda q, k, v: 1.01 * gpu_attention.KERNELS["sdpa"](q, k, v))
    with pytest.raises(CheckFailed, match="'te': 'differs from the formula by"):
        run()
    assert [[name for name, _ in choice.times_ms] for choice in gpu_attention.raced_attention(later)] == 3 * [
        ["sdpa"]
    ]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_whatever_a_timed_job_compiles_is_compiled_before(device: str) -> None:
    names = ("resolution", "precision", "engine")
    jobs = gpu_first.jobs(device)
    warmed = [job.options for job in jobs if job.background]
    ahead = [(*(w[name] for name in names), w["variant"]["micro_batch"]) for w in warmed]
    for job in jobs[3:]:
        assert job.background != job.alone
        for variant in job.options.get("variants", []):
            if variant.get("compile", True):
                assert (*(job.options[name] for name in names), variant["micro_batch"]) in ahead


@pytest.mark.parametrize("engine", ["none", "fsdp"])
def test_graphs_of_the_warm_up_are_those_of_the_steps(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    race(tmp_path)[1]()
    graphs: set[Any] = set()

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = tuple((x.dtype, tuple(x.shape)) if isinstance(x, torch.Tensor) else x for x in inputs)
        graphs.add((module.code, values))
        return module.forward

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    monkeypatch.setattr(gpu_steps, "compiler", lambda device: contextlib.nullcontext())
    options: dict[str, Any] = {"resolution": 256, "precision": {"compute": "bf16"}, "engine": engine}
    variant = {"name": "compiled", "micro_batch": 2}
    found = gpu_steps.warm_up(Where("cpu", True, tmp_path / "warm_up"), variant=variant, **options)
    assert found.numbers["loss"] > 0
    ahead = set(graphs)
    graphs.clear()
    torch._dynamo.reset()
    gpu_steps.steps(Where("cpu", True, tmp_path / "steps"), variants=[variant], **options)
    # A text block, an image block, the decoder; the first block of a kind may have a graph of its own.
    assert len(graphs) >= 3 and graphs <= ahead


def test_a_warm_up_that_needs_what_is_missing_is_not_available(tmp_path: Path, group: None) -> None:
    variant = {"name": "te", "micro_batch": 2}
    with pytest.raises(NotAvailable):
        gpu_steps.warm_up(
            Where("cpu", True, tmp_path / "warm_up"), resolution=256, precision=gpu_first.TE, variant=variant
        )


def test_annotations_do_not_count_as_kernels() -> None:
    class Event:
        def __init__(self, key: str, us: float, gpu: bool, annotation: bool) -> None:
            kind = torch.autograd.DeviceType
            self.key, self.count, self.self_device_time_total, self.self_cpu_time_total = key, 1, us, us
            self.device_type, self.is_user_annotation = kind.CUDA if gpu else kind.CPU, annotation

    events = [Event("gemm", 30, True, False), Event("norm", 10, True, False)]
    noise = [Event("region", 40, True, True), Event("aten::mm", 99, False, False)]
    found = gpu_steps.largest(events + noise, gpu=True)
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm", "norm"]
    assert found["total_ms"] == 0.04 and found["kernels"][0]["share"] == 0.75
    with pytest.raises(CheckFailed, match="no kernel"):
        gpu_steps.largest(noise, gpu=True)

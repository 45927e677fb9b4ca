"""The GPU suite's first call without a GPU, and what it says of itself: without git, without boto3."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_suite, record
from benchmarks.gpu import first as gpu_first
from benchmarks.jobs.runner import RESERVE_S, Job


def without_git(folder: Path) -> str:
    """A PATH on which there is no git."""
    bare = folder / "bin"
    bare.mkdir()
    return str(bare)


def test_commit_is_from_git_or_environment_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.slow
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


@pytest.mark.slow
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

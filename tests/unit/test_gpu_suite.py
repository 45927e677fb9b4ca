"""The GPU suite's runner and its first call, without a GPU: limits, kills, what is on disk, what is missing."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_first, gpu_steps, gpu_suite, record
from benchmarks.gpu_gemm import products
from benchmarks.job_processes import _members
from benchmarks.jobs import CheckFailed, Job, Outcome, Where, failed, pytest_job, run_jobs
from benchmarks.jobs import tests_so_far as counted
from deco_scale.config import load_config

ROOT = record.ROOT
IMPORTS = "from pathlib import Path; from rich.console import Console; from benchmarks.jobs import *"


def run(jobs: list[Job], out: Path, budget_s: float = 120.0, **options: Any) -> dict[str, Outcome]:
    """As plain processes, and without loading torch for them, unless the test wants otherwise."""
    return run_jobs(jobs, out, budget_s, Console(quiet=True), **{"fork": False, **options})


def function(name: str, limit_s: float = 60.0, **options: Any) -> Job:
    return Job(name, limit_s, function=f"tests.unit.suite_jobs:{name}", **options)


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid: int) -> bool:
    """A zombie until its new parent looks is not running."""
    status = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("fork", [False, True])
def test_functions_pass_fail_and_are_not_available(tmp_path: Path, fork: bool) -> None:
    jobs = [function("passes", options={"number": 7}), *map(function, ("fails", "lacks", "breaks", "dies"))]
    found = run(jobs, tmp_path, fork=fork, preload=())
    assert {name: outcome["status"] for name, outcome in found.items()} == {
        "passes": "pass", "fails": "fail", "lacks": "not available", "breaks": "fail", "dies": "fail",
    }  # fmt: skip
    assert found["passes"]["numbers"] == {"number": 7} and found["passes"]["parts"] == {"first": {"device": "cpu"}}
    assert found["fails"]["line"] == "7 is not 8" and found["lacks"]["line"] == "no such card"
    assert found["breaks"]["line"] == "KeyError: 'x'"
    assert "KeyError" in (tmp_path / "breaks.log").read_text()
    assert found["dies"]["line"] == "ended with exit code 3, with 1 parts measured; see dies.log"
    assert failed(found) and not failed({"passes": found["passes"], "lacks": found["lacks"]})
    assert ("forked" in (tmp_path / "passes.log").read_text()) == fork


def test_commands_pass_fail_and_are_not_available(tmp_path: Path) -> None:
    jobs = [
        Job("passes", 60, command=("-c", "print('first'); print('last')")),
        Job("fails", 60, command=("-c", "print('why'); raise SystemExit(3)")),
        Job("lacks", 60, command=("-c", "print('no'); raise SystemExit(2)"), missing_codes=(2,)),
        Job("killed", 60, command=("-c", "import os; os.kill(os.getpid(), 11)")),
    ]
    found = run(jobs, tmp_path)
    assert found["passes"]["status"] == "pass" and found["passes"]["line"] == "last"
    assert found["fails"]["status"] == "fail" and found["fails"]["line"] == "why (exit code 3); see fails.log"
    assert found["lacks"]["status"] == "not available"
    assert found["killed"]["status"] == "fail" and "signal SIGSEGV" in found["killed"]["line"]


def test_jobs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="function or a command"):
        Job("both", 5, function="a:b", command=("-c", ""))
    with pytest.raises(ValueError, match="limit_s=0"):
        Job("none", 0, command=("-c", ""))
    with pytest.raises(ValueError, match="must be letters"):
        Job("../up", 5, command=("-c", ""))
    twice = [Job("one", 5, command=("-c", ""))] * 2
    with pytest.raises(ValueError, match="two jobs of one name"):
        run(twice, tmp_path)


@pytest.mark.parametrize("fork", [False, True])
def test_a_killed_job_keeps_its_parts_and_its_log_and_leaves_nothing_running(tmp_path: Path, fork: bool) -> None:
    """It ignores SIGTERM, and has children in its group, in a session of their own, and orphaned."""
    found = run([function("hangs", limit_s=8)], tmp_path, fork=fork, preload=())["hangs"]
    assert found["status"] == "fail"
    assert found["line"] == "took more than 8 s, with 2 parts measured; see hangs.log"
    assert list(found["parts"]) == ["one", "two"]
    assert "two is measured" in (tmp_path / "hangs.log").read_text()
    pids = [int(pid) for pid in (tmp_path / "hangs" / "pids").read_text().split()]
    assert len(pids) == 3
    wait_until(lambda: not any(running(pid) for pid in pids))


@pytest.mark.parametrize("fork", [False, True])
def test_a_suite_that_is_a_job_ends_with_its_jobs(tmp_path: Path, fork: bool) -> None:
    job = 'Job("hangs", 100, function="tests.unit.suite_jobs:hangs")'
    code = f"run_jobs([{job}], Path({str(tmp_path / 'inner')!r}), 100, Console(), fork={fork}, preload=())"
    found = run([Job("outer", 10, command=("-c", f"{IMPORTS}\n{code}"))], tmp_path)
    assert "took more than 10 s" in found["outer"]["line"]
    pids = [int(pid) for pid in (tmp_path / "inner/hangs/pids").read_text().split()]
    wait_until(lambda: not any(running(pid) for pid in pids))


def test_processes_of_a_job_are_found_by_its_mark() -> None:
    environment = {**os.environ, "DECO_SUITE_JOB": "of-this-test"}
    child = subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)
    try:
        wait_until(lambda: child.pid in _members(-1, "of-this-test"))
        assert _members(-1, "of-another") == []
    finally:
        child.communicate(b"\n")


def test_results_are_on_disk_after_each_job(tmp_path: Path) -> None:
    """A job of the suite reads what is there while it runs."""
    code = "import json, sys; print(json.dumps(json.load(open(sys.argv[1]))['checks']))"
    jobs = [
        function("passes"),
        Job("reads", 60, command=("-c", code, str(tmp_path / "suite.json"))),
        function("fails"),
    ]
    found = run(jobs, tmp_path, header={"kind": "test"})
    during = json.loads((tmp_path / "reads.log").read_text())
    assert during["passes"]["status"] == "pass"
    assert {during[name]["status"] for name in ("reads", "fails")} == {"not run"}
    whole = json.loads((tmp_path / "suite.json").read_text())
    assert whole["kind"] == "test" and whole["checks"] == json.loads(json.dumps(found))
    assert json.loads((tmp_path / "fails.json").read_text()) == found["fails"]


def test_a_second_run_takes_nothing_of_the_first_for_its_own(tmp_path: Path) -> None:
    assert run([function("dies")], tmp_path)["dies"]["parts"]
    again = Job("dies", 60, function="tests.unit.suite_jobs:breaks")
    assert run([again], tmp_path)["dies"]["parts"] == {}


def test_without_time_jobs_are_listed_as_not_run(tmp_path: Path) -> None:
    found = run([Job("long", 60, command=("-c", "import time; time.sleep(60)")), function("passes")], tmp_path, 9)
    # The first one's limit is what is left of the budget.
    assert found["long"]["status"] == "fail" and "took more than 7 s" in found["long"]["line"]
    assert found["passes"]["status"] == "not run" and "0 s of the budget are left" in found["passes"]["line"]
    assert failed({"passes": found["passes"]})


def test_a_job_may_take_what_others_leave(tmp_path: Path) -> None:
    sleeps = ("-c", "import time; time.sleep(4); print('done')")
    later = Job("later", 8, command=("-c", "print('done')"))
    assert run([Job("one", 1, command=sleeps), later], tmp_path, 60)["one"]["status"] == "fail"
    allowed = Job("one", 1, command=sleeps, may_take_what_is_left=True)
    assert run([allowed, later], tmp_path, 60)["one"]["status"] == "pass"
    # 17 s less the reserve, less what the later one may take.
    hangs = Job("one", 1, command=("-c", "import time; time.sleep(60)"), may_take_what_is_left=True)
    found = run([hangs, later], tmp_path, 17)
    assert "took more than 7 s" in found["one"]["line"] and found["later"]["status"] == "pass"


def test_background_jobs_run_beside_the_others(tmp_path: Path) -> None:
    waits = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\nprint('seen')"
    )
    flag = tmp_path / "flag"
    jobs = [
        Job("beside", 60, command=("-c", waits, str(flag)), background=True),
        Job("sets", 60, command=("-c", f"open(r'{flag}', 'w'); print('set')")),
    ]
    found = run(jobs, tmp_path)
    assert found["beside"]["line"] == "seen" and found["sets"]["line"] == "set"


def test_where_the_gate_is_not_available_nothing_runs(tmp_path: Path) -> None:
    found = run([function("lacks", gate=True), function("passes")], tmp_path)
    assert found["passes"]["status"] == "not available" and found["passes"]["line"] == "no such card"
    assert not (tmp_path / "passes.log").exists()


def in_a_process(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs that end their process, or whose fork server does not work, are in one of their own."""
    head = f"import sys, time; {IMPORTS}"
    return subprocess.run(
        [sys.executable, "-c", f"{head}\n{code}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_process_ends_at_the_budget_whatever_hangs(tmp_path: Path) -> None:
    """A console that never returns, in the main thread; jobs still running are killed."""
    code = f"""
class Stuck(Console):
    def print(self, *args, **kwargs):
        time.sleep(1000)
quick = Job("quick", 60, command=("-c", "print('done')"))
endless = Job("endless", 60, command=("-c", "import time; time.sleep(1000)"), background=True)
run_jobs([endless, quick], Path({str(tmp_path)!r}), 8, Stuck(), fork=False)
"""
    began = time.monotonic()
    done = in_a_process(code)
    assert done.returncode == 1 and "The 8 s are over" in done.stderr
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "suite.json").read_text())["checks"]["quick"]["status"] == "pass"


@pytest.mark.parametrize(
    ("module", "why"),
    [("time_hangs", "did not fork within 3 s"), ("time_dies", "the fork server failed")],
)
def test_where_forking_fails_jobs_start_as_plain_processes(tmp_path: Path, module: str, why: str) -> None:
    (tmp_path / "time_hangs.py").write_text("import time; time.sleep(1000)")
    (tmp_path / "time_dies.py").write_text("import os; os._exit(1)")
    code = f"""
from benchmarks import job_processes
job_processes.Starter.__init__.__kwdefaults__["start_s"] = 3.0
jobs = [Job("passes", 60, function="tests.unit.suite_jobs:passes")]
found = run_jobs(jobs, Path({str(tmp_path / "out")!r}), 100, Console(), preload=({module!r},))
print(found["passes"]["status"])
import os
sys.stdout.flush()
os._exit(0)
"""
    done = in_a_process(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines()[-1] == "pass", done.stderr
    assert "Jobs start as plain processes" in done.stdout and why in done.stdout


def test_a_terminated_suite_kills_its_jobs(tmp_path: Path) -> None:
    code = f"""
endless = Job("endless", 100, command=("-c", "import os, time; print(os.getpid()); time.sleep(1000)"))
run_jobs([endless], Path({str(tmp_path)!r}), 100, Console(), fork=False)
"""
    head = IMPORTS
    suite = subprocess.Popen([sys.executable, "-c", f"{head}\n{code}"], cwd=ROOT)
    log = tmp_path / "endless.log"
    wait_until(lambda: log.exists() and log.read_text().strip() != "")
    pid = int(log.read_text())
    assert running(pid)
    suite.terminate()
    assert suite.wait(30) == 128 + 15
    wait_until(lambda: not running(pid))


TESTS = """
import time
def test_one(): pass
def test_two(): assert False
def test_three(): pass
def test_four(): time.sleep({seconds})
"""


def test_a_group_of_tests_runs_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "test_group.py"
    path.write_text(TESTS.format(seconds=0))
    words = (str(path), "-c", os.devnull, "--rootdir", str(tmp_path))
    jobs = [
        pytest_job("all", 60, *words),
        pytest_job("good", 60, *words, "-k", "one or three"),
        pytest_job("none", 60, *words, "-k", "nothing", missing_codes=(5,)),
    ]
    found = run(jobs, tmp_path)
    assert found["all"]["status"] == "fail" and "1 failed, 3 passed" in found["all"]["line"]
    assert found["good"]["status"] == "pass" and "2 passed" in found["good"]["line"]
    assert found["none"]["status"] == "not available"


def test_a_killed_group_of_tests_counts_what_passed(tmp_path: Path) -> None:
    path = tmp_path / "test_group.py"
    path.write_text(TESTS.format(seconds=1000))
    job = pytest_job("slow", 15, str(path), "-c", os.devnull, "--rootdir", str(tmp_path))
    found = run([job], tmp_path)["slow"]
    assert found["status"] == "fail"
    assert "took more than 15 s: 2 passed, 1 failed, 0 skipped until then" in found["line"]
    assert counted("..s. [ 50%]\nF.Ex [100%]\n.") == "5 passed, 2 failed, 1 skipped until then"


# What it says of itself.


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
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
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
    assert statuses.pop("fp8_te") == "not available"
    assert set(statuses.values()) <= {"pass"} | ({"not available"} if not _torchao() else set())
    steps = whole["checks"]["xxl_256"]["parts"]
    assert set(steps) == {
        "straightforward", "eager", "compiled", "compiled_accumulation_4", "compiled_static", "trace",
    }  # fmt: skip
    assert len(steps["trace"]["kernels"]) == 10 and (tmp_path / "out/xxl_256/trace.json.gz").stat().st_size > 0
    assert set(whole["checks"]["encoders"]["parts"]) == {"dinov2", "qwen3"}


def _torchao() -> bool:
    import importlib.util

    return importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    assert gpu_suite.main(["--out", str(tmp_path), "--first"]) == 0
    whole = json.loads(next(tmp_path.glob("gpu_suite_first_*.json")).read_text())
    assert {check["status"] for check in whole["checks"].values()} == {"not available"}
    assert {"gemm", "xxl_256", "xxl_256_fsdp", "xxl_512", "fp8_te", "fp8_torchao", "encoders"} < set(
        whole["checks"]
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_limits_of_the_first_call_fit_its_budget(device: str) -> None:
    jobs = gpu_first.jobs(device)
    assert sum(job.limit_s for job in jobs if not job.background) <= gpu_first.BUDGET_S <= 255
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
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_products_are_the_linears_of_the_model() -> None:
    model = load_config(gpu_steps.XXL, []).model
    found = {product.name: product for product in products(model, micro_batch=64, resolution=256)}
    shapes = {name: (p.rows, p.in_features, p.out_features, p.count) for name, p in found.items()}
    assert shapes["image qkv"] == (16384, 1536, 4608, 16)
    assert shapes["image gate, up"] == (16384, 1536, 6144, 32)
    assert shapes["image down"] == (16384, 6144, 1536, 16)
    assert shapes["text proj"] == (8192, 1536, 1536, 4)
    assert shapes["context_kv"] == (8192, 1536, 3072, 16)
    assert shapes["cond_proj"] == (16384, 1536, 8192, 1)


def test_steps_without_an_engine_train_as_with_one(tmp_path: Path, one_thread: None) -> None:
    where = Where("cpu", True, tmp_path)
    variant = gpu_steps.Variant("eager", 2, accumulation=2, compile=False)
    cfg = gpu_steps.config(where, resolution=256, variant=variant, precision={"compute": "fp32"})
    alone = gpu_steps.Environment(0, 1, 0)
    sharded = gpu_steps.TrainingSteps(cfg, alone)
    plain = gpu_steps.TrainingSteps(cfg, alone, plain=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in sharded.engine.state().items()}
    with torch.no_grad():
        for name, parameter in plain.engine.objective.named_parameters():
            parameter.copy_(weights[name].full_tensor())
    # The averages start at the weights; they have no part in the losses.
    for one, other in zip(plain.trace(3), sharded.trace(3), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_straightforward_modules_are_put_back(tmp_path: Path, one_thread: None) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
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


def test_the_gemm_jobs_ceilings_serve_later_jobs(tmp_path: Path) -> None:
    Where("cpu", True, tmp_path / "gemm").write("ceilings", {"gemm_tflops_per_s": 700.0, "copy_gb_per_s": 2600.0})
    found = gpu_steps.measured_ceilings(Where("cpu", True, tmp_path / "steps"))
    assert (found.gemm_tflops_per_s, found.copy_gb_per_s) == (700.0, 2600.0)


def test_attention_is_raced_once(tmp_path: Path) -> None:
    assert gpu_steps.raced_attention(Where("cpu", True, tmp_path / "steps")) == []
    gpu_steps.attention(Where("cpu", True, tmp_path / "attention"), sizes=[(256, 64), (512, 16)])
    found = gpu_steps.raced_attention(Where("cpu", True, tmp_path / "steps"))
    # Tiny: 4 and 16 patches with 16 text tokens, and text alone.
    assert [(c.shape.queries, c.shape.keys) for c in found] == [(4, 20), (16, 16), (16, 32), (16, 16)]
    assert {choice.kernel for choice in found} == {"sdpa"}


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

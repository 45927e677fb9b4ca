"""Jobs with limits: what is on disk, what is killed, what is told, whatever hangs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import record
from benchmarks.jobs.processes import _members
from benchmarks.jobs.runner import Job, Outcome, failed, pytest_job, run_jobs
from benchmarks.jobs.runner import tests_so_far as counted

ROOT = record.ROOT
IMPORTS = "from pathlib import Path; from rich.console import Console; from benchmarks.jobs.runner import *"


@pytest.fixture(scope="module", autouse=True)
def own_fork_server() -> Iterator[None]:
    """A server that other tests have started has loaded what they want; with CUDA's libraries, jobs refuse it."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._stop()
    yield
    server._stop()


def run(jobs: list[Job], out: Path, budget_s: float = 120.0, **options: Any) -> dict[str, Outcome]:
    """As plain processes, and without loading torch for them, unless the test wants otherwise."""
    return run_jobs(jobs, out, budget_s, Console(quiet=True), **{"fork": False, **options})


def function(name: str, limit_s: float = 60.0, **options: Any) -> Job:
    return Job(name, limit_s, function=f"tests.unit.benchmarks.suite_jobs:{name}", **options)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("fork", [False, True])
def test_a_job_has_the_threads_of_its_environment(
    tmp_path: Path, fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is forked from a process that has loaded torch with more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    job = function("threads", environment={"OMP_NUM_THREADS": "1"})
    assert run([job], tmp_path, fork=fork, preload=("torch",))["threads"]["numbers"] == {"threads": 1}


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("fork", [False, True])
def test_a_suite_that_is_a_job_ends_with_its_jobs(tmp_path: Path, fork: bool) -> None:
    job = 'Job("hangs", 100, function="tests.unit.benchmarks.suite_jobs:hangs")'
    code = f"run_jobs([{job}], Path({str(tmp_path / 'inner')!r}), 100, Console(), fork={fork}, preload=())"
    found = run([Job("outer", 10, command=("-c", f"{IMPORTS}\n{code}"))], tmp_path)
    assert "took more than 10 s" in found["outer"]["line"]
    pids = [int(pid) for pid in (tmp_path / "inner/hangs/pids").read_text().split()]
    wait_until(lambda: not any(running(pid) for pid in pids))


def test_processes_of_a_job_are_identified_by_its_mark() -> None:
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
    again = Job("dies", 60, function="tests.unit.benchmarks.suite_jobs:breaks")
    assert run([again], tmp_path)["dies"]["parts"] == {}


@pytest.mark.slow
def test_without_time_jobs_are_listed_as_not_run(tmp_path: Path) -> None:
    found = run([Job("long", 60, command=("-c", "import time; time.sleep(60)")), function("passes")], tmp_path, 9)
    # The first one's limit is what is left of the budget.
    assert found["long"]["status"] == "fail" and "took more than 7 s" in found["long"]["line"]
    assert found["passes"]["status"] == "not run" and "0 s of the budget are left" in found["passes"]["line"]
    assert failed({"passes": found["passes"]})


@pytest.mark.slow
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


def test_what_is_timed_starts_when_nothing_runs_beside_it(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    ends = f"import time; time.sleep(2); open(r'{flag}', 'w'); print('ended')"
    looks = f"import pathlib; print(pathlib.Path(r'{flag}').exists())"
    jobs = [
        Job("beside", 60, command=("-c", ends), background=True),
        Job("meanwhile", 60, command=("-c", looks)),
        Job("timed", 60, command=("-c", looks), alone=True),
    ]
    found = run(jobs, tmp_path)
    # The background job needs its two seconds whatever else is slow.
    assert found["beside"]["line"] == "ended" and found["timed"]["line"] == "True"
    assert list(found).index("beside") < list(found).index("timed")


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


@pytest.mark.slow
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
from benchmarks.jobs import processes
processes.Starter.__init__.__kwdefaults__["start_s"] = 3.0
jobs = [Job("passes", 60, function="tests.unit.benchmarks.suite_jobs:passes")]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_group_of_tests_counts_what_passed(tmp_path: Path) -> None:
    path = tmp_path / "test_group.py"
    path.write_text(TESTS.format(seconds=1000))
    job = pytest_job("slow", 15, str(path), "-c", os.devnull, "--rootdir", str(tmp_path))
    found = run([job], tmp_path)["slow"]
    assert found["status"] == "fail"
    assert "took more than 15 s: 2 passed, 1 failed, 0 skipped until then" in found["line"]
    assert counted("..s. [ 50%]\nF.Ex [100%]\n.") == "5 passed, 2 failed, 1 skipped until then"

"""Jobs with time limits, one after another within a budget; every result is on disk the moment it exists.

A job is a function of this project, ``"module:function"``, or a command. It runs as a process group of its own,
its output streamed into ``OUT/NAME.log``, and is killed as a whole at its limit. After each job ``OUT/NAME.json``
and ``OUT/suite.json`` are written and the table so far is printed.

A function gets a :class:`Where` and returns :class:`Found`, or raises :class:`NotAvailable` or
:class:`CheckFailed`. What it hands to :meth:`Where.write` is kept whatever happens to it afterwards.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.jobs import processes
from benchmarks.jobs.processes import Running, Starter
from benchmarks.record import write_json

RESERVE_S = 2.0
"""Kept of the budget for writing and printing after the last job."""
LEAST_S = 5.0
"""A job is not started with less time left than this."""
Outcome = dict[str, Any]
Device = Literal["cpu", "cuda"]


class NotAvailable(Exception):
    """This machine lacks what the job needs; the text says what."""


class CheckFailed(Exception):
    """The job ran and a result is wrong."""


@dataclasses.dataclass(frozen=True)
class Where:
    """Device (``cpu`` or ``cuda``), whether sizes are small, and the job's own folder, ``OUT/NAME``."""

    device: Device
    quick: bool
    out: Path

    def write(self, part: str, numbers: Mapping[str, Any]) -> None:
        """Put a part result on disk now; a job that is killed later keeps it. Writing it again replaces it."""
        write_json(self.out / "parts" / f"{part}.json", numbers)

    def parts_of(self, job: str) -> dict[str, dict[str, Any]]:
        """What a job of this suite has written so far, by part; empty where it has not run."""
        return read_parts(self.out.parent / job)


@dataclasses.dataclass(frozen=True)
class Found:
    """A line for the table, and numbers for the JSON."""

    line: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """A function or a command with its limit in seconds.

    ``command`` is what follows the Python interpreter. ``options`` are keyword arguments of the function, as JSON
    can hold them. ``environment`` is set for the job alone. ``background`` starts it and goes on with the next;
    ``alone`` starts it when no background job runs any more, which is how everything that is timed starts.
    ``gate`` makes everything after it not available where it is. With ``may_take_what_is_left`` the limit grows
    by the time that the jobs after it do not need for theirs. A command that ends with one of ``missing_codes``
    is not available rather than failed.
    """

    name: str
    limit_s: float
    _: dataclasses.KW_ONLY
    function: str | None = None
    command: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    estimate_s: float | None = None
    background: bool = False
    alone: bool = False
    gate: bool = False
    may_take_what_is_left: bool = False
    missing_codes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.function is None) == (not self.command):
            raise ValueError(f"job {self.name!r} needs a function or a command, and not both")
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name == "suite":
            raise ValueError(f"job name {self.name!r} must be letters, digits, _ . - and not 'suite'")
        if self.limit_s <= 0:
            raise ValueError(f"job {self.name!r}: limit_s={self.limit_s} must be positive")

    @property
    def is_pytest(self) -> bool:
        """Whether the outcome is told by pytest's last line."""
        return self.command[:2] == ("-m", "pytest")


def pytest_job(name: str, limit_s: float, *words: str, **options: Any) -> Job:
    """A group of tests that runs to its end, failed tests or not, and whose log tells what has passed so far."""
    command = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *words)
    return Job(name, limit_s, command=command, **options)


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Part results of the job whose folder this is, the oldest first."""
    files = sorted((folder / "parts").glob("[!.]*.json"), key=lambda path: path.stat().st_mtime_ns)
    return {path.stem: json.loads(path.read_text()) for path in files}


def first_line(error: BaseException) -> str:
    """An error in one line: its type and how its text begins."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


# The job's side.


def run_function(request: Mapping[str, Any]) -> None:
    """Run one function in the process that is its own, write what came of it, and end the process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    where = Where(request["device"], request["quick"], Path(request["out"]))
    where.out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    try:
        module, _, attribute = request["function"].partition(":")
        action = getattr(importlib.import_module(module), attribute)
        if where.device == "cuda":
            _require_gpu()
        found = action(where, **request["options"])
        status, line, numbers = "pass", found.line, found.numbers
    except CheckFailed as error:
        status, line = "fail", str(error)
    except NotAvailable as error:
        status, line = "not available", str(error)
    except Exception as error:
        traceback.print_exc()
        status, line = "fail", first_line(error)
    write_json(where.out / "found.json", {"status": status, "line": line, "numbers": numbers})
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group or a thread that was left open must not hold up the end.
    os._exit(0)


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise NotAvailable("PyTorch sees no GPU on this machine")


def main(argv: Sequence[str] | None = None) -> None:
    """One function job as a plain process: how jobs start where forking them does not work."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("request", help="JSON with function, options, device, quick and out")
    run_function(json.loads(parser.parse_args(argv).request))


# The runner's side.


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    budget_s: float,
    console: Console,
    *,
    device: Device = "cpu",
    quick: bool = False,
    fork: bool = True,
    preload: Sequence[str] = processes.PRELOAD,
    file: str = "suite.json",
    header: Mapping[str, Any] | None = None,
) -> dict[str, Outcome]:
    """Run all jobs in order, within ``budget_s``, and return their outcomes by name.

    An outcome has ``status`` (``pass``, ``fail``, ``not available``, ``not run``), ``line``, ``numbers``,
    ``parts`` and ``seconds``. At the budget this process ends with exit code 1, whatever still hangs. ``fork``
    forks function jobs from a process that has torch and the product loaded already. ``file`` in ``out`` is
    rewritten after each job: ``header``, then ``checks`` with all jobs, after those that ``header`` has. Raises
    ``ValueError`` for two jobs of one name.
    """
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise ValueError(f"two jobs of one name among {names}")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with processes.end_of_process(budget_s), Starter(console, fork=fork, preload=preload) as starter:
        whole = out / file, {**(header or {}), "device": device, "quick": quick}
        suite = _Suite(list(jobs), out, time.monotonic() + budget_s, console, whole, starter)
        suite.run()
    return suite.outcomes


def failed(outcomes: Mapping[str, Outcome]) -> bool:
    """Whether one failed, or did not run for want of time."""
    return any(outcome["status"] in ("fail", "not run") for outcome in outcomes.values())


class _Suite:
    """The jobs of one call, what runs, and what has come of them."""

    def __init__(
        self,
        jobs: list[Job],
        out: Path,
        deadline: float,
        console: Console,
        whole: tuple[Path, dict[str, Any]],
        starter: Starter,
    ) -> None:
        self._jobs, self._out, self._deadline, self._console = jobs, out, deadline, console
        self._starter = starter
        self._file, self._header = whole
        self.outcomes: dict[str, Outcome] = {}
        self._background: list[tuple[Job, Running]] = []

    def run(self) -> None:
        self._write()
        missing: str | None = None
        for job in self._jobs:
            if missing is not None:
                self._settle(job, _outcome("not available", missing))
                continue
            if job.alone:
                self._await_background()
            left = self._left_s()
            if left < LEAST_S:
                self._settle(job, _outcome("not run", f"{max(left, 0):.0f} s of the budget are left"))
                continue
            try:
                running = self._start(job)
            except OSError as error:
                self._settle(job, _outcome("fail", f"could not be started: {error}"))
                continue
            if job.background:
                self._background.append((job, running))
                continue
            self._await(job, running)
            if job.gate and self.outcomes[job.name]["status"] == "not available":
                missing = self.outcomes[job.name]["line"]
        self._await_background()

    def _await_background(self) -> None:
        while self._background:
            self._collect()
            time.sleep(0.05)

    def _left_s(self) -> float:
        return self._deadline - time.monotonic() - RESERVE_S

    def _start(self, job: Job) -> Running:
        """Start ``job`` afresh: nothing of an earlier run of it is taken for its own."""
        folder = self._out / job.name
        for path in [folder / "found.json", self._out / f"{job.name}.json", *folder.glob("parts/*.json")]:
            path.unlink(missing_ok=True)
        log = self._out / f"{job.name}.log"
        log.write_bytes(b"")
        if job.function is None:
            running = self._starter.command(job.command, log, job.environment)
        else:
            request = {
                "function": job.function,
                "options": dict(job.options),
                "device": self._header["device"],
                "quick": self._header["quick"],
                "out": str(folder),
            }
            running = self._starter.function(request, log, job.environment, run_function)
        running.limit_s = min(self._limit_s(job), self._left_s())
        return running

    def _limit_s(self, job: Job) -> float:
        if not job.may_take_what_is_left:
            return job.limit_s
        later = self._jobs[self._jobs.index(job) + 1 :]
        return max(job.limit_s, self._left_s() - sum(other.limit_s for other in later if not other.background))

    def _await(self, job: Job, running: Running) -> None:
        while not running.over(0.1):
            self._collect()
        self._finish(job, running)

    def _collect(self) -> None:
        """Settle background jobs that ended or whose limit is over."""
        for job, running in list(self._background):
            if running.over(0):
                self._background.remove((job, running))
                self._finish(job, running)

    def _finish(self, job: Job, running: Running) -> None:
        """End what is left of a job's processes and settle it; what forking stands in the way of starts again."""
        outcome = self._read(job, running, running.end())
        why = None
        if running.forked and outcome["code"] == processes.UNFORKABLE:
            why = "CUDA was initialised before the fork"
        elif running.forked and job.gate and outcome["status"] != "pass":
            why = f"{job.name} did not pass in a forked one ({outcome['line']})"
        if why is not None:
            self._starter.stop_forking(why)
            again = self._start(job)
            while not again.over(0.1):
                pass
            outcome = self._read(job, again, again.end())
        self._settle(job, outcome)

    def _read(self, job: Job, running: Running, code: int | None) -> Outcome:
        """What came of a job that ended with ``code`` (None: killed at its limit)."""
        folder, log = self._out / job.name, self._out / f"{job.name}.log"
        parts = read_parts(folder)
        measured = f", with {len(parts)} parts measured" if parts else ""
        if code is None:
            why = f"took more than {running.limit_s:.0f} s{measured}"
            if job.is_pytest:
                why += f": {tests_so_far(log.read_text(errors='replace'))}"
            if not running.gone:
                why += "; its process cannot be killed"
            outcome = _outcome("fail", f"{why}; see {log.name}")
        elif job.function is None:
            outcome = _command_outcome(job, code, log)
        elif code or not (folder / "found.json").exists():
            outcome = _outcome("fail", f"ended with {_code(code)}{measured}; see {log.name}")
        else:
            outcome = json.loads((folder / "found.json").read_text())
        return {**outcome, "parts": parts, "seconds": running.seconds, "code": code}

    def _settle(self, job: Job, outcome: Outcome) -> None:
        """Put the outcome on disk, then the whole suite's, then print the table so far."""
        self.outcomes[job.name] = outcome
        write_json(self._out / f"{job.name}.json", outcome)
        self._write()
        show(self.outcomes, self._console)

    def _write(self) -> None:
        """The suite's file lists all jobs at any time; what has no outcome yet is said to have not run."""
        waiting = _outcome("not run", "the suite ended before it did")
        checks = {job.name: self.outcomes.get(job.name, waiting) for job in self._jobs}
        write_json(self._file, {**self._header, "checks": self._header.get("checks", {}) | checks})


def _outcome(status: str, line: str) -> Outcome:
    return {"status": status, "line": line, "numbers": {}, "parts": {}, "seconds": 0.0}


def _code(code: int) -> str:
    """An exit code in words: signals by their names."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _command_outcome(job: Job, code: int, log: Path) -> Outcome:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no output"
    if code in job.missing_codes:
        return _outcome("not available", f"{last}; see {log.name}")
    if code:
        return _outcome("fail", f"{last} ({_code(code)}); see {log.name}")
    if job.is_pytest and not re.search(r"\d+ passed", last):
        return _outcome("not available", f"{last}; no test ran, see {log.name}")
    return _outcome("pass", last)


def tests_so_far(log: str) -> str:
    """Passed, failed and skipped tests by the progress letters of ``pytest -q``, for a run that did not end."""
    letters = "".join(re.findall(r"^([.FEsxX]+)(?: *\[ *\d+%\])?$", log, flags=re.MULTILINE))
    passed, wrong, skipped = letters.count("."), letters.count("F") + letters.count("E"), letters.count("s")
    return f"{passed} passed, {wrong} failed, {skipped} skipped until then"


def show(outcomes: Mapping[str, Outcome], console: Console) -> None:
    """The table of what has come so far."""
    table = Table("job", "result", "s", "what")
    for name, outcome in outcomes.items():
        table.add_row(name, outcome["status"], f"{outcome['seconds']:.0f}", escape(outcome["line"]))
    console.print(table)

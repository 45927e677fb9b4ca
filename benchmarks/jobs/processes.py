"""Processes of jobs: forked from a server that has torch loaded, or started anew; killed with all they started."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import ROOT

PRELOAD = ("benchmarks.jobs.preload",)
"""Modules that the fork server loads: torch and the product, and nothing that touches a GPU."""
MARK = "DECO_SUITE_JOB"
"""Environment variable that tells which processes belong to a job, also those in sessions of their own.

Marks of a suite that is itself a job begin with that job's mark, so that its jobs end with it."""
UNFORKABLE = 97
"""Exit code of a forked job whose parent had initialised CUDA: it cannot use the GPU."""
_GONE_S = 5.0
_live: "set[Running]" = set()


class Running:
    """A job's head process, a session leader, until it has ended or is killed at its limit."""

    def __init__(self, process: "subprocess.Popen[bytes] | Any", mark: str, forked: bool) -> None:
        self._process, self._mark, self.forked = process, mark, forked
        self.pid: int = process.pid
        self._began = time.monotonic()
        self.limit_s, self.seconds, self.gone = float("inf"), 0.0, True
        _live.add(self)

    def _code(self, timeout_s: float) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout_s)
            return None
        self._process.join(timeout_s)
        return self._process.exitcode  # type: ignore[no-any-return]

    def over(self, timeout_s: float) -> bool:
        """Whether it has ended or its limit is over, after waiting for up to ``timeout_s``."""
        self.seconds = time.monotonic() - self._began
        return self._code(timeout_s) is not None or self.seconds > self.limit_s

    def end(self) -> int | None:
        """Kill what is left of it; its exit code, negative for a signal, or None where its limit was over."""
        code = self._code(0)
        self.seconds = time.monotonic() - self._began
        self.kill()
        self.gone = self._code(_GONE_S) is not None
        _live.discard(self)
        return code

    def kill(self) -> None:
        """SIGKILL to its group, and to what it started in groups and sessions of their own. Waits for nothing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._alive():
            # Forked a moment ago, and not yet a leader.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        for pid in _members(self.pid, self._mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _alive(self) -> bool:
        process = self._process
        return (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None


def _members(session: int, mark: str) -> list[int]:
    """Processes of that session, or whose mark, in the environment of their start, begins with ``mark``."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        # A process may end, or belong to somebody else.
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            environment = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if int(stat[3]) == session or any(variable.startswith(wanted) for variable in environment):
                found.append(int(entry))
    return found


class Starter:
    """Starts jobs; as a context it kills at its end what still runs.

    ``start_s`` is how long the fork server may take to fork, its own start and loading included; after that, or
    where forking fails in another way, jobs are started as plain processes, which is printed.
    """

    def __init__(
        self, console: Console, *, fork: bool, preload: Sequence[str] = PRELOAD, start_s: float = 60.0
    ) -> None:
        self._console, self._start_s = console, start_s
        self.fork = fork
        self._context = multiprocessing.get_context("forkserver")
        if fork:
            self._context.set_forkserver_preload(list(preload))

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *error: object) -> None:
        for running in list(_live):
            running.end()

    def stop_forking(self, why: str) -> None:
        """From now on start plain processes, and print why."""
        self.fork = False
        self._console.print(f"Jobs start as plain processes, each with its own imports: {why}", soft_wrap=True)

    def command(self, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Running:
        """``python WORDS`` in the project's root, output appended to ``log`` as it comes."""
        mark = _new_mark()
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **_environment(environment, mark)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(process, mark, forked=False)

    def function(
        self, request: Mapping[str, Any], log: Path, environment: Mapping[str, str], target: Callable[..., None]
    ) -> Running:
        """``target(request)`` in a process of its own."""
        if self.fork:
            mark = _new_mark()
            arguments = (target, dict(request), str(log), _environment(environment, mark))
            process: Any = self._context.Process(target=_forked, args=arguments)
            why = self._try_to_start(process)
            if why is None:
                return Running(process, mark, forked=True)
            self.stop_forking(why)
        code = "from benchmarks.jobs.runner import main; main()"
        return self.command(("-c", code, json.dumps(dict(request))), log, environment)

    def _try_to_start(self, process: Any) -> str | None:
        """Start it, or say why it did not start; a server that hangs is left behind."""
        errors: list[BaseException] = []

        def start() -> None:
            try:
                process.start()
            except BaseException as error:
                errors.append(error)

        with _server_environment():
            thread = threading.Thread(target=start, daemon=True)
            thread.start()
            thread.join(self._start_s)
        if errors:
            return f"the fork server failed ({type(errors[0]).__name__}: {errors[0]})"
        if thread.is_alive():
            _kill_server()
            return f"the fork server did not fork within {self._start_s:.0f} s"
        return None


def _new_mark() -> str:
    return f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"


def _environment(more: Mapping[str, str], mark: str) -> dict[str, str]:
    """What a job's environment has beside this process's."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": path,
        # Whether there is a GPU is asked of NVML, so that asking does not initialise CUDA.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
        # Jobs end without cleaning up, so that nothing holds up their end; the server would list what they held.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker"])),
        **more,
        MARK: mark,
    }


@contextlib.contextmanager
def _server_environment() -> Iterator[None]:
    """The fork server is started by the first fork and takes the environment of that moment."""
    before = dict(os.environ)
    os.environ.update(_environment({}, f"{os.environ.get(MARK, '')}/server"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _server_pid() -> int | None:
    # The standard library has no public name for it.
    return getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)


def _kill_server() -> None:
    pid = _server_pid()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _forked(target: Callable[..., None], request: dict[str, Any], log: str, environment: dict[str, str]) -> None:
    """The forked process: a session of its own, output into the log, then the function."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    print(f"forked, torch {'loaded already' if torch else 'to be loaded'}")
    if torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()):
        print("CUDA was initialised before the fork")
        os._exit(UNFORKABLE)
    if torch is not None and "OMP_NUM_THREADS" in environment:
        # Torch has read the variable already, in the server.
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    target(request)


@contextlib.contextmanager
def end_of_process(budget_s: float) -> Iterator[None]:
    """End this process with code 1 at the budget, whatever hangs, and on SIGTERM; jobs are killed with it."""

    def end() -> None:
        # Not through print: whoever holds a lock of the console may be what hangs.
        os.write(2, f"\nThe {budget_s:.0f} s are over: ended here; the results so far are on disk.\n".encode())
        killer = threading.Thread(target=_kill_all, daemon=True)
        killer.start()
        killer.join(2.0)
        os._exit(1)

    def on_signal(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    timer = threading.Timer(budget_s, end)
    timer.daemon = True
    timer.start()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, on_signal) if in_main else None
    try:
        yield
    finally:
        timer.cancel()
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _kill_all() -> None:
    for running in list(_live):
        running.kill()
    _kill_server()

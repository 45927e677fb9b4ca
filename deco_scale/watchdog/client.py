"""The trainer's side of the watchdog: start the sidecar, send heartbeats, report the exit."""

import faulthandler
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from deco_scale.errors import RunError
from deco_scale.watchdog.artifacts import log_to_stderr
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.heartbeat import HeartbeatPage, Phase
from deco_scale.watchdog.process import DUMP_SIGNAL, ProcessIdentity

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 75.0
"""A little longer than sidecars wait for each other, so that they can report who is missing."""
_CLOSE_S = 12.0
_ASLEEP_S = 30.0
"""A sidecar that shows no life for this long, and for the watchdog's timeout, is lost."""
_T = TypeVar("_T")


class Watchdog:
    """One rank's watchdog; :meth:`start` makes it."""

    def __init__(self, cfg: WatchdogConfig, *, rank: int) -> None:
        self._cfg, self._rank = cfg, rank
        self._page = HeartbeatPage.create()
        self._closed = False
        self._dump = os.memfd_create("stacks", os.MFD_CLOEXEC)
        # The handler runs without the interpreter's lock, in a thread that does not block the signal.
        faulthandler.register(DUMP_SIGNAL, file=self._dump, all_threads=True, chain=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [DUMP_SIGNAL])
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._try(self._start_sidecar)

    def _start_sidecar(self) -> None:
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deco_scale.watchdog.sidecar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(self._page.descriptor, self._dump),
            start_new_session=True,
        )
        threading.Thread(target=self._read_answers, name="watchdog answers", daemon=True).start()

    def _try(self, work: Callable[[], _T]) -> _T | None:
        """Do it unless something failed before; a failure is recorded, to be shared with all ranks."""
        if self._problem:
            return None
        try:
            return work()
        except (RunError, OSError) as error:
            self._problem = str(error)
            return None

    @classmethod
    def start(
        cls,
        cfg: WatchdogConfig,
        *,
        rank: int,
        world_size: int,
        run_dir: Path,
        share: Callable[[Any], Any],
        webhook_env: str | None = None,
    ) -> "Watchdog":
        """Start the sidecars of all ranks; every rank must call it.

        ``share`` broadcasts an object of rank 0 and is called twice. With ``cfg.timeout_s`` 0 nothing is started.
        Raises :class:`RunError` on every rank if one of the sidecars does not start.
        """
        if cfg.timeout_s == 0:
            return NoWatchdog()
        watchdog = cls(cfg, rank=rank)
        settings = {
            **asdict(cfg),
            "rank": rank,
            "world_size": world_size,
            "run_dir": str(run_dir.absolute()),
            "shown": str(run_dir),
            "trainer": asdict(ProcessIdentity.of(os.getpid())),
            "page": watchdog._page.descriptor,
            "dump": watchdog._dump,
            "webhook_env": webhook_env,
        }
        try:
            offer = share(watchdog._try(lambda: watchdog._begin(settings)) if rank == 0 else None)
            if rank == 0:
                watchdog._try(lambda: watchdog._expect("ready"))
            elif offer is not None:
                watchdog._try(lambda: watchdog._join(settings, offer))
            elsewhere = share(watchdog._problem)
        except BaseException:
            watchdog._kill()
            raise
        problem = watchdog._problem or elsewhere
        if problem:
            watchdog._kill()
            raise RunError(f"the watchdog could not be started: {problem}")
        threading.Thread(target=watchdog._watch_sidecar, name="watchdog", daemon=True).start()
        return watchdog

    def beat(self, step: int, phase: Phase) -> None:
        """Report progress, and what the rank starts now. Takes microseconds."""
        self._page.beat(step, phase)

    def report_exit(self, reason: str, code: int) -> None:
        """Call it right before the process exits: 0 and 75 are no fault, other codes end the other ranks."""
        self._page.report_exit(reason, code)

    def wait_for_verdict(self, seconds: float) -> None:
        """Wait to be terminated, after :meth:`report_exit` with an error that a lost rank may have caused."""
        self._page.uncertain = 1
        time.sleep(seconds)

    def close(self) -> None:
        """Wait for the sidecar to exit, after :meth:`report_exit`; only the exit should follow."""
        if self._closed:
            return
        self._closed = True
        self.report_exit("closed", 0)  # unless an exit was reported before
        self._page.closing = 1
        try:
            self._sidecar.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._kill()

    @property
    def _sidecar(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def _kill(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _begin(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Rank 0: start the coordinator; returns what the others need to connect to it."""
        host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        local = host in ("localhost", "::1") or host.startswith("127.")
        offer = {
            "host": "127.0.0.1" if local else host,
            "token": secrets.token_hex(32),
            "started": time.strftime("%Y%m%d_%H%M%S_") + f"{time.time_ns() // 10**6 % 1000:03d}",
        }
        self._configure({**settings, **offer, "local": local})
        message = self._expect("port")
        return {**offer, "port": message["port"], "coordinator": message["member"]}

    def _join(self, settings: dict[str, Any], offer: dict[str, Any]) -> None:
        self._configure({**settings, **offer})
        try:
            self._expect("ready")
        except RunError as error:
            raise RunError(f"{error}; rank 0's is at {offer['host']} port {offer['port']}") from error

    def _configure(self, settings: dict[str, Any]) -> None:
        assert self._sidecar.stdin is not None
        with self._sidecar.stdin as pipe:
            pipe.write(json.dumps(settings).encode() + b"\n")

    def _expect(self, name: str) -> dict[str, Any]:
        """The sidecar's answer with this name; raises :class:`RunError` with its error, or if there is none."""
        deadline, message = time.monotonic() + _START_S, None
        while message is None or name not in message:
            try:
                message = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                message = {"error": f"no answer within {_START_S:g} s"}
            if message is None:
                message = {"error": f"its process exited with code {self._sidecar.wait()}"}
            if "error" in message:
                raise RunError(f"the sidecar of rank {self._rank}: {message['error']}")
        return message

    def _read_answers(self) -> None:
        """Thread: queue what the sidecar answers, None at its end; exit when it says so."""
        assert self._sidecar.stdout is not None
        for line in self._sidecar.stdout:
            message = json.loads(line)
            if "exit" in message:
                os._exit(int(message["exit"]))
            self._answers.put(message)
        self._answers.put(None)

    def _watch_sidecar(self) -> None:
        """Thread: exit if the sidecar is lost: nobody watches this rank then, and the other sidecars notice."""
        alive_count, alive_at = self._page.alive_count, time.monotonic()
        while True:
            with suppress(queue.Empty):
                if self._answers.get(timeout=1.0) is None and not self._closed:
                    self._exit("the sidecar is gone")
            if self._closed:
                return
            if self._page.alive_count != alive_count:
                alive_count, alive_at = self._page.alive_count, time.monotonic()
            elif time.monotonic() - alive_at > max(_ASLEEP_S, self._cfg.timeout_s):
                self._sidecar.kill()
                self._exit("the sidecar shows no life")

    def _exit(self, why: str) -> None:
        log_to_stderr(f"rank {self._rank} exits: {why}")
        os._exit(1)


class NoWatchdog(Watchdog):
    """No watchdog: heartbeats and exits go nowhere."""

    def _ignore(self, *args: object, **kwargs: object) -> None:
        pass

    __init__ = beat = report_exit = wait_for_verdict = close = _ignore  # type: ignore[assignment]

"""The trainer's side of the watchdog: start the sidecar, send heartbeats, report the exit."""

import faulthandler
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from deco_scale.errors import RunError
from deco_scale.watchdog.artifacts import FaultArtifacts, log_to_stderr
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.heartbeat import HeartbeatPage, Phase
from deco_scale.watchdog.process import DUMP_SIGNAL, ProcessIdentity
from deco_scale.watchdog.protocol import LOCALHOST, Member, open_port

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 75.0
"""A little longer than sidecars wait for each other, so that they can report who is missing."""
_CLOSE_S = 12.0
_ASLEEP_S = 30.0  # a sidecar that shows no life for this long, and for the watchdog's timeout, is lost


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
        self._problem = ""
        self._port: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _try(self, work: Callable[[], Any]) -> Any:
        """Do it unless something failed before; a failure is recorded, to be shared with all ranks."""
        try:
            return None if self._problem else work()
        except (RunError, OSError) as error:
            self._problem = str(error)

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
        try:
            offer = share(watchdog._try(lambda: watchdog._offer(world_size)) if rank == 0 else None)
            if offer is not None:
                started, *where = offer
                artifacts = FaultArtifacts(run_dir.absolute(), str(run_dir), started)
                watchdog._try(lambda: watchdog._start_sidecar(artifacts, webhook_env, world_size, *where))
            elsewhere = share(watchdog._problem)
        except BaseException:
            watchdog._kill()
            raise
        problem = watchdog._problem or elsewhere  # rank 0 knows only who is missing, not why
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
        if self._closed or self._process is None:
            return
        self._closed = True
        self.report_exit("closed", 0)  # unless an exit was reported before
        self._page.closing = 1
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.kill()

    def _offer(self, world_size: int) -> tuple[str, str, int, str]:
        """Rank 0: open the port for other sidecars. When the job started, host, port and token to connect with."""
        host, port = os.environ.get("MASTER_ADDR") or LOCALHOST, 0
        if host in ("localhost", "::1") or host.startswith("127."):
            host = LOCALHOST
        if world_size > 1:
            self._port = open_port(host)
            port = int(self._port.getsockname()[1])
        started = time.strftime("%Y%m%d_%H%M%S_") + f"{time.time_ns() // 10**6 % 1000:03d}"
        return started, host, port, secrets.token_hex(32)

    def _start_sidecar(
        self, artifacts: FaultArtifacts, webhook_env: str | None, world_size: int, host: str, port: int, token: str
    ) -> None:
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._pipe, end = Pipe()
        inherited = [self._page.descriptor, self._dump, end.fileno()]
        if self._port is not None:
            inherited.append(self._port.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deco_scale.watchdog.sidecar", str(end.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=inherited,
            start_new_session=True,
        )
        end.close()
        trainer, sidecar = map(ProcessIdentity.of, (os.getpid(), self._process.pid))
        settings = {
            "me": Member(self._rank, socket.gethostname(), trainer, sidecar),
            "page": self._page.descriptor,
            "dump": self._dump,
            "artifacts": artifacts,
            "webhook_env": webhook_env,
        }
        descriptor = None if self._port is None else self._port.fileno()
        self._pipe.send((settings, (self._cfg, world_size, descriptor, host, port, token)))
        if self._port is not None:
            self._port.close()
        answer: Any = RunError(f"no answer within {_START_S:g} s")
        try:
            if self._pipe.poll(_START_S):
                answer = self._pipe.recv()
        except (EOFError, OSError):
            answer = RunError(f"its process exited with code {self._process.wait()}")
        if isinstance(answer, RunError):
            at = f"; rank 0's is at {host} port {port}" if self._rank else ""
            raise RunError(f"the sidecar of rank {self._rank}: {answer}{at}")

    def _watch_sidecar(self) -> None:
        """Thread: exit with the code that the sidecar sends, or once it is lost: nobody watches this rank then."""
        alive_count, alive_at = self._page.alive_count, time.monotonic()
        while True:
            try:
                if self._pipe.poll(1.0):
                    os._exit(self._pipe.recv())
            except (EOFError, OSError):
                if self._closed:
                    return
                self._exit("the sidecar is gone")
            if self._page.alive_count != alive_count or self._closed:
                alive_count, alive_at = self._page.alive_count, time.monotonic()
            elif time.monotonic() - alive_at > max(_ASLEEP_S, self._cfg.timeout_s):
                self._exit("the sidecar shows no life")

    def _exit(self, why: str) -> None:
        self._kill()
        log_to_stderr(f"rank {self._rank} exits: {why}")
        os._exit(1)


class NoWatchdog(Watchdog):
    """No watchdog: heartbeats and exits go nowhere."""

    def _ignore(self, *args: object, **kwargs: object) -> None:
        pass

    __init__ = beat = report_exit = wait_for_verdict = close = _ignore  # type: ignore[assignment]

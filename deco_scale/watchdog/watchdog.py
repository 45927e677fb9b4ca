"""The trainer's side of the watchdog: start the companion, give signs of progress, say the end."""

import faulthandler
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from deco_scale.errors import RunError
from deco_scale.watchdog.board import Board, Phase
from deco_scale.watchdog.settings import WatchdogConfig
from deco_scale.watchdog.trainer_process import DUMP_SIGNAL, Identity

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 75.0
"""A little longer than companions wait for each other, so that they can say what is missing."""
_CLOSE_S = 12.0
_ASLEEP_S = 30.0
"""A companion that has not looked for this long, and for the watchdog's time, is lost."""
_T = TypeVar("_T")
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Watchdog:
    """One rank's watchdog; :meth:`start` makes it."""

    def __init__(self, cfg: WatchdogConfig, *, rank: int) -> None:
        self._cfg, self._rank = cfg, rank
        self._board = Board.create()
        self._said_end = self._closed = False
        self._dump = os.memfd_create("stacks", os.MFD_CLOEXEC)
        # The handler runs without the interpreter's lock, in a thread that does not block the signal.
        faulthandler.register(DUMP_SIGNAL, file=self._dump, all_threads=True, chain=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [DUMP_SIGNAL])
        self._answers = b""
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._try(self._start_companion)

    def _start_companion(self) -> None:
        paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deco_scale.watchdog.companion"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(self._board.descriptor, self._dump),
            start_new_session=True,
        )

    def _try(self, work: Callable[[], _T]) -> _T | None:
        """Do it unless something has failed before; a failure is kept, for all ranks to hear of."""
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
        """Start the companions of all ranks; every rank must call it.

        ``share`` gives every rank the object of rank 0 and is called twice. With ``cfg.timeout_s`` 0 nothing is
        started. Raises :class:`RunError` on every rank if one of the companions does not start.
        """
        if cfg.timeout_s == 0:
            return NoWatchdog()
        dog = cls(cfg, rank=rank)
        try:
            settings = dog._settings(run_dir, world_size, webhook_env)
            offer = share(dog._try(lambda: dog._begin(settings)) if rank == 0 else None)
            if rank == 0:
                dog._try(lambda: dog._expect("ready"))
            elif offer is not None:
                dog._try(lambda: dog._join(settings, offer))
            elsewhere = share(dog._problem)
        except BaseException:
            dog._kill()
            raise
        problem = dog._problem or elsewhere
        if problem:
            dog._kill()
            raise RunError(f"the watchdog does not start: {problem}")
        threading.Thread(target=dog._obey, name="watchdog", daemon=True).start()
        return dog

    def beat(self, step: int, phase: Phase) -> None:
        """A sign of progress; also says what the rank turns to now. Takes a microsecond."""
        self._board.beat(step, phase)

    def ended(self, reason: str, code: int) -> None:
        """To be said right before the process exits: 0 and 75 are no fault, other codes end the other ranks."""
        self._board.end(reason, code)
        self._said_end = True

    def wait_for_verdict(self, seconds: float) -> None:
        """After :meth:`ended` with an error that may come from a peer that is lost: time to be ended with it."""
        self._board.doubt()
        time.sleep(seconds)

    def close(self) -> None:
        """Wait for the companion's end, after :meth:`ended`; nothing should follow but the exit."""
        if self._closed:
            return
        self._closed = True
        if not self._said_end:
            self.ended("closed", 0)
        self._board.ask_to_leave()
        try:
            self._companion.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._kill()

    @property
    def _companion(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def _kill(self) -> None:
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _settings(self, run_dir: Path, world_size: int, webhook_env: str | None) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "world_size": world_size,
            "timeout_s": self._cfg.timeout_s,
            "slow_timeout_s": self._cfg.slow_timeout_s,
            "run_dir": str(run_dir.absolute()),
            "shown": str(run_dir),
            "trainer": Identity.of(os.getpid()).message(),
            "board": self._board.descriptor,
            "dump": self._dump,
            "webhook_env": webhook_env,
        }

    def _begin(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Rank 0: start the companion that the others turn to; what they need to know."""
        host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
        local = host in _LOCAL or host.startswith("127.")
        offer = {
            "host": "127.0.0.1" if local else host,
            "token": secrets.token_hex(32),
            "started": time.strftime("%Y%m%d_%H%M%S_") + f"{time.time_ns() // 10**6 % 1000:03d}",
        }
        self._tell({**settings, **offer, "local": local})
        found = self._expect("port")
        return {**offer, "port": found["port"], "hub": found["member"]}

    def _join(self, settings: dict[str, Any], offer: dict[str, Any]) -> None:
        self._tell({**settings, **offer})
        try:
            self._expect("ready")
        except RunError as error:
            raise RunError(f"{error}; rank 0's is at {offer['host']} port {offer['port']}") from error

    def _tell(self, settings: dict[str, Any]) -> None:
        assert self._companion.stdin is not None
        with self._companion.stdin as pipe:
            pipe.write(json.dumps(settings).encode() + b"\n")

    def _expect(self, name: str) -> dict[str, Any]:
        """The companion's answer with this name; raises :class:`RunError` with its error, or if there is none."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            message = self._answer(0.2)
            if message is None:
                text = f"its process ended with exit code {self._companion.wait()}"
            elif "error" in message:
                text = str(message["error"])
            elif name in message:
                return message
            else:
                continue
            raise RunError(f"the companion of rank {self._rank}: {text}")
        raise RunError(f"the companion of rank {self._rank} did not answer within {_START_S:g} s")

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The companion's next message, empty if none comes in this time; None: its process has ended."""
        assert self._companion.stdout is not None
        descriptor = self._companion.stdout.fileno()
        if b"\n" not in self._answers:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(1000 * seconds):
                return {}
            piece = os.read(descriptor, 4096)
            if not piece:
                return None
            self._answers += piece
        line, newline, rest = self._answers.partition(b"\n")
        if not newline:
            return {}
        self._answers = rest
        found = json.loads(line)
        return found if isinstance(found, dict) else {}

    def _obey(self) -> None:
        """A thread: exit as the companion says, or because it is lost."""
        looks, looked = self._board.looks, time.monotonic()
        while True:
            message = self._answer(1.0)
            if message is not None and "exit" in message:
                os._exit(int(message["exit"]))
            if self._closed:
                return
            if message is None:
                self._leave("the companion is gone")
            if self._board.looks != looks:
                looks, looked = self._board.looks, time.monotonic()
            elif time.monotonic() - looked > max(_ASLEEP_S, self._cfg.timeout_s):
                self._companion.kill()
                self._leave("the companion does nothing")

    def _leave(self, why: str) -> None:
        """The job cannot be watched any more; the other companions notice as well."""
        data = f"watchdog: rank {self._rank} ends: {why}\n".encode()
        poll = select.poll()
        with suppress(OSError):
            poll.register(2, select.POLLOUT)
            if poll.poll(500):
                os.write(2, data)
        os._exit(1)


class NoWatchdog(Watchdog):
    """None at all: the same methods, which do nothing."""

    def __init__(self) -> None:
        pass

    def beat(self, step: int, phase: Phase) -> None:
        pass

    def ended(self, reason: str, code: int) -> None:
        pass

    def wait_for_verdict(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass

"""A trainer as its sidecar sees it: whether it runs, its state and stacks, and how to kill it."""

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

DUMP_SIGNAL = signal.SIGUSR2
DUMP_S = 1.5  # how long a dump may take
_MAX_DUMP = 1 << 20
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, unambiguously: its pid, its start time in ticks since boot, and the boot of its machine."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """Raises ``OSError`` if there is none."""
        return cls(pid, _stat(pid)[1], _boot())

    @property
    def running(self) -> bool:
        """Whether it runs on this machine; a zombie does not. Raises ``OSError`` where that cannot be read."""
        with suppress(FileNotFoundError, ProcessLookupError):
            state, started = _stat(self.pid)
            return started == self.started and state not in "ZX" and _boot() == self.boot
        return False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs on this machine."""
        with suppress(OSError):
            if self.running:
                os.kill(self.pid, number)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time; they follow the name, which is in parentheses and may hold anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (IndexError, ValueError) as error:
        raise ProcessLookupError(f"process {pid}") from error


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class TrainerProcess:
    """The process ``identity``, which writes its stacks to the file descriptor ``dump`` at :data:`DUMP_SIGNAL`."""

    def __init__(self, identity: ProcessIdentity, dump: int) -> None:
        self.identity, self.dump = identity, dump
        self._gone = False
        self._children: set[psutil.Process] = set()

    @property
    def gone(self) -> bool:
        """Whether it has exited; a zombie has."""
        if not self._gone:
            with suppress(OSError):  # where no file can be opened, it may still run
                self._gone = not self.identity.running
        return self._gone

    def state(self) -> str:
        """The letter of /proc, ``?`` where it cannot be read."""
        with suppress(OSError):
            return _stat(self.identity.pid)[0]
        return "?"

    def kernel_wait(self) -> str:
        """The kernel function that it sleeps in, as far as the system tells."""
        with suppress(OSError, UnicodeDecodeError):
            name = Path(f"/proc/{self.identity.pid}/wchan").read_text(encoding="ascii").strip()
            return name if name not in ("", "0") else "none"
        return "not readable"

    def track_children(self) -> None:
        """Remember its descendants: after its exit nothing shows that they were its own."""
        if not self.gone:
            with suppress(psutil.Error):
                children = psutil.Process(self.identity.pid).children(recursive=True)
                self._children.update(child for child in children if child.pid != os.getpid())
        self._children = {child for child in self._children if child.is_running()}

    def stacks(self) -> str:
        """Stacks of all its threads; raises ``TimeoutError`` saying why there are none.

        A stopped process is continued after the signal is queued: it dumps before it does anything else.
        """
        if self.gone:
            raise TimeoutError("the process is gone")
        before, state = os.fstat(self.dump).st_size, self.state()
        self.identity.send(DUMP_SIGNAL)
        if state == "T":
            self.identity.send(signal.SIGCONT)
        deadline = time.monotonic() + DUMP_S
        size, steady = before, 0
        while time.monotonic() < deadline and steady < 3 and not self.gone:
            time.sleep(0.03)
            now = os.fstat(self.dump).st_size
            steady = steady + 1 if now == size > before else 0
            size = now
        if size == before:
            state = self.state()
            raise TimeoutError(f"the process did not answer the signal within {DUMP_S:g} s, in state {state}")
        return os.pread(self.dump, min(size - before, _MAX_DUMP), before).decode(errors="replace")

    def kill(self) -> bool:
        """SIGKILL to it and its descendants; returns whether it is gone soon after."""
        self.track_children()
        self.identity.send(signal.SIGKILL)
        # The second time for those that were started meanwhile.
        for _ in range(2):
            self.kill_children()
        return self.wait(2.0)

    def kill_children(self) -> None:
        """SIGKILL to what it started and left behind."""
        self.track_children()
        for child in self._children:
            with suppress(psutil.Error):
                child.kill()

    def wait(self, seconds: float) -> bool:
        """Whether it is gone within this time."""
        deadline = time.monotonic() + seconds
        while not self.gone:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def innermost_frames(dump: str, count: int = 4) -> str:
    """The innermost frames of the main thread, the current call first, on one line.

    The main thread is the oldest, and hence the last of a dump, unless there are too many threads for one.
    """
    main = re.split(r"^(?=(?:Current thread|Thread) )", dump, flags=re.MULTILINE)[-1]
    if "\n...\n" in dump and (current := re.search(r"^Current thread .*\n(?:  .*\n)*", dump, re.MULTILINE)):
        main = current[0]
    frames = [frame for frame in map(_FRAME.match, main.splitlines()) if frame]
    return " < ".join(f"{f[3]} ({os.path.basename(f[1])}:{f[2]})" for f in frames[:count])[:1000]

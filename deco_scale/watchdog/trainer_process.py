"""A trainer as its companion sees it: whether it is there, its state, its stacks; and its end."""

import os
import re
import select
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

DUMP_SIGNAL = signal.SIGUSR2
DUMP_S = 1.5
"""How long a dump may take."""
_MAX_DUMP = 1 << 20
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


@dataclass(frozen=True, slots=True)
class Identity:
    """A process beyond doubt: its number, when it began (ticks since boot), and on which boot of which machine."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> "Identity":
        """Raises ``OSError`` if there is none."""
        return cls(pid, _stat(pid)[1], _boot())

    @classmethod
    def parse(cls, raw: Any) -> "Identity":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        return cls(int(raw["pid"]), int(raw["started"]), str(raw["boot"])[:100])

    def message(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def here(self) -> bool:
        """Whether it can be found from here, and is not a zombie."""
        try:
            state, started = _stat(self.pid)
            return started == self.started and state not in "ZX" and _boot() == self.boot
        except OSError:
            return False


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
    """The process ``identity``, which writes its stacks to the file ``dump`` at :data:`DUMP_SIGNAL`."""

    def __init__(self, identity: Identity, dump: int) -> None:
        self.identity = identity
        self._dump = dump
        self.pidfd: int | None = None
        with suppress(OSError, AttributeError):  # a kernel before 5.3, or a sandbox
            self.pidfd = os.pidfd_open(identity.pid)
        # The number may have passed to another process before it was opened.
        self._gone = not identity.here
        self._children: set[Identity] = set()

    @property
    def gone(self) -> bool:
        """Whether it has ended; a zombie has."""
        if not self._gone:
            if self.pidfd is not None:
                poll = select.poll()
                poll.register(self.pidfd, select.POLLIN)
                self._gone = bool(poll.poll(0))
            else:
                self._gone = not self.identity.here
        return self._gone

    def state(self) -> str:
        """The letter of /proc, ``?`` where it cannot be read."""
        try:
            return _stat(self.identity.pid)[0]
        except OSError:
            return "?"

    def wchan(self) -> str:
        """The kernel's function that it sleeps in, as far as the system tells."""
        try:
            found = Path(f"/proc/{self.identity.pid}/wchan").read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return "not readable"
        return found if found not in ("", "0") else "none"

    def note_children(self) -> None:
        """Remember its descendants: once it is gone, nothing tells whose they were."""
        if not self.gone:
            self._children = {child for child in self._children if child.here} | self._descendants()

    def _descendants(self) -> set[Identity]:
        found: set[Identity] = set()
        open_, seen = [self.identity.pid], {os.getpid(), self.identity.pid}
        try:
            while open_:
                for task in Path(f"/proc/{open_.pop()}/task").iterdir():
                    pids = [int(word) for word in (task / "children").read_text(encoding="ascii").split()]
                    open_ += [pid for pid in pids if pid not in seen]
                    seen.update(pids)
        except FileNotFoundError:
            if not Path("/proc/self/task", str(os.getpid()), "children").exists():
                with suppress(psutil.Error):
                    seen |= {child.pid for child in psutil.Process(self.identity.pid).children(recursive=True)}
        except (OSError, ValueError):
            pass
        for pid in seen - {os.getpid(), self.identity.pid}:
            with suppress(OSError):
                found.add(Identity.of(pid))
        return found

    def stacks(self) -> str:
        """All its threads' stacks; raises ``TimeoutError`` saying why there are none.

        A stopped process is continued, with the signal waiting: it dumps before it does anything else.
        """
        if self.gone:
            raise TimeoutError("the process is gone")
        before, state = os.fstat(self._dump).st_size, self.state()
        self._send(DUMP_SIGNAL)
        if state == "T":
            self._send(signal.SIGCONT)
        deadline = time.monotonic() + DUMP_S
        size, steady = before, 0
        while time.monotonic() < deadline and steady < 3 and not self.gone:
            time.sleep(0.03)
            now = os.fstat(self._dump).st_size
            steady = steady + 1 if now == size > before else 0
            size = now
        if size == before:
            raise TimeoutError(
                f"the process did not answer the signal within {DUMP_S:g} s, in state {self.state()}"
            )
        return os.pread(self._dump, min(size - before, _MAX_DUMP), before).decode(errors="replace")

    def end(self) -> bool:
        """SIGKILL to it and its descendants; whether it is gone soon after."""
        self.note_children()
        self._send(signal.SIGKILL)
        for _ in range(2):
            for child in self._children:
                kill(child)
            if not self.gone:
                self._children |= self._descendants()
        return self.wait(2.0)

    def end_children(self) -> None:
        """SIGKILL to what it started and left behind."""
        self.note_children()
        for child in self._children:
            kill(child)

    def wait(self, seconds: float) -> bool:
        """Whether it is gone within this time."""
        deadline = time.monotonic() + seconds
        while not self.gone:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _send(self, number: signal.Signals) -> None:
        with suppress(OSError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.identity.here:
                os.kill(self.identity.pid, number)


def kill(identity: Identity) -> None:
    """SIGKILL, if it is on this machine and still the same process."""
    if identity.here:
        with suppress(OSError):
            os.kill(identity.pid, signal.SIGKILL)


def innermost(dump: str, count: int = 4) -> str:
    """The innermost frames of the main thread, the call first, on one line.

    It is the oldest, and hence the last of a dump, unless there are too many threads for one.
    """
    parts = re.split(r"^(?=(?:Current thread|Thread) )", dump, flags=re.MULTILINE)
    threads = [part for part in parts if part.startswith(("Current thread", "Thread"))]
    chosen = threads[-1] if threads else ""
    if "\n...\n" in dump:
        chosen = next((part for part in threads if part.startswith("Current thread")), chosen)
    frames = [found for found in map(_FRAME.match, chosen.splitlines()) if found]
    return " < ".join(f"{f[3]} ({os.path.basename(f[1])}:{f[2]})" for f in frames[:count])[:1000]

"""What companions leave behind: stack files, events, lines of the log. No disk can hold them up for long."""

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deco_scale.watchdog.orders import Order
from deco_scale.watching import alerts
from deco_scale.watching.events import Event, append_event
from deco_scale.watching.redact import scrub

LOG = "log.txt"
WRITE_S = 2.0
ALERT_S = 4.0


def within(seconds: float, work: Callable[[], None]) -> str | None:
    """Do it in this time, else leave it to itself; what went wrong, in words."""
    failed: list[str] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except Exception as error:  # the end of the job must not depend on it
            failed.append(f"{type(error).__name__}: {error}")
        done.set()

    threading.Thread(target=run, daemon=True).start()
    if not done.wait(seconds):
        return f"not done within {seconds:g} s"
    return failed[0] if failed else None


@dataclass(frozen=True, slots=True)
class Record:
    """Where the job's stacks and events go: ``shown`` is ``run_dir`` as the user wrote it."""

    run_dir: Path
    shown: str
    started: str

    @property
    def _stacks(self) -> Path:
        return self.run_dir / "stacks" / self.started

    def stack_file(self, rank: int, host: str, text: str) -> None:
        """One rank's stacks."""

        def write() -> None:
            self._stacks.mkdir(parents=True, exist_ok=True)
            name = f"rank_{rank:05d}_{re.sub(r'[^A-Za-z0-9.-]', '-', host)[:64]}.txt"
            (self._stacks / name).write_text(scrub(text), encoding="utf-8", errors="replace")

        problem = within(WRITE_S, write)
        if problem is not None:
            say(f"the stacks of rank {rank} could not be written: {problem}\n{text}")

    def claim(self, rank: int) -> bool:
        """Whether this companion is the one that tells; without a disk to agree on, each is."""
        first = [True]

        def write() -> None:
            self._stacks.mkdir(parents=True, exist_ok=True)
            try:
                with (self._stacks / "told_by").open("x", encoding="ascii") as file:
                    file.write(f"rank {rank}\n")
            except FileExistsError:
                first[0] = False

        within(WRITE_S, write)
        return first[0]

    def tell(self, order: Order, stack: str | None, *, end: bool) -> str:
        """The event, the line in the log and on stderr; gives the line.

        An error is an event only where rank 0 did not come to write its own ``end``.
        """
        line = f"watchdog: {scrub(order.text)}"
        if order.kind != "error":
            line += f"; stacks of all ranks: {self.shown}/stacks/{self.started}"
        events = []
        if order.kind == "error":
            if end:
                events = [Event(time.time(), "end", {"reason": line, "exit_code": order.code})]
        else:
            step = order.report.step if order.report is not None else 0
            fields = {"rank": order.rank, "host": order.host, "how": scrub(order.text), "step": max(step, 0)}
            if order.kind == "hang":
                fields["stack"] = scrub(stack or "none; see the stacks' files")
            events = [Event(time.time(), "hang" if order.kind == "hang" else "lost_rank", fields)]

        def write() -> None:
            for event in events:
                append_event(self.run_dir, event)
            with (self.run_dir / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

        problem = within(WRITE_S, write)
        say(line.removeprefix("watchdog: "))
        if problem is not None:
            say(f"this could not be written to {self.shown}: {problem}")
        return line


def say(text: str) -> None:
    """A line on stderr, if there is one that takes it."""
    data = f"watchdog: {scrub(text)}\n".encode(errors="replace")

    def write() -> None:
        os.write(2, data)

    within(0.5, write)


def alert(webhook_env: str | None, text: str) -> threading.Thread | None:
    """Post it to the webhook that the variable names, in a thread, which takes :data:`ALERT_S` at most."""
    if webhook_env is None:
        return None

    def send() -> None:
        problem = alerts.send(webhook_env, text, timeout_s=ALERT_S)
        if problem is not None:
            say(f"no alert was sent: {problem}")

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread

"""What a sidecar leaves behind after a fault: stack files, the event, log lines. No disk can block it for long."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deco_scale.observability.deadline import problem_within
from deco_scale.observability.events import Event, append_event
from deco_scale.observability.redact import scrub
from deco_scale.watchdog.protocol import TerminateOrder

LOG = "log.txt"
WRITE_S = 2.0


@dataclass(frozen=True, slots=True)
class FaultArtifacts:
    """Where the job's stacks and events go: ``shown`` is ``run_dir`` as the user wrote it."""

    run_dir: Path
    shown: str
    started: str

    def _write_stack_file(self, name: str, text: str, mode: str = "w") -> None:
        folder = self.run_dir / "stacks" / self.started
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open(mode, encoding="utf-8", errors="replace") as file:
            file.write(text)

    def write_stacks(self, rank: int, host: str, text: str) -> None:
        """Write one rank's stacks, to stderr where the folder cannot be written."""
        name = f"rank_{rank:05d}_{re.sub(r'[^A-Za-z0-9.-]', '-', host)[:64]}.txt"
        problem = problem_within(WRITE_S, lambda: self._write_stack_file(name, scrub(text)))
        if problem is not None:
            log_to_stderr(f"the stacks of rank {rank} could not be written: {problem}\n{text}")

    def claim_event(self, rank: int) -> bool:
        """Whether this sidecar is the first to claim the event; without a shared disk, each one is."""
        problem = problem_within(WRITE_S, lambda: self._write_stack_file("told_by", f"rank {rank}\n", "x"))
        return problem is None or not problem.startswith(FileExistsError.__name__)

    def write_event(self, order: TerminateOrder, stack: str | None, *, end: bool) -> str:
        """Write the event and a line to the log and stderr; returns the line.

        An error is written as the event ``end`` only if ``end`` says so: usually rank 0 writes its own.
        """
        text = scrub(order.text)
        if order.fault.kind == "error":
            fields: dict[str, Any] = {"reason": f"watchdog: {text}", "exit_code": order.fault.code}
            event = Event(time.time(), "end", fields) if end else None
        else:
            step = max(order.report.step, 0) if order.report is not None else 0
            fields = {"rank": order.fault.rank, "host": order.member.host, "how": text, "step": step}
            if order.fault.kind == "hang":
                fields["stack"] = scrub(stack or "none; see the stack files")
                if order.report is not None:
                    fields["silent_s"] = round(max(order.report.silent_s, order.report.stopped_s), 1)
            event = Event(time.time(), "hang" if order.fault.kind == "hang" else "lost_rank", fields)
            text += f"; stacks of all ranks: {self.shown}/stacks/{self.started}"

        def write() -> None:
            if event is not None:
                append_event(self.run_dir, event)
            with (self.run_dir / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} watchdog: {text}\n")

        problem = problem_within(WRITE_S, write)
        log_to_stderr(text)
        if problem is not None:
            log_to_stderr(f"this could not be written to {self.shown}: {problem}")
        return f"watchdog: {text}"


def log_to_stderr(text: str) -> None:
    """Write a line to stderr; given up after half a second if nobody reads it."""
    data = f"watchdog: {scrub(text)}\n".encode(errors="replace")
    problem_within(0.5, lambda: os.write(2, data))

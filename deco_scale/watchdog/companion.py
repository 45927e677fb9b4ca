"""The process beside a trainer: ``python -m deco_scale.watchdog.companion``, its settings on stdin.

It shares no thread, no lock and no session with the trainer, so that nothing that befalls the trainer befalls it.
Signals that launchers send to whole groups do not end it; the end of its trainer does, at most
:data:`LAST_S` later.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deco_scale.watchdog.board import Board
from deco_scale.watchdog.decision import NO_FAULT, STOPPED, Report
from deco_scale.watchdog.hub import Hub
from deco_scale.watchdog.link import Link
from deco_scale.watchdog.orders import Member, Order
from deco_scale.watchdog.record import ALERT_S, Record, alert, say
from deco_scale.watchdog.settings import WatchdogConfig
from deco_scale.watchdog.trainer_process import Identity, TrainerProcess, innermost, kill

TICK_S = 0.2
LAST_S = 8.0
"""How long it stays after the trainer's end, whatever happens."""
START_S = 60.0
"""How long all companions together may take to find each other."""
_CHILDREN_S = 2.0
_REASON = 2000
_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGPIPE")


@dataclass(slots=True)
class Clock:
    """Seconds, of which a pause of the machine or of this process counts no more than two."""

    last: float
    count: float = 0.0

    def now(self) -> float:
        then, self.last = self.last, time.monotonic()
        self.count += min(self.last - then, 2.0)
        return self.count


class Companion:
    """Watches ``trainer`` and carries out what it is ordered."""

    def __init__(
        self, me: Member, board: Board, trainer: TrainerProcess, record: Record, webhook_env: str | None
    ) -> None:
        self._me, self._board, self._trainer, self._record = me, board, trainer, record
        self._webhook_env = webhook_env
        self._clock = Clock(time.monotonic())
        self._beat, self._beat_at = board.last_beat(), 0.0
        self._ended_at: float | None = None
        self._stopped_at: float | None = None
        self._over_at: float | None = None
        self._children_at = 0.0

    def now(self) -> float:
        return self._clock.now()

    def watch(self, link: Hub | Link) -> None:
        """Until the trainer is gone or asks to leave, or the job is ended."""
        if not self._trainer.gone:
            link.watch(self._trainer.pidfd)
        now = self.now()
        while True:
            link.wait(TICK_S, now)
            now = self.now()
            self._board.look()
            report = self._observe(now)
            order = link.tick(now, report)
            if order is not None:
                self._carry_out(order, link, report)
                return
            if self._may_leave(link, report):
                if report.code not in NO_FAULT:
                    self._trainer.end_children()
                link.close(now)
                return

    def _observe(self, now: float) -> Report:
        gone = self._trainer.gone
        # What the trainer said last is read after its end.
        beat, ended = self._board.last_beat(), self._board.ended()
        if beat != self._beat:
            self._beat, self._beat_at = beat, now
        if ended is not None and self._ended_at is None:
            self._ended_at = self._beat_at = now
        state = "X" if gone else self._trainer.state()
        self._stopped_at = None if state not in STOPPED else now if self._stopped_at is None else self._stopped_at
        if now - self._children_at > _CHILDREN_S:
            self._children_at = now
            self._trainer.note_children()
        return Report(
            rank=self._me.rank,
            phase=beat.phase if ended is None else "end",
            step=beat.step,
            silent_s=now - self._beat_at,
            state=state,
            stopped_s=0.0 if self._stopped_at is None else now - self._stopped_at,
            gone=gone,
            code=None if ended is None else ended.code,
            reason="" if ended is None else ended.reason[:_REASON],
            unsure=ended is not None and ended.unsure,
        )

    def _may_leave(self, link: Hub | Link, report: Report) -> bool:
        said = report.code is not None
        if not (report.gone or (said and self._board.leaving)):
            return False
        if self._over_at is None:
            self._over_at = time.monotonic()
            link.watch(None)
        since_s = time.monotonic() - self._over_at
        return since_s > LAST_S or (said and link.may_leave(since_s))

    def _carry_out(self, order: Order, link: Hub | Link, report: Report) -> None:
        tells = order.tell and self._record.claim(self._me.rank)
        line = ""
        if order.kind == "error":
            if tells:
                # Where rank 0 has said its end, its own event stands.
                line = self._record.tell(order, None, end=self._me.rank == 0 and report.code is None)
            answer({"exit": order.code})
            self._trainer.wait(1.5)
        else:
            stack = self._dump(order, report)
            link.say_stack(stack)
            if tells:
                if order.rank != self._me.rank:
                    stack = link.stack_of(order.rank, 2.5, self.now()) or ""
                line = self._record.tell(order, stack, end=False)
        if not self._trainer.end():
            state = self._trainer.state()
            say(f"rank {self._me.rank}: process {self._me.trainer.pid} does not end (state {state})")
        for orphan in order.orphans:
            kill(orphan)
        sending = alert(self._webhook_env, line) if line else None
        link.close(self.now(), linger_s=4.0)
        if sending is not None:
            sending.join(ALERT_S)

    def _dump(self, order: Order, report: Report) -> str:
        """Write the trainer's stacks; gives the innermost frames."""
        facts = {
            "rank": self._me.rank,
            "host": self._me.host,
            "pid": self._me.trainer.pid,
            "state": report.state,
            "phase": report.phase,
            "step": report.step,
            "seconds since the last beat": f"{report.silent_s:.1f}",
            "waits in the kernel's": self._trainer.wchan(),
            "the job ends because": order.text,
        }
        try:
            stacks = self._trainer.stacks()
        except TimeoutError as error:
            stacks = f"no stacks: {error}\n"
        head = "".join(f"{name}: {value}\n" for name, value in facts.items())
        self._record.stack_file(self._me.rank, self._me.host, f"{head}\n{stacks}")
        return innermost(stacks) or stacks.strip()


def answer(message: dict[str, Any]) -> None:
    """A line to the trainer, which may be gone."""
    with suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def main() -> int:
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    raw = json.loads(sys.stdin.readline())
    sys.stdin.close()
    cfg = WatchdogConfig(timeout_s=raw["timeout_s"], slow_timeout_s=raw["slow_timeout_s"])
    identity = Identity.parse(raw["trainer"])
    me = Member(raw["rank"], socket.gethostname(), identity, Identity.of(os.getpid()))
    record = Record(Path(raw["run_dir"]), raw["shown"], raw["started"])
    trainer = TrainerProcess(identity, raw["dump"])
    companion = Companion(me, Board(raw["board"]), trainer, record, raw["webhook_env"])
    try:
        if me.rank == 0:
            link: Hub | Link = _gather(raw, cfg, me, companion, trainer)
        else:
            link = Link(cfg, me, Member.parse(raw["hub"]), now=companion.now())
            link.connect(raw["host"], raw["port"], raw["token"], START_S)
            answer({"ready": True})
    except OSError as error:
        answer({"error": str(error)})
        return 1
    companion.watch(link)
    return 0


def _gather(
    raw: dict[str, Any], cfg: WatchdogConfig, me: Member, companion: Companion, trainer: TrainerProcess
) -> Hub:
    """Wait for the companions of all ranks; raises ``OSError`` naming those that did not come."""
    world_size, local = raw["world_size"], raw["local"]
    hub = Hub(cfg, me, world_size=world_size, token=raw["token"], local=local, now=companion.now())
    answer({"port": hub.port, "member": me.message()})
    deadline = time.monotonic() + START_S
    while hub.missing:
        hub.wait(TICK_S, companion.now())
        missing = ", ".join(str(rank) for rank in hub.missing[:20])
        if time.monotonic() > deadline:
            raise TimeoutError(f"no word within {START_S:g} s of the companions of ranks {missing}")
        if trainer.gone:
            raise ConnectionError("the trainer is gone")
    answer({"ready": True})
    return hub


if __name__ == "__main__":
    try:
        code = main()
    except BaseException as error:
        say(f"companion failed: {type(error).__name__}: {error}")
        code = 1
    # A thread may still wait for a disk.
    os._exit(code)

"""The process beside a trainer: ``python -m deco_scale.watchdog.sidecar``, with its settings in a pipe.

It shares no thread, lock or session with the trainer, so that it survives whatever happens to the trainer. It
ignores the signals that launchers send to process groups, and exits at most :data:`LAST_S` after its trainer.
"""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from deco_scale.errors import RunError
from deco_scale.observability.webhooks import send_alert
from deco_scale.watchdog.artifacts import FaultArtifacts, log_to_stderr
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.coordinator import Coordinator
from deco_scale.watchdog.diagnosis import NO_FAULT, RankReport
from deco_scale.watchdog.heartbeat import HeartbeatPage
from deco_scale.watchdog.peer import Peer
from deco_scale.watchdog.process import TrainerProcess, innermost_frames
from deco_scale.watchdog.protocol import Member, TerminateOrder

TICK_S = 0.1
LAST_S = 8.0  # how long it may outlive the trainer, whatever happens
START_S = 60.0  # how long all sidecars together may take to connect
LINGER_S = 4.0  # how long it waits for the others and for the alert after it has killed its trainer
_CHILDREN_S = 2.0
_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGPIPE")


class Sidecar:
    """Watches the trainer of ``me`` and carries out the order to terminate it.

    ``pipe`` leads to the trainer; ``page`` and ``dump`` are descriptors of its heartbeat page and its stacks.
    """

    def __init__(
        self, pipe: Any, *, me: Member, page: int, dump: int, artifacts: FaultArtifacts, webhook_env: str | None
    ) -> None:
        self._pipe, self._me, self._artifacts, self._webhook_env = pipe, me, artifacts, webhook_env
        self._page, self._trainer = HeartbeatPage.map(page), TrainerProcess(me.trainer, dump)
        self._clock, self._seconds = time.monotonic(), 0.0
        self._progress, self._progress_at = (self._page.count, self._page.exited), 0.0
        self._running_at = 0.0
        self._finished_at: float | None = None
        self._children_at = 0.0

    async def run(
        self, cfg: WatchdogConfig, world_size: int, descriptor: int | None, host: str, port: int, token: str
    ) -> int:
        """Join the other sidecars, then watch; returns the exit code. ``descriptor`` is rank 0's, of its port."""
        link: Coordinator | Peer
        if self._me.rank == 0:
            link = Coordinator(cfg, self._me, world_size=world_size, token=token, clock=self.now)
            joining = asyncio.create_task(link.listen(descriptor, START_S))
        else:
            link = Peer(cfg, self._me, clock=self.now)
            joining = asyncio.create_task(link.connect(host, port, token, START_S))
        try:
            while not joining.done():
                await asyncio.wait([joining], timeout=TICK_S)
                if self._trainer.gone:
                    raise ConnectionError("the trainer is gone")
            joining.result()
        except OSError as error:
            self._answer(RunError(str(error)))
            return 1
        self._answer("ready")
        await self._watch(link)
        return 0

    def _answer(self, answer: object) -> None:
        """Tell the trainer, which may be gone."""
        with suppress(OSError):
            self._pipe.send(answer)

    def now(self) -> float:
        """Seconds, counting a pause of the machine or of this process as two at most."""
        before, self._clock = self._clock, time.monotonic()
        self._seconds += min(self._clock - before, 2.0)
        return self._seconds

    async def _watch(self, link: Coordinator | Peer) -> None:
        """Until the trainer is gone or asks the sidecar to exit, or the job is terminated."""
        while True:
            await asyncio.sleep(TICK_S)
            self._page.alive_count += 1
            report = self._observe(self.now())
            order = link.tick(report)
            if order is not None:
                await self._terminate(order, link, report)
                return
            if self._may_exit(link, report):
                if report.code not in NO_FAULT:
                    self._trainer.kill_children()
                await link.close()
                return

    def _observe(self, now: float) -> RankReport:
        gone = self._trainer.gone  # before the page, so that what the trainer wrote last is read after its exit
        progress = (self._page.count, self._page.exited)
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        if now - self._children_at > _CHILDREN_S:
            self._children_at = now
            self._trainer.track_children()
        report = RankReport(
            rank=self._me.rank,
            silent_s=now - self._progress_at,
            state="X" if gone else self._trainer.state(),
            gone=gone,
            **self._page.state(),
        )
        if not report.stopped:
            self._running_at = now
        return replace(report, stopped_s=now - self._running_at)

    def _may_exit(self, link: Coordinator | Peer, report: RankReport) -> bool:
        exit_reported = report.code is not None
        if not (report.gone or (exit_reported and self._page.closing)):
            return False
        if self._finished_at is None:
            self._finished_at = time.monotonic()
        since_s = time.monotonic() - self._finished_at
        done = not isinstance(link, Coordinator) or link.may_exit(since_s)
        return since_s > LAST_S or (exit_reported and done)

    async def _terminate(self, order: TerminateOrder, link: Coordinator | Peer, report: RankReport) -> None:
        writes_event = order.report is not None and self._artifacts.claim_event(self._me.rank)
        line = ""
        stack: str | None = None
        if order.fault.kind != "error":
            stack = self._dump(order, report)
            link.send_stack(stack)
            if writes_event and isinstance(link, Coordinator) and order.fault.rank != self._me.rank:
                stack = await link.stack_of(order.fault.rank, 2.5)
        if writes_event:
            # Of an error, rank 0 writes the event itself where it reported its exit.
            line = self._artifacts.write_event(order, stack, end=self._me.rank == 0 and report.code is None)
        if order.fault.kind == "error":
            self._answer(order.fault.code)
            self._trainer.wait(1.5)
        if not self._trainer.kill():
            pid, state = self._me.trainer.pid, self._trainer.state()
            log_to_stderr(f"rank {self._me.rank}: process {pid} survives SIGKILL (state {state})")
        for orphan in order.orphans:
            orphan.trainer.send(signal.SIGKILL)
            orphan.sidecar.send(signal.SIGKILL)
        alert = asyncio.to_thread(send_alert, self._webhook_env if line else None, line, timeout_s=LINGER_S)
        _, problem = await asyncio.gather(link.close(linger_s=LINGER_S), alert)
        if problem is not None:
            log_to_stderr(f"no alert was sent: {problem}")

    def _dump(self, order: TerminateOrder, report: RankReport) -> str:
        """Write the trainer's stacks; returns the innermost frames."""
        facts = {
            "rank": self._me.rank,
            "host": self._me.host,
            "pid": self._me.trainer.pid,
            "state": report.state,
            "phase": report.phase,
            "step": report.step,
            "seconds since the last heartbeat": f"{report.silent_s:.1f}",
            "kernel function": self._trainer.kernel_wait(),
            "the job is terminated because": order.text,
        }
        head = "".join(f"{name}: {value}\n" for name, value in facts.items())
        try:
            stacks = self._trainer.stacks()
        except TimeoutError as error:
            stacks = f"no stacks: {error}\n"
        self._artifacts.write_stacks(self._me.rank, self._me.host, f"{head}\n{stacks}")
        return innermost_frames(stacks) or stacks.strip()


def main() -> int:
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    pipe: Any = Connection(int(sys.argv[1]))
    settings, job = pipe.recv()
    return asyncio.run(Sidecar(pipe, **settings).run(*job))


if __name__ == "__main__":
    try:
        code = main()
    except BaseException as error:
        log_to_stderr(f"sidecar failed: {type(error).__name__}: {error}")
        code = 1
    # A thread may still wait for a disk.
    os._exit(code)

"""The process beside a trainer: ``python -m deco_scale.watchdog.sidecar``, with its settings on stdin.

It shares no thread, lock or session with the trainer, so that it survives whatever happens to the trainer. It
ignores the signals that launchers send to process groups, and exits at most :data:`LAST_S` after its trainer.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deco_scale.watchdog.artifacts import ALERT_S, FaultArtifacts, log_to_stderr, start_alert
from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.coordinator import Coordinator
from deco_scale.watchdog.diagnosis import MAX_REASON, NO_FAULT, RankReport
from deco_scale.watchdog.heartbeat import PHASES, HeartbeatPage
from deco_scale.watchdog.peer import Peer
from deco_scale.watchdog.process import ProcessIdentity, TrainerProcess, innermost_frames
from deco_scale.watchdog.protocol import Member, TerminateOrder, parse

TICK_S = 0.2
LAST_S = 8.0
"""How long it may outlive the trainer, whatever happens."""
START_S = 60.0
"""How long all sidecars together may take to connect."""
_CHILDREN_S = 2.0
_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGPIPE")


class Sidecar:
    """Watches ``trainer`` and carries out the order to terminate it."""

    def __init__(
        self,
        me: Member,
        page: HeartbeatPage,
        trainer: TrainerProcess,
        artifacts: FaultArtifacts,
        webhook_env: str | None,
    ) -> None:
        self._me, self._page, self._trainer, self._artifacts = me, page, trainer, artifacts
        self._webhook_env = webhook_env
        self._clock, self._seconds = time.monotonic(), 0.0
        self._progress, self._progress_at = (page.count, page.exited), 0.0
        self._stopped_at: float | None = None
        self._finished_at: float | None = None
        self._children_at = 0.0

    def now(self) -> float:
        """Seconds, counting a pause of the machine or of this process as two at most."""
        before, self._clock = self._clock, time.monotonic()
        self._seconds += min(self._clock - before, 2.0)
        return self._seconds

    def watch(self, link: Coordinator | Peer) -> None:
        """Until the trainer is gone or asks the sidecar to exit, or the job is terminated."""
        if not self._trainer.gone and self._trainer.pidfd is not None:
            link.selector.register(self._trainer.pidfd, selectors.EVENT_READ)
        now = self.now()
        while True:
            link.wait(TICK_S, now)
            now = self.now()
            self._page.alive_count += 1
            report = self._observe(now)
            order = link.tick(now, report)
            if order is not None:
                self._terminate(order, link, report)
                return
            if self._may_exit(link, report):
                if report.code not in NO_FAULT:
                    self._trainer.kill_children()
                link.close(now)
                return

    def _observe(self, now: float) -> RankReport:
        # Before the page, so that what the trainer wrote last is read after its exit.
        gone, page = self._trainer.gone, self._page
        progress, exit_report = (page.count, page.exited), page.exit_report()
        if progress != self._progress:
            self._progress, self._progress_at = progress, now
        if now - self._children_at > _CHILDREN_S:
            self._children_at = now
            self._trainer.track_children()
        report = RankReport(
            rank=self._me.rank,
            phase=PHASES[page.phase],
            step=page.step,
            silent_s=now - self._progress_at,
            state="X" if gone else self._trainer.state(),
            gone=gone,
        )
        if exit_report is not None:
            exit_fields = {**asdict(exit_report), "reason": exit_report.reason[:MAX_REASON]}
            report = replace(report, phase="end", **exit_fields)
        if not report.stopped:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
        return replace(report, stopped_s=0.0 if self._stopped_at is None else now - self._stopped_at)

    def _may_exit(self, link: Coordinator | Peer, report: RankReport) -> bool:
        exit_reported = report.code is not None
        if not (report.gone or (exit_reported and self._page.closing)):
            return False
        if self._finished_at is None:
            self._finished_at = time.monotonic()
            self._stop_waking(link)
        since_s = time.monotonic() - self._finished_at
        return since_s > LAST_S or (exit_reported and link.may_exit(since_s))

    def _stop_waking(self, link: Coordinator | Peer) -> None:
        """The exit of the trainer ends no wait any more; otherwise every later one would end at once."""
        pidfd = self._trainer.pidfd
        if pidfd is not None and pidfd in link.selector.get_map():
            link.selector.unregister(pidfd)

    def _terminate(self, order: TerminateOrder, link: Coordinator | Peer, report: RankReport) -> None:
        writes_event = order.report is not None and self._artifacts.claim_event(self._me.rank)
        line = ""
        stack: str | None = None
        if order.fault.kind != "error":
            stack = self._dump(order, report)
            link.send_stack(stack)
            if writes_event and order.fault.rank != self._me.rank:
                stack = link.stack_of(order.fault.rank, 2.5, self.now())
        if writes_event:
            # Of an error, rank 0 writes the event itself where it reported its exit.
            line = self._artifacts.write_event(order, stack, end=self._me.rank == 0 and report.code is None)
        if order.fault.kind == "error":
            answer({"exit": order.fault.code})
            self._trainer.wait(1.5)
        self._stop_waking(link)
        if not self._trainer.kill():
            pid, state = self._me.trainer.pid, self._trainer.state()
            log_to_stderr(f"rank {self._me.rank}: process {pid} survives SIGKILL (state {state})")
        for orphan in order.orphans:
            orphan.trainer.kill()
            orphan.sidecar.kill()
        alert = start_alert(self._webhook_env, line) if line and self._webhook_env is not None else None
        link.close(self.now(), linger_s=4.0)
        if alert is not None:
            wait([alert], ALERT_S)

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


def answer(message: dict[str, Any]) -> None:
    """Write a line to the trainer, which may be gone."""
    with suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def main() -> int:
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    raw = json.loads(sys.stdin.readline())
    sys.stdin.close()
    cfg = WatchdogConfig(timeout_s=raw["timeout_s"], slow_timeout_s=raw["slow_timeout_s"])
    identity: ProcessIdentity = parse(ProcessIdentity, raw["trainer"])
    me = Member(raw["rank"], socket.gethostname(), identity, ProcessIdentity.of(os.getpid()))
    artifacts = FaultArtifacts(Path(raw["run_dir"]), raw["shown"], raw["started"])
    trainer = TrainerProcess(identity, raw["dump"])
    sidecar = Sidecar(me, HeartbeatPage.map(raw["page"]), trainer, artifacts, raw["webhook_env"])
    try:
        if me.rank == 0:
            link: Coordinator | Peer = _gather_peers(raw, cfg, me, sidecar, trainer)
        else:
            link = Peer(cfg, me, parse(Member, raw["coordinator"]), now=sidecar.now())
            link.connect(raw["host"], raw["port"], raw["token"], START_S)
        answer({"ready": True})
    except OSError as error:
        answer({"error": str(error)})
        return 1
    sidecar.watch(link)
    return 0


def _gather_peers(
    raw: dict[str, Any], cfg: WatchdogConfig, me: Member, sidecar: Sidecar, trainer: TrainerProcess
) -> Coordinator:
    """Wait for the sidecars of all ranks; raises ``OSError`` naming those that are missing."""
    coordinator = Coordinator(
        cfg, me, world_size=raw["world_size"], token=raw["token"], local=raw["local"], now=sidecar.now()
    )
    answer({"port": coordinator.port, "member": asdict(me)})
    deadline = time.monotonic() + START_S
    while coordinator.missing:
        coordinator.wait(TICK_S, sidecar.now())
        if time.monotonic() > deadline and coordinator.missing:
            missing = ", ".join(map(str, coordinator.missing[:20]))
            raise TimeoutError(f"the sidecars of ranks {missing} did not connect within {START_S:g} s")
        if trainer.gone:
            raise ConnectionError("the trainer is gone")
    return coordinator


if __name__ == "__main__":
    try:
        code = main()
    except BaseException as error:
        log_to_stderr(f"sidecar failed: {type(error).__name__}: {error}")
        code = 1
    # A thread may still wait for a disk.
    os._exit(code)

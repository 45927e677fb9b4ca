"""Rank 0's sidecar among the others: it receives all reports, decides, and sends the order to terminate.

The port accepts connections from anyone, but ignores all that do not begin with the job's token.
"""

import hmac
import resource
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.diagnosis import CONNECTION_LOST, Diagnosis, RankReport
from deco_scale.watchdog.protocol import (
    MALFORMED,
    MAX_LINE,
    MAX_STACK,
    Member,
    MessageSocket,
    TerminateOrder,
    parse,
)

_HELLO_S = 5.0
_HELLO_BYTES = 2048
_MAX_STRANGERS = 64
_MAX_ORPHANS = 32
_ALIVE_S = 0.5
LINGER_S = 5.0
"""How long the coordinator waits for the others after its own trainer exited without a fault."""


@dataclass(slots=True)
class _Connection:
    messages: MessageSocket
    accepted_at: float
    member: Member | None = None


class Coordinator:
    """Listens on :attr:`port` for the sidecars of ranks 1 to ``world_size`` - 1; for one rank there is no port.

    ``local``: all ranks are on this machine, and only the loopback interface is listened on.
    """

    def __init__(
        self, cfg: WatchdogConfig, me: Member, *, world_size: int, token: str, local: bool, now: float
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self._me, self._world_size, self._token = me, world_size, token
        self._diagnosis = Diagnosis(range(world_size), cfg, now=now)
        self._connections: dict[socket.socket, _Connection] = {}
        self._members = {me.rank: me}
        self._stacks: dict[int, str] = {}
        self._ordered = False
        self._alive_at = 0.0
        self._server: socket.socket | None = None
        self.port = 0
        if world_size > 1:
            # One connection per rank; the usual soft limit is 1024.
            with suppress(OSError, ValueError):
                hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
            self._server = _listen(local)
            self._server.setblocking(False)
            self.port = int(self._server.getsockname()[1])
            self.selector.register(self._server, selectors.EVENT_READ)

    @property
    def missing(self) -> list[int]:
        """Ranks whose sidecar has not connected yet."""
        return sorted(set(range(self._world_size)) - self._members.keys())

    @property
    def _connected(self) -> set[int]:
        return {each.member.rank for each in self._connections.values() if each.member is not None}

    def wait(self, seconds: float, now: float) -> None:
        """Handle what arrives within this time, at least once; ``now`` is the clock of the diagnosis."""
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self._server:
                self._accept()
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._connections:
                self._receive(self._connections[key.fileobj], now)
        clock = time.monotonic()
        if clock - self._alive_at > _ALIVE_S:
            self._alive_at = clock
            self._send_all({"alive": True})
        for each in list(self._connections.values()):
            each.messages.flush()
            if each.messages.closed or (each.member is None and clock - each.accepted_at > _HELLO_S):
                self._drop(each)

    def tick(self, now: float, report: RankReport) -> TerminateOrder | None:
        """Take in rank 0's own report; returns the order to terminate, once, after sending it to all."""
        self._diagnosis.update(now, report)
        if self._ordered or self.missing:
            return None
        fault = self._diagnosis.check(now)
        if fault is None:
            return None
        watched = self._connected | {self._me.rank}
        orphans = [
            member
            for rank, member in sorted(self._members.items())
            if rank not in watched or (fault.kind == "lost" and rank == fault.rank != self._me.rank)
        ]
        member, last_report = self._members[fault.rank], self._diagnosis.last_report(fault.rank)
        order = TerminateOrder(fault, member, tuple(orphans[:_MAX_ORPHANS]), last_report)
        self._ordered = True
        self._send_all({"order": order.message})
        return order

    def may_exit(self, since_s: float) -> bool:
        """Whether this sidecar may exit, ``since_s`` after its trainer exited without a fault."""
        self._diagnosis.mark_left(self._me.rank)
        return self._diagnosis.finished or (since_s > LINGER_S and not self._diagnosis.suspicious)

    def send_stack(self, text: str) -> None:
        """The innermost frames of rank 0, kept here."""
        self._stacks[self._me.rank] = text

    def stack_of(self, rank: int, seconds: float, now: float) -> str | None:
        """The innermost frames of a rank, waited for as long as it is connected."""
        deadline = time.monotonic() + seconds
        while rank not in self._stacks and rank in self._connected and time.monotonic() < deadline:
            self.wait(0.05, now)
        return self._stacks.get(rank)

    def close(self, now: float, *, linger_s: float = 0.0) -> None:
        """Let the others exit first for up to ``linger_s``, say goodbye, and free the port."""
        deadline = time.monotonic() + linger_s
        while self._connected and time.monotonic() < deadline:
            self.wait(0.05, now)
        self._send_all({"over": True})
        for each in list(self._connections.values()):
            self._drop(each)
        if self._server is not None:
            self.selector.unregister(self._server)
            self._server.close()
            self._server = None

    def _accept(self) -> None:
        assert self._server is not None
        strangers = [each for each in self._connections.values() if each.member is None]
        if len(strangers) > _MAX_STRANGERS + len(self.missing):
            self._drop(min(strangers, key=lambda each: each.accepted_at))
        with suppress(OSError):
            sock, _ = self._server.accept()
            self._connections[sock] = _Connection(MessageSocket(sock, limit=_HELLO_BYTES), time.monotonic())
            self.selector.register(sock, selectors.EVENT_READ)

    def _receive(self, connection: _Connection, now: float) -> None:
        for message in connection.messages.receive():
            try:
                if connection.member is None:
                    self._admit(connection, message, now)
                else:
                    self._handle(connection.member.rank, message, now)
            except MALFORMED:
                connection.messages.closed = True
            if connection.messages.closed and connection.member is None:
                return

    def _admit(self, connection: _Connection, message: dict[str, Any], now: float) -> None:
        """The first message: the token, and a rank that has not connected yet."""
        if not hmac.compare_digest(str(message.get("token")).encode(), self._token.encode()):
            raise ValueError("wrong token")
        member = parse(Member, message["member"])
        if member.rank not in self.missing:
            raise ValueError(f"rank {member.rank} is connected already, or not part of this job")
        connection.member = self._members[member.rank] = member
        connection.messages.limit = MAX_LINE
        self._diagnosis.update(now, RankReport(rank=member.rank))
        connection.messages.send({"welcome": True})

    def _handle(self, rank: int, message: dict[str, Any], now: float) -> None:
        if "report" in message:
            self._diagnosis.update(now, parse(RankReport, {**message["report"], "rank": rank}))
        if "stack" in message:
            self._stacks[rank] = str(message["stack"])[:MAX_STACK]
        if "left" in message:
            self._diagnosis.mark_left(rank)

    def _drop(self, connection: _Connection) -> None:
        """Close a connection; a sidecar's rank is lost with it, unless it said goodbye."""
        sock = connection.messages.sock
        self.selector.unregister(sock)
        del self._connections[sock]
        connection.messages.close()
        if connection.member is not None:
            self._diagnosis.mark_lost(connection.member.rank, CONNECTION_LOST)

    def _send_all(self, message: dict[str, Any]) -> None:
        for each in self._connections.values():
            if each.member is not None:
                each.messages.send(message)


def _listen(local: bool) -> socket.socket:
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel with IPv6 switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)

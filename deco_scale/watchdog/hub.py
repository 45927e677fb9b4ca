"""Rank 0's companion among the others: it hears all reports, decides, and gives the order to end.

The port takes connections from anyone, but nothing is heard from one that does not begin with the job's token.
"""

import hmac
import resource
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from deco_scale.watchdog.decision import Decision, Report
from deco_scale.watchdog.lines import MAX_LINE, LineSocket, Waiting
from deco_scale.watchdog.orders import Member, Order
from deco_scale.watchdog.settings import WatchdogConfig

_HELLO_S = 5.0
_HELLO_BYTES = 2048
_MOST_STRANGERS = 64
_ALIVE_S = 0.5
LINGER_S = 5.0
"""How long the hub waits for others after its own trainer has ended in order."""


@dataclass(slots=True)
class _Peer:
    line: LineSocket
    came: float
    member: Member | None = None
    stack: str | None = None


@dataclass(slots=True)
class _Sent:
    order: Order | None = None
    alive_at: float = 0.0
    stacks: dict[int, str] = field(default_factory=dict)


class Hub(Waiting):
    """Listens on :attr:`port` for the companions of ranks 1 to ``world_size`` - 1; for one rank there is no port.

    ``local``: all ranks are on this machine, and only it is listened to.
    """

    def __init__(
        self, cfg: WatchdogConfig, me: Member, *, world_size: int, token: str, local: bool, now: float
    ) -> None:
        super().__init__()
        self._me, self._world_size, self._token = me, world_size, token
        self._decision = Decision(range(world_size), cfg, now=now)
        self._peers: dict[socket.socket, _Peer] = {}
        self._members = {me.rank: me}
        self._sent = _Sent()
        self._server: socket.socket | None = None
        self.port = 0
        if world_size > 1:
            _more_descriptors(world_size)
            self._server = _listen(local)
            self._server.setblocking(False)
            self.port = int(self._server.getsockname()[1])
            self._selector.register(self._server, selectors.EVENT_READ)

    @property
    def missing(self) -> list[int]:
        """Ranks whose companion has not come yet."""
        return sorted(set(range(self._world_size)) - self._members.keys())

    def wait(self, seconds: float, now: float) -> None:
        """Hear what comes within this time, at least once; ``now`` is the clock of the decision."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.fileobj is self._server:
                self._accept()
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._peers:
                self._hear(self._peers[key.fileobj], now)
        mono = time.monotonic()
        if mono - self._sent.alive_at > _ALIVE_S:
            self._sent.alive_at = mono
            self._send_all({"alive": True})
        for peer in list(self._peers.values()):
            peer.line.flush()
            if peer.line.closed or (peer.member is None and mono - peer.came > _HELLO_S):
                self._drop(peer, now)

    def tick(self, now: float, report: Report) -> Order | None:
        """Rank 0's own report; the order to end, once, after it was sent to all."""
        self._decision.hear(now, report)
        if self._sent.order is not None or self.missing:
            return None
        verdict = self._decision.check(now)
        if verdict is None:
            return None
        connected = {peer.member.rank for peer in self._peers.values() if peer.member is not None}
        lost = {verdict.rank} if verdict.kind == "lost" else set()
        orphans = [
            member
            for rank, member in self._members.items()
            if rank != self._me.rank and (rank in lost or rank not in connected)
        ]
        found = self._decision.last_report(verdict.rank)
        self._sent.order = Order.of(verdict, self._members[verdict.rank], found, orphans)
        self._send_all({"order": self._sent.order.message()})
        return self._sent.order

    def may_leave(self, since_s: float) -> bool:
        """Whether this companion may go, ``since_s`` after its trainer ended in order."""
        self._decision.leave(self._me.rank)
        return self._decision.over or (since_s > LINGER_S and not self._decision.failing)

    def say_stack(self, text: str) -> None:
        """The innermost frames of rank 0."""
        self._sent.stacks[self._me.rank] = text

    def stack_of(self, rank: int, seconds: float, now: float) -> str | None:
        """The innermost frames of a rank, waited for."""
        deadline = time.monotonic() + seconds
        while rank not in self._sent.stacks and time.monotonic() < deadline:
            if all(p.member is None or p.member.rank != rank for p in self._peers.values()):
                break
            self.wait(0.05, now)
        return self._sent.stacks.get(rank)

    def close(self, now: float, *, linger_s: float = 0.0) -> None:
        """Say goodbye, let the others end first for ``linger_s``, and free the port."""
        deadline = time.monotonic() + linger_s
        self.watch(None)
        while any(p.member is not None for p in self._peers.values()) and time.monotonic() < deadline:
            self.wait(0.05, now)
        self._send_all({"over": True})
        for peer in list(self._peers.values()):
            self._drop(peer, now)
        if self._server is not None:
            self._selector.unregister(self._server)
            self._server.close()
            self._server = None

    def _accept(self) -> None:
        assert self._server is not None
        strangers = [peer for peer in self._peers.values() if peer.member is None]
        if len(strangers) > _MOST_STRANGERS + len(self.missing):
            self._drop(min(strangers, key=lambda peer: peer.came), 0.0)
        with suppress(OSError):
            sock, _ = self._server.accept()
            peer = _Peer(LineSocket(sock, limit=_HELLO_BYTES), time.monotonic())
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _hear(self, peer: _Peer, now: float) -> None:
        for message in peer.line.receive():
            try:
                if peer.member is None:
                    self._greet(peer, message, now)
                else:
                    self._take(peer.member.rank, message, now)
            except (KeyError, TypeError, ValueError, OverflowError):
                peer.line.closed = True
            if peer.line.closed and peer.member is None:
                return

    def _greet(self, peer: _Peer, message: dict[str, Any], now: float) -> None:
        """The first message: the token, and a rank that nobody has taken."""
        token = str(message.get("token")).encode()
        if not hmac.compare_digest(token, self._token.encode()):
            raise ValueError("wrong token")
        member = Member.parse(message["member"])
        if member.rank not in self.missing:
            raise ValueError(f"rank {member.rank} is here already, or none of this job")
        peer.member = self._members[member.rank] = member
        peer.line.limit = MAX_LINE
        self._decision.hear(now, Report(rank=member.rank))
        peer.line.send({"welcome": True})

    def _take(self, rank: int, message: dict[str, Any], now: float) -> None:
        if "report" in message:
            self._decision.hear(now, Report.parse(rank, message["report"]))
        if "stack" in message:
            self._sent.stacks[rank] = str(message["stack"])[:2000]
        if "left" in message:
            self._decision.leave(rank)

    def _drop(self, peer: _Peer, now: float) -> None:
        """Close a connection; one of a companion is missed from now on, unless it said goodbye."""
        sock = peer.line.sock
        self._selector.unregister(sock)
        del self._peers[sock]
        peer.line.close()
        if peer.member is not None:
            how = "is lost: the connection to its companion is closed"
            self._decision.lose(now, peer.member.rank, how)

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            if peer.member is not None:
                peer.line.send(message)


def _listen(local: bool) -> socket.socket:
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel with IPv6 switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _more_descriptors(world_size: int) -> None:
    """One connection a rank; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = world_size + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

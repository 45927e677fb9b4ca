"""What sidecars of different ranks send each other: JSON objects, one per line, over non-blocking connections."""

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin

from deco_scale.watchdog.diagnosis import Fault, RankReport
from deco_scale.watchdog.process import ProcessIdentity

MAX_LINE = 64 * 1024
MAX_STACK = 2000
"""Characters of the innermost frames."""
MALFORMED = (KeyError, TypeError, ValueError, OverflowError)
"""Errors that reading a message of any other form raises."""
_MAX_UNSENT = 2**20


class MessageSocket:
    """A connection; :attr:`closed` once the other side ended it, sent something malformed, or does not read.

    ``limit`` is the longest line accepted, in bytes; neither side can fill the other's memory.
    """

    def __init__(self, sock: socket.socket, *, limit: int = MAX_LINE) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.limit = sock, limit
        self.closed = False
        self._in = self._out = b""

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have arrived in full, also those before the connection was closed."""
        try:
            for _ in range(4):
                chunk = self.sock.recv(MAX_LINE)
                self._in += chunk
                self.closed = self.closed or not chunk
                if len(chunk) < MAX_LINE:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        messages: list[dict[str, Any]] = []
        for line in lines:
            try:
                message = json.loads(line) if len(line) <= self.limit else None
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        self.closed = self.closed or len(self._in) > self.limit
        return messages

    def send(self, message: Mapping[str, Any]) -> None:
        """Send now as far as possible; the rest waits for :meth:`flush`."""
        line = json.dumps(message).encode() + b"\n"
        assert len(line) <= MAX_LINE, f"a message of {len(line)} bytes"
        self._out += line
        self.closed = self.closed or len(self._out) > _MAX_UNSENT
        self.flush()

    def flush(self) -> bool:
        """Send what is pending; True once nothing is left."""
        while self._out and not self.closed:
            try:
                self._out = self._out[self.sock.send(self._out) :]
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self.closed = True
        return not self._out

    def close(self) -> None:
        self.closed = True
        self.sock.close()


@dataclass(frozen=True, slots=True)
class Member:
    """A rank, its host's name, its trainer and its sidecar."""

    rank: int
    host: str
    trainer: ProcessIdentity
    sidecar: ProcessIdentity


@dataclass(frozen=True, slots=True)
class TerminateOrder:
    """End the trainer, because of the ``fault`` of ``member``.

    ``orphans`` are members whose sidecar is lost; any sidecar on their machine ends their trainer (and
    their sidecar, which may be stopped). ``report`` is the last one of the faulty rank; only the sidecar that
    decided has it and writes the event.
    """

    fault: Fault
    member: Member
    orphans: tuple[Member, ...] = ()
    report: RankReport | None = None

    @property
    def text(self) -> str:
        """The reason, in words."""
        member = self.member
        return f"rank {member.rank} on {member.host} (pid {member.trainer.pid}) {self.fault.how}"

    @property
    def message(self) -> dict[str, Any]:
        """What the other sidecars receive."""
        return asdict(replace(self, report=None))


def parse(kind: Any, raw: Any) -> Any:
    """JSON as a dataclass, a tuple of them, a literal or a plain type; raises one of :data:`MALFORMED`."""
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{each.name: parse(each.type, raw[each.name]) for each in fields(kind)})
    if get_origin(kind) is tuple:
        return tuple(parse(get_args(kind)[0], each) for each in raw)
    valid = raw in get_args(kind) if get_origin(kind) is Literal else isinstance(raw, kind)
    if not valid:
        raise TypeError(f"expected {kind}, not {raw!r}")
    return raw

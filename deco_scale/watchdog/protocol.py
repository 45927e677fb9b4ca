"""What sidecars of different ranks send each other: JSON objects, one per line, over asyncio's streams."""

import json
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin

from deco_scale.watchdog.diagnosis import Fault, RankReport
from deco_scale.watchdog.process import ProcessIdentity

LOCALHOST = "127.0.0.1"
BACKLOG = 4096  # all ranks may connect before rank 0's sidecar accepts the first
MAX_LINE = 64 * 1024  # bytes of the longest line accepted: neither side can fill the other's memory
MAX_STACK = 2000  # characters of the innermost frames
BROKEN = (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""Errors that receiving and parsing a message raises: the connection has ended, or what came is no message."""
_MAX_UNSENT = 2**20


def open_port(host: str) -> socket.socket:
    """A port for the sidecars of all ranks, on the loopback interface where ``host`` is :data:`LOCALHOST`."""
    if host == LOCALHOST:
        return socket.create_server((host, 0), backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel with IPv6 switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", 0), backlog=BACKLOG)


async def receive(reader: StreamReader) -> dict[str, Any]:
    """The next message; raises one of :data:`BROKEN`."""
    message = json.loads(await reader.readline())
    if not isinstance(message, dict):
        raise TypeError(f"expected an object, not {message!r}")
    return message


def send(writer: StreamWriter, message: Mapping[str, Any]) -> None:
    """Send now as far as possible, and the rest later; closes the connection of a reader that does not read."""
    line = json.dumps(message).encode() + b"\n"
    assert len(line) <= MAX_LINE, f"a message of {len(line)} bytes"
    writer.write(line)
    if writer.transport.get_write_buffer_size() > _MAX_UNSENT:
        writer.transport.abort()


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
        member = self.member
        return f"rank {member.rank} on {member.host} (pid {member.trainer.pid}) {self.fault.how}"

    @property
    def message(self) -> dict[str, Any]:
        """What the other sidecars receive."""
        return asdict(replace(self, report=None))


def parse(kind: Any, raw: Any) -> Any:
    """JSON as a dataclass, a tuple of them, a literal or a plain type; raises one of :data:`BROKEN`."""
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{each.name: parse(each.type, raw[each.name]) for each in fields(kind)})
    if get_origin(kind) is tuple:
        return tuple(parse(get_args(kind)[0], each) for each in raw)
    valid = raw in get_args(kind) if get_origin(kind) is Literal else isinstance(raw, kind)
    if not valid:
        raise TypeError(f"expected {kind}, not {raw!r}")
    return raw

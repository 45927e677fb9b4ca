"""Messages between companions: JSON objects, one a line.

A connection never blocks, and the other side cannot fill the memory.
"""

import json
import selectors
import socket
from collections.abc import Mapping
from typing import Any

MAX_LINE = 64 * 1024
_MAX_UNSENT = 2**20


class LineSocket:
    """A connection; :attr:`closed` once the other side has ended it, sent what is no message, or does not read."""

    def __init__(self, sock: socket.socket, *, limit: int = MAX_LINE) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.limit = limit
        """Longest line, in bytes, that is taken."""
        self.closed = False
        self._in = b""
        self._out = b""

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived in whole lines; it is given even if the connection is closed behind it."""
        try:
            for _ in range(4):
                piece = self.sock.recv(MAX_LINE)
                self._in += piece
                self.closed = self.closed or not piece
                if len(piece) < MAX_LINE:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        messages = []
        for line in lines:
            message = _parse(line) if len(line) <= self.limit else None
            if message is None:
                self.closed = True
                break
            messages.append(message)
        if len(self._in) > self.limit:
            self.closed = True
        return messages

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it, or keep it for :meth:`flush`."""
        line = json.dumps(message).encode() + b"\n"
        assert len(line) <= MAX_LINE, f"a message of {len(line)} bytes"
        self._out += line
        self.closed = self.closed or len(self._out) > _MAX_UNSENT
        self.flush()

    def flush(self) -> bool:
        """Send what waits; whether nothing is left."""
        while self._out and not self.closed:
            try:
                sent = self.sock.send(self._out)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self.closed = True
                break
            self._out = self._out[sent:]
        return not self._out

    def close(self) -> None:
        self.closed = True
        self.sock.close()


class Waiting:
    """What waits for connections, and for the end of a process as well."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._pidfd: int | None = None

    def watch(self, pidfd: int | None) -> None:
        """End a wait when this becomes readable; None: no longer."""
        if self._pidfd is not None:
            self._selector.unregister(self._pidfd)
        self._pidfd = pidfd
        if pidfd is not None:
            self._selector.register(pidfd, selectors.EVENT_READ)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None

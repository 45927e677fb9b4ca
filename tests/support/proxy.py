"""A proxy that spoils answers on their way: plain HTTP/1.1 in front of a real S3 server, seeded.

The client's Host header goes on unchanged, because its signature covers it.
"""

import contextlib
import random
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator

KINDS = ("503", "reset", "stall", "truncate", "flip", "latency")
PIECE_BYTES = 64 * 1024
SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?>"
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class _Ended(Exception):
    """One side of the connection ended or was spoilt; both are closed."""


class _Message:
    """First line and headers of a request or an answer, as they were received."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        first, *lines = raw.decode("latin-1").split("\r\n")
        self.words = first.split(" ", 2)
        pairs = (line.split(":", 1) for line in lines if ":" in line)
        self.headers = {name.strip().lower(): value.strip() for name, value in pairs}

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    def without(self, name: str) -> bytes:
        kept = [line for line in self.raw.split(b"\r\n") if not line.lower().startswith(name.encode() + b":")]
        return b"\r\n".join(kept)


class _Peer:
    """Buffered reads from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._buffer = b""

    def head(self) -> _Message:
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        return _Message(head + b"\r\n\r\n")

    def take(self, count: int) -> Iterator[bytes]:
        """Exactly ``count`` bytes, piece by piece."""
        while count:
            piece = self._buffer[:count] or self._receive()
            self._buffer = self._buffer[count:] if self._buffer else piece[count:]
            piece = piece[:count]
            count -= len(piece)
            yield piece

    def line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._buffer += self._receive()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line + b"\r\n"

    def body(self, message: _Message) -> Iterator[bytes]:
        """The body's bytes as they are on the wire, chunk headers included."""
        if message.headers.get("transfer-encoding", "").lower() != "chunked":
            yield from self.take(int(message.headers.get("content-length", 0)))
            return
        while True:
            line = self.line()
            yield line
            size = int(line.split(b";")[0], 16)
            if not size:
                break
            yield from self.take(size + 2)
        while line != b"\r\n":
            line = self.line()
            yield line

    def _receive(self) -> bytes:
        piece = self.socket.recv(PIECE_BYTES)
        if not piece:
            raise _Ended
        return piece


def ranged_get(method: str, headers: dict[str, str]) -> bool:
    return method == "GET" and "range" in headers


class FaultProxy:
    """Spoils each request that ``affects`` chooses with at most one fault; ``faults`` gives the probabilities.

    The n-th affected request meets the n-th decision of the seed. "503" answers SlowDown; "reset" sends RST,
    before the answer or within it; "stall" sends a part and then nothing for ``stall_s``; "truncate" sends a part
    and ends; "flip" inverts one bit of the body; "latency" waits ``latency_s`` first. ``injected`` counts them,
    ``connections`` what clients opened.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        faults: dict[str, float],
        seed: int,
        *,
        affects: Callable[[str, dict[str, str]], bool] = ranged_get,
        stall_s: float = 60.0,
        latency_s: float = 0.2,
    ) -> None:
        if unknown := faults.keys() - set(KINDS):
            raise ValueError(f"faults={sorted(unknown)} are not among {KINDS}")
        if sum(faults.values()) > 1:
            raise ValueError(f"faults={faults} add up to more than 1")
        self.injected: Counter[str] = Counter()
        self.connections = 0
        self._upstream, self._faults, self._affects = upstream, faults, affects
        self._stall_s, self._latency_s = stall_s, latency_s
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "FaultProxy":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        with self._lock:
            for each in (self._listener, *self._open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(5)
            assert not thread.is_alive(), "a connection of the proxy did not end"
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """All requests of one client, over one connection to the server."""
        server: _Peer | None = None
        client = _Peer(connection)
        self._track(connection)
        try:
            while not self._stopped.is_set():
                request = client.head()
                server = server or self._dial()
                if not self._exchange(request, client, server):
                    return
        except (OSError, _Ended):
            pass
        finally:
            for each in (connection, server.socket if server else None):
                if each is not None:
                    with self._lock:
                        self._open.discard(each)
                    each.close()

    def _dial(self) -> _Peer:
        connection = socket.create_connection(self._upstream, 5)
        connection.settimeout(30)
        self._track(connection)
        return _Peer(connection)

    def _track(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        if self._stopped.is_set():
            raise _Ended

    def _exchange(self, request: _Message, client: _Peer, server: _Peer) -> bool:
        """One request and its answer; True if the connection goes on."""
        method = request.words[0]
        fault, where = self._decide(method, request.headers)
        if fault == "latency":
            self._stopped.wait(self._latency_s)
        elif fault == "reset" and where < 0.5:
            self._reset(client)
        if request.headers.get("expect", "").lower() == "100-continue":
            client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault == "503":
            for _ in client.body(request):
                pass
            head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
            client.socket.sendall(head.encode() + SLOW_DOWN)
            return True
        server.socket.sendall(request.without("expect"))
        for piece in client.body(request):
            server.socket.sendall(piece)
        answer = server.head()
        client.socket.sendall(answer.raw)
        if method != "HEAD" and answer.words[1] not in ("204", "304"):
            size = int(answer.headers.get("content-length", 0))
            self._body(server.body(answer), int(where * size), fault, client)
        return not (request.closes or answer.closes)

    def _body(self, pieces: Iterator[bytes], position: int, fault: str | None, client: _Peer) -> None:
        """Pass a body on; the fault strikes at the byte ``position``."""
        sent = 0
        for piece in pieces:
            inside = position - sent
            if fault in ("reset", "stall", "truncate", "flip") and 0 <= inside < len(piece):
                if fault == "flip":
                    piece = piece[:inside] + bytes([piece[inside] ^ 1]) + piece[inside + 1 :]
                else:
                    client.socket.sendall(piece[:inside])
                    if fault == "reset":
                        self._reset(client)
                    if fault == "stall":
                        self._stall(client)
                    raise _Ended
            client.socket.sendall(piece)
            sent += len(piece)

    def _decide(self, method: str, headers: dict[str, str]) -> tuple[str | None, float]:
        """Fault of this request, and where in the body it strikes, as a fraction."""
        if not self._affects(method, headers):
            return None, 0.0
        with self._lock:
            draw, where = self._random.random(), self._random.random()
            for kind in KINDS:
                draw -= self._faults.get(kind, 0.0)
                if draw < 0:
                    self.injected[kind] += 1
                    return kind, where
        return None, 0.0

    def _stall(self, client: _Peer) -> None:
        """Nothing, until the client gives up, time is over or the proxy ends."""
        select.select([client.socket], [], [], self._stall_s)

    @staticmethod
    def _reset(client: _Peer) -> None:
        # A linger time of zero makes close() send RST.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        raise _Ended

"""Ports for processes that tests start."""

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of the loopback interface that nothing listens on.

    It lies below the range from which Linux gives ports to outgoing connections, so that no connection takes it
    before the caller does.
    """
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    # Not the seeded generator: files of tests run side by side.
    ports = list(range(20000, end)) or list(range(10000, 60000))
    for port in random.SystemRandom().sample(ports, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port among 100 of {ports[0]} to {ports[-1]}")

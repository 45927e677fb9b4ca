"""Nodes on one machine: network namespaces on a virtual switch, whose cables can be cut.

Needs iproute2 and the right to make namespaces. Names and addresses carry this process's number, so that several
of them can stand at once; what a process that was killed left behind is removed by the next one.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_NAME = re.compile(r"deco(\d+)([nb]\d*)")
INTERFACE = "eth0"
"""Name of each node's interface, within its namespace."""


def ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)
    return done.stdout


def why_not() -> str | None:
    """Why nodes cannot be made here, None where they can."""
    if shutil.which("ip") is None:
        return "iproute2 (the command ip) is not installed"
    name = f"deco{os.getpid()}n9"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"network namespaces are not permitted here ({probe.stderr.strip()})"
    ip("netns", "del", name)
    switch = ["ip", "link", "add", f"deco{os.getpid()}b", "type", "bridge"]
    probe = subprocess.run(switch, capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"a virtual switch is not permitted here ({probe.stderr.strip()})"
    ip("link", "del", f"deco{os.getpid()}b")
    return None


class Nodes:
    """``count`` namespaces that see each other and ``host``, this machine's address on the switch.

    Addresses are of 198.18.0.0/15, which is set aside for tests (RFC 2544).
    """

    def __init__(self, count: int) -> None:
        self._prefix = f"deco{os.getpid()}"
        self._network = f"198.18.{os.getpid() % 256}"
        self.names = [f"{self._prefix}n{node}" for node in range(count)]
        self.addresses = [f"{self._network}.{node + 1}" for node in range(count)]
        self.host = f"{self._network}.254"

    def __enter__(self) -> "Nodes":
        _remove_stale()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def inside(self, node: int, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` in a node, as the process that is started and no child of it."""
        return ["ip", "netns", "exec", self.names[node], *command]

    def cut(self, node: int) -> None:
        """Pull the node's cable."""
        ip("link", "set", self._cable(node), "down")

    def mend(self, node: int) -> None:
        ip("link", "set", self._cable(node), "up")

    def pids(self, node: int) -> list[int]:
        """All processes of a node."""
        namespace = os.stat(f"/run/netns/{self.names[node]}").st_ino
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    if (folder / "ns" / "net").stat().st_ino == namespace:
                        found.append(int(folder.name))
        return found

    def listening(self, node: int) -> list[int]:
        """TCP ports of a node on which something listens."""
        show = self.inside(node, ["cat", "/proc/net/tcp", "/proc/net/tcp6"])
        return listening_ports(subprocess.run(show, check=True, capture_output=True, text=True).stdout)

    def _cable(self, node: int) -> str:
        """The switch's end of a node's cable."""
        return self.names[node]

    def _make(self) -> None:
        switch = f"{self._prefix}b"
        ip("link", "add", switch, "type", "bridge")
        ip("addr", "add", f"{self.host}/24", "dev", switch)
        ip("link", "set", switch, "up")
        for node, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            ip("netns", "add", name)
            peer = ["peer", "name", INTERFACE, "netns", name]
            ip("link", "add", self._cable(node), "type", "veth", *peer)
            ip("link", "set", self._cable(node), "master", switch, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for name in self.names:
            ip("netns", "del", name, check=False)
            ip("link", "del", name, check=False)
        ip("link", "del", f"{self._prefix}b", check=False)


def listening_ports(table: str) -> list[int]:
    """Ports in the state LISTEN of a text like ``/proc/net/tcp``."""
    rows = [line.split() for line in table.splitlines()]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == "0A"})


def _remove_stale() -> None:
    """Remove what processes that are gone have left."""
    for line in ip("netns", "list").splitlines():
        found = _NAME.fullmatch(line.split()[0])
        if found and not Path(f"/proc/{found[1]}").exists():
            ip("netns", "del", line.split()[0], check=False)
    for line in ip("-brief", "link", "show").splitlines():
        found = _NAME.fullmatch(line.split()[0].partition("@")[0])
        if found and not Path(f"/proc/{found[1]}").exists():
            ip("link", "del", found[0], check=False)

"""The cluster of the chaos test: nodes, their launchers, the S3 server as they see it, and a small disk.

A node is a network namespace; where those are not permitted, all nodes are this machine, told apart by their
ranks. Each node runs ``python -m launcher.schedulers.node_agent`` with entry.py of this folder instead of
launcher/train.py, and the cluster treats them as SLURM's ``srun --kill-on-bad-exit=0 --wait`` would: the job's
exit code is the highest one, and nodes that go on for long after one has failed are killed.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher.schedulers.slurm import EXIT_WAIT_S
from tests.support import ROOT
from tests.support.namespaces import INTERFACE, Nodes, listening_ports
from tests.support.ports import free_port

MARK = "CHAOS_JOB"
PORT = 29700
LOOK_S = 1.0
"""How often the job's processes and ports are noted."""
GONE_S = 15.0
"""So long after an end processes of the job may be seen: sidecars that report it."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One launch of the job; ``began`` by this process's monotonic clock."""

    number: int
    began: float
    launchers: list["subprocess.Popen[bytes]"]
    seen: dict[int, float] = field(default_factory=dict)
    """Processes that were seen, with the times of their creation, by which a number that is used again is told."""
    ports: set[int] = field(default_factory=set)
    looked: list[float] = field(default_factory=lambda: [0.0])
    failed: list[float] = field(default_factory=list)
    """Moments at which one node had failed and another still ran."""
    killed: list[float] = field(default_factory=list)
    """When the cluster's patience was over and it killed what went on."""


class Cluster:
    """``nodes`` times ``processes`` trainers of one configuration; ``network`` None puts them all on loopback."""

    def __init__(
        self, folder: Path, config: Path, *, nodes: int, processes: int, network: Nodes | None,
        nan_steps: Mapping[int, int], variables: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.folder, self.nodes, self.processes, self.network = folder, nodes, processes, network
        self.samples = folder / "samples"
        self.samples.mkdir(parents=True)
        self._mark = uuid.uuid4().hex
        # Node starts launcher/train.py of a folder.
        entry = folder / "entry" / "launcher" / "train.py"
        entry.parent.mkdir(parents=True)
        entry.symlink_to(ROOT / "tests" / "fault_injection" / "chaos" / "entry.py")
        self._port = PORT if network is not None else free_port()
        self._command = [
            sys.executable, "-m", "launcher.schedulers.node_agent",
            "--nodes", str(nodes), "--processes", str(processes), "--entry", str(folder / "entry"),
            "--pids", "{pids}", "--", "--config", str(config),
        ]  # fmt: skip
        self._variables = {
            **os.environ,
            **variables,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MASTER_ADDR": network.addresses[0] if network is not None else "127.0.0.1",
            "MASTER_PORT": str(self._port),
            "GLOO_SOCKET_IFNAME": INTERFACE if network is not None else "lo",
            "CHAOS_SAMPLES": str(self.samples),
            "CHAOS_NAN": json.dumps(nan_steps),
            MARK: self._mark,
        }

    def start(self, number: int) -> Attempt:
        """Launch the job on all nodes."""
        launchers = []
        for node in range(self.nodes):
            pids = self._pids(node)
            pids.unlink(missing_ok=True)
            command = [word.format(pids=pids) for word in self._command]
            if self.network is not None:
                command = self.network.inside(node, command)
            variables = {**self._variables, "NODE_RANK": str(node), "CHAOS_ATTEMPT": str(number)}
            with (self.folder / f"attempt_{number:02d}_node_{node}.log").open("wb") as log:
                launchers.append(
                    subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
                )
        return Attempt(number=number, began=time.monotonic(), launchers=launchers)

    def ranks(self) -> dict[int, int]:
        """Process numbers of the trainers by rank, as far as their node has started them."""
        found: dict[int, int] = {}
        for node in range(self.nodes):
            with contextlib.suppress(OSError, ValueError):
                listed = json.loads(self._pids(node).read_text())
                found |= {node * self.processes + local: pid for local, pid in enumerate(listed)}
        return found

    def wait(self, attempt: Attempt) -> int | None:
        """The job's exit code as srun would have it, None while it runs; to be called again and again."""
        codes = [launcher.poll() for launcher in attempt.launchers]
        now = time.monotonic()
        if now - attempt.looked[-1] > LOOK_S:
            self.look(attempt)
            attempt.looked.append(now)
        if any(codes) and None in codes:
            attempt.failed.append(now)
            if now - attempt.failed[0] > EXIT_WAIT_S:
                self.kill(attempt)
                attempt.killed.append(now)
                codes = [launcher.returncode for launcher in attempt.launchers]
        if None in codes:
            return None
        return max(128 - code if code < 0 else code for code in codes if code is not None)

    def kill(self, attempt: Attempt) -> None:
        """End everything, as the scheduler's own clean-up does."""
        for pid in self.present():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for launcher in attempt.launchers:
            launcher.wait()

    def look(self, attempt: Attempt) -> None:
        """Note the processes and ports that the job has now."""
        for pid in self.present():
            if pid not in attempt.seen:
                with contextlib.suppress(psutil.Error):
                    attempt.seen[pid] = psutil.Process(pid).create_time()
        attempt.ports.update(self.listening(attempt))

    def present(self) -> set[int]:
        """Processes of the job, by the namespaces and by their environment."""
        found = set()
        if self.network is not None:
            for node in range(self.nodes):
                found.update(self.network.pids(node))
        mark = f"{MARK}={self._mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (folder / "environ").read_bytes():
                        found.add(int(folder.name))
        return found

    def listening(self, attempt: Attempt) -> set[int]:
        """Ports on which processes of the job listen."""
        found = set()
        for pid in attempt.seen:
            with contextlib.suppress(psutil.Error, OSError):
                if self.network is not None:
                    found.update(listening_ports(Path(f"/proc/{pid}/net/tcp").read_text()))
                    found.update(listening_ports(Path(f"/proc/{pid}/net/tcp6").read_text()))
                else:
                    kept = psutil.Process(pid).net_connections(kind="tcp")
                    found.update(each.laddr.port for each in kept if each.status == psutil.CONN_LISTEN)
        return found

    def leftovers(self, attempt: Attempt) -> tuple[list[str], float]:
        """What is left of an attempt that has ended, in words, and after how many seconds nothing was."""
        began = time.monotonic()
        while True:
            left = [f"process {pid} {_command_of(pid)}" for pid in sorted(self.present())]
            left += [f"process {pid} {state}" for pid, state in _remaining(attempt.seen)]
            left += [f"port {port}" for port in self._ports_left(attempt)]
            passed = time.monotonic() - began
            if not left or passed > GONE_S:
                return left, passed
            time.sleep(0.2)

    def _ports_left(self, attempt: Attempt) -> list[int]:
        if self.network is not None:
            return sorted(port for node in range(self.nodes) for port in self.network.listening(node))
        table = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
        return sorted(attempt.ports & set(listening_ports(table)))

    def _pids(self, node: int) -> Path:
        return self.folder / f"pids_{node}.json"


def _remaining(seen: Mapping[int, float]) -> Iterator[tuple[int, str]]:
    """Processes that still are what they were when they were seen, dead ones that nobody waited for included."""
    for pid, created in seen.items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == created:
                yield pid, process.status()


def _command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return ""


class Relay:
    """Passes TCP connections to ``address`` on to a port of loopback, where the S3 server listens."""

    def __init__(self, address: str, port: int) -> None:
        # A port of its own: SeaweedFS does not start where another address has the same one.
        self._address, self._upstream, self.port = address, port, 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serve = asyncio.start_server(self._accept, self._address, 0)
        server = self._loop.run_until_complete(serve)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pass_on(reader, ours), _pass_on(theirs, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.close()
    except OSError:
        writer.transport.abort()


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[bool]:
    """A disk of its own at ``folder`` while the context lasts; False where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "chaos", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False) if os.geteuid() == 0 else None
    mounted = done is not None and done.returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)

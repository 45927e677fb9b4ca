"""Runs the processes of one node: starts and ends them together, forwards signals, returns their exit code.

    python -m launcher.schedulers.node_agent --nodes 4 --processes 8 --node-rank-from VARIABLE [--preflight]
        -- --config FILE [key.path=value ...]

``torchrun`` does nearly the same, but its exit code is 1 for any failure, and it kills trainers half a minute
after it asked them to save. MASTER_ADDR and MASTER_PORT come from the environment; preflight takes the port after.
``--probe`` exits 0 while every process of the node runs, 1 where one is stopped, dead or not started.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

ROOT = Path(__file__).resolve().parents[2]
EXIT_WAIT_S = 60.0
"""How long the other processes of a node may take to end after one has failed."""
_POLL_S = 0.1
_NOT_RUNNING = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


class Node:
    """``processes`` children at a time; ``pids`` is the file that ``--probe`` reads."""

    def __init__(self, *, nodes: int, processes: int, rank: int, pids: Path) -> None:
        self._nodes, self._processes, self._rank, self._pids = nodes, processes, rank, pids
        self._children: list[subprocess.Popen[bytes]] = []
        self._received: int | None = None
        self._forwarded = False

    def run(self, command: Sequence[str], *, port: int) -> int:
        """Exit code of the first process that failed, 128 + n for one that signal n killed; 0 if none failed."""
        if self._received is not None:
            return 128 + self._received
        self._children = [self._start(command, local, port) for local in range(self._processes)]
        self._pids.write_text(json.dumps([child.pid for child in self._children]), encoding="ascii")
        # A signal that came while processes started is forwarded now that all have.
        if self._received is not None and not self._forwarded:
            self.receive(self._received)
        try:
            return self._wait()
        finally:
            self._end()

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: every child gets what this process got."""
        self._received, self._forwarded = number, bool(self._children)
        for child in self._children:
            child.send_signal(number)

    def _start(self, command: Sequence[str], local: int, port: int) -> "subprocess.Popen[bytes]":
        ranks = {
            "RANK": self._rank * self._processes + local,
            "WORLD_SIZE": self._nodes * self._processes,
            "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": self._processes,
            "MASTER_PORT": port,
        }
        environment = {**os.environ, **{name: str(value) for name, value in ranks.items()}}
        # A session of its own: its workers end with it.
        return subprocess.Popen(list(command), env=environment, start_new_session=True)

    def _wait(self) -> int:
        first: int | None = None
        deadline = 0.0
        while True:
            codes = [child.poll() for child in self._children]
            # Of several at a time one that a signal killed, whose code is negative: the others may be its effects.
            failed = min((code for code in codes if code), default=None)
            if first is None and failed is not None:
                first, deadline = failed, time.monotonic() + EXIT_WAIT_S
            if None not in codes or (first is not None and time.monotonic() > deadline):
                return 0 if first is None else (128 - first if first < 0 else first)
            time.sleep(_POLL_S)

    def _end(self) -> None:
        """Kill what is left, children of children too, and leave no zombie."""
        for child in self._children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        self._children = []


def probe(pids: Path) -> int:
    """0 while every process in ``pids`` runs, else 1."""
    try:
        states = [psutil.Process(pid).status() for pid in json.loads(pids.read_text(encoding="ascii"))]
    except (OSError, ValueError, psutil.Error):
        return 1
    return 1 if _NOT_RUNNING.intersection(states) else 0


def main(argv: Sequence[str] | None = None, variables: Mapping[str, str] = os.environ) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--node-rank-from", default="NODE_RANK", metavar="VARIABLE")
    parser.add_argument("--preflight", action="store_true", help="launcher/preflight.py first")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--pids", type=Path, default=Path(tempfile.gettempdir()) / "deco_scale_node.json")
    parser.add_argument("--entry", type=Path, default=ROOT, help="folder with launcher/train.py")
    parser.add_argument("arguments", nargs="*", help="of the trainer, after --")
    args = parser.parse_args(argv)
    if args.probe:
        return probe(args.pids)
    try:
        rank, port = int(variables[args.node_rank_from]), int(variables["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        parser.error(f"{args.node_rank_from} and MASTER_PORT must be numbers in the environment: {error}")
    if not 0 <= rank < args.nodes or args.processes < 1:
        parser.error(f"node {rank} of {args.nodes} with {args.processes} processes")
    node = Node(nodes=args.nodes, processes=args.processes, rank=rank, pids=args.pids)
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.signal(number, node.receive) for number in signals]
    try:
        programs = {"preflight": port + 1, "train": port} if args.preflight else {"train": port}
        code = 0
        for program, at in programs.items():
            words = [sys.executable, str(args.entry / "launcher" / f"{program}.py"), *args.arguments]
            code = code or node.run(words, port=at)
        return code
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())

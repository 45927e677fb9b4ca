"""What a run writes, seen as it is written: every line with the moment at which it came."""

import threading
import time
from pathlib import Path
from typing import Any

from deco_scale.observability.events import EVENTS
from deco_scale.observability.jsonl import JsonlTailer
from deco_scale.observability.run_dir import METRICS

POLL_S = 0.02
NO_PROGRESS = ("start", "end", "hang", "lost_rank", "corruption")


class Watch:
    """Follows ``metrics.jsonl`` and ``events.jsonl`` of a run in a thread; lists only grow."""

    def __init__(self, run: Path) -> None:
        self._files = [(kind, JsonlTailer(run / name)) for kind, name in (("metrics", METRICS), ("event", EVENTS))]
        self.lines: list[tuple[float, str, dict[str, Any]]] = []
        """When it came (monotonic), "metrics" or the event's kind, and what it says."""
        self.done = 0
        """The highest step that was logged."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def events(self, kind: str, *, since: float = 0.0) -> list[tuple[float, dict[str, Any]]]:
        return [(at, entry) for at, name, entry in self.lines if name == kind and at >= since]

    def down_s(self) -> float:
        """Seconds from the last line that shows progress before each start but the first, to that start.

        A step that is logged while a rank hangs, as far as the ``hang`` event says how long it did, shows none.
        """
        total, last, before = 0.0, None, list[float]()
        for at, kind, fields in self.lines:
            if kind == "start":
                total += at - last if last is not None else 0.0
            if kind == "start" or kind not in NO_PROGRESS:
                last = at
                before.append(at)
            elif kind == "hang" and "silent_s" in fields:
                last = max(time for time in before if time <= at - fields["silent_s"])
        return total

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            self._read()

    def _read(self) -> None:
        for name, file in self._files:
            for entry in file.read():
                if name == "event":
                    self.lines.append((time.monotonic(), entry["kind"], entry))
                elif "loss" in entry:
                    self.lines.append((time.monotonic(), "metrics", entry))
                    self.done = max(self.done, entry["step"])

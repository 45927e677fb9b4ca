"""A run's folder as it stands: logged steps, events, configuration, pictures, checkpoints."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deco_scale.watching.accounting import Accounting, account
from deco_scale.watching.events import EVENTS, Event, is_fault, is_number, parse_event
from deco_scale.watching.follow import JsonLines

_MAX_CONFIG = 2**20
_SLOW_S = 0.1
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage as the configuration has it; ``begin`` and ``end`` count the run's steps."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SavedState:
    """A complete checkpoint: its step and when it was complete (Unix seconds)."""

    step: int
    time: float


@dataclass(frozen=True, slots=True)
class _Accounted:
    now: float
    events: int
    keep_s: float
    found: Accounting | None


class RunFolder:
    """Everything read so far; :meth:`refresh` reads what is new.

    ``metrics`` holds all logged lines in the file's order, steps that were done again included; ``problems`` what
    could not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.quarantined = 0
        self.config: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self._metrics = JsonLines(self.folder / "metrics.jsonl")
        self._events = JsonLines(self.folder / EVENTS)
        self._quarantine = JsonLines(self.folder / "quarantine.jsonl")
        self._seen = {"metrics": 0, "events": 0, "quarantine": 0}
        self._config_stamp: tuple[int, int] | None = None
        self._bad_events = 0
        self._accounted: _Accounted | None = None
        self._failed: dict[str, str] = {}

    def refresh(self) -> None:
        """Read what was written since the last call."""
        self._failed = {}
        lines = self._lines("metrics", self._metrics)
        if self._replaced("metrics", self._metrics):
            self.metrics = []
        self.metrics += [line for line in lines if is_number(line.get("step"))]
        entries = self._lines("events", self._events)
        if self._replaced("events", self._events):
            self.events, self._bad_events = [], 0
        for entry in entries:
            try:
                self.events.append(parse_event(entry))
            except ValueError:
                self._bad_events += 1
        bad = self._lines("quarantine", self._quarantine)
        self.quarantined = len(bad) + (0 if self._replaced("quarantine", self._quarantine) else self.quarantined)
        self._read_config()

    def _lines(self, name: str, file: JsonLines) -> list[dict[str, Any]]:
        try:
            return file.read()
        except OSError as error:
            self._failed[name] = f"{name}.jsonl cannot be read: {error.strerror}"
            return []

    def _replaced(self, name: str, file: JsonLines) -> bool:
        before, self._seen[name] = self._seen[name], file.generation
        return before != file.generation

    def _read_config(self) -> None:
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._config_stamp:
                return
            if status.st_size > _MAX_CONFIG:
                self._failed["config"] = f"config.yaml is larger than {_MAX_CONFIG} bytes"
                return
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            self._failed["config"] = f"config.yaml cannot be read: {' '.join(str(error).split())[:200]}"
            return
        if isinstance(raw, dict):
            self.config, self._config_stamp = raw, stamp

    @property
    def problems(self) -> list[str]:
        found = list(self._failed.values())
        for name, count in (
            ("metrics.jsonl", self._metrics.bad),
            ("events.jsonl", self._events.bad + self._bad_events),
            ("quarantine.jsonl", self._quarantine.bad),
        ):
            if count:
                found.append(f"{name}: {count} lines that are not of its format were left out")
        return found

    @property
    def last(self) -> Mapping[str, Any]:
        """The line that was logged last; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    def steps(self) -> list[dict[str, Any]]:
        """Logged steps in order, each as it was last done."""
        by_step = {int(line["step"]): line for line in self.metrics}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def stages(self) -> list[StagePlan]:
        """Stages of the configuration; none where it is missing or not of its form."""
        stages, begin = [], 0
        listed = self.config.get("stages")
        for stage in listed if isinstance(listed, list) else []:
            if not isinstance(stage, dict) or not isinstance(stage.get("steps"), int):
                return []
            stages.append(StagePlan(str(stage.get("name")), begin, begin + stage["steps"]))
            begin += stage["steps"]
        return stages

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if is_fault(event)]

    @property
    def checkpoint(self) -> SavedState | None:
        """The newest complete checkpoint, by the events or by the folder's own ``checkpoints``."""
        found = [SavedState(e.fields["step"], e.time) for e in self.events if e.kind == "checkpoint"]
        for mark in (self.folder / "checkpoints").glob("step_*/COMPLETE"):
            match = _STEP.fullmatch(mark.parent.name)
            try:
                found += [SavedState(int(match[1]), mark.stat().st_mtime)] if match else []
            except OSError:
                continue  # retired between the listing and the look
        return max(found, key=lambda saved: (saved.time, saved.step), default=None)

    def pictures(self) -> list[tuple[int, Path]]:
        """Pictures of the samples' folder with their steps, in order."""
        found = []
        for path in (self.folder / "samples").glob("*.png"):
            match = _STEP.search(path.stem)
            if match and path.is_file() and not path.is_symlink():
                found.append((int(match[1]), path))
        return sorted(found)

    def accounting(self, now: float) -> Accounting | None:
        """Where the time went up to ``now`` (Unix seconds); None without ``events.jsonl``.

        One that took long is kept for twenty times as long, unless an event has come.
        """
        kept = self._accounted
        if kept is not None and kept.events == len(self.events) and 0 <= now - kept.now < kept.keep_s:
            return kept.found
        began = time.perf_counter()
        found = account(self.events, self.metrics, now=now)
        cost_s = time.perf_counter() - began
        self._accounted = None
        if cost_s > _SLOW_S:
            self._accounted = _Accounted(now, len(self.events), 20 * cost_s, found)
        return found

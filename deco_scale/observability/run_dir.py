"""A run's folder, read from outside: logged steps, events, configuration, images, checkpoints, time to go."""

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from deco_scale.errors import ConfigError
from deco_scale.observability.events import EVENTS, Event, is_fault, is_number, parse_event
from deco_scale.observability.goodput import Goodput, compute_goodput
from deco_scale.observability.jsonl import JsonlTailer
from deco_scale.yaml import load_yaml

METRICS, QUARANTINE = "metrics.jsonl", "quarantine.jsonl"
_MAX_CONFIG = 2**20
_RECENT = 20  # logged steps over which the time of a step is averaged
_SLOW_S = 0.1
COMPLETE = "COMPLETE"  # the file of a checkpoint that is written last
STEP = "step_"  # prefix of a checkpoint's name
_STEP = re.compile(rf"{STEP}(\d{{8,}})")


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in ``folder`` by step, in order."""
    paths = (marker.parent for marker in folder.glob(f"{STEP}*/{COMPLETE}"))
    matches = ((_STEP.fullmatch(path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


class Stage(NamedTuple):
    """A stage as the configuration has it: ``start`` and ``end`` count the run's steps."""

    name: str
    start: int
    end: int


def _logged_step(line: dict[str, Any]) -> dict[str, Any] | None:
    """The line, unless it is an evaluation or the goodput."""
    is_step = is_number(line.get("step")) and not any(name.startswith("eval.") for name in line)
    return line if is_step else None


class RunDir:
    """What has been read of the folder so far; :meth:`refresh` reads what is new.

    ``metrics`` holds all logged steps in the file's order, repeated ones included, without evaluations.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {
            METRICS: JsonlTailer(path / METRICS, _logged_step),
            EVENTS: JsonlTailer(path / EVENTS, parse_event),
            QUARANTINE: JsonlTailer(path / QUARANTINE, bool),
        }
        self.metrics: list[dict[str, Any]] = self._files[METRICS].items
        self.events: list[Event] = self._files[EVENTS].items
        self.config: dict[str, Any] = {}
        self._config_stamp: tuple[int, int] | None = None
        self._errors: list[str] = []
        self._goodput: tuple[float, int, float, Goodput | None] = (0.0, -1, 0.0, None)
        """When it was computed, for how many events, how long it is kept, and the result."""

    def refresh(self) -> Self:
        """Read what was written since the last call; :attr:`problems` has what could not be read."""
        self._errors = []
        for name, file in self._files.items():
            try:
                file.read()
            except OSError as error:
                self._errors.append(f"{name} cannot be read: {error.strerror}")
        self._read_config()
        return self

    def _read_config(self) -> None:
        path = self.path / "config.yaml"
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._config_stamp:
                return
            if status.st_size > _MAX_CONFIG:
                raise ConfigError(f"config.yaml is larger than {_MAX_CONFIG} bytes")
            raw = load_yaml(path.read_text(encoding="utf-8"), "config.yaml")
            if isinstance(raw, dict):
                self.config, self._config_stamp = raw, stamp
        except FileNotFoundError:
            pass
        except ConfigError as error:
            self._errors.append(str(error)[:200])
        except (OSError, UnicodeDecodeError) as error:
            self._errors.append(f"config.yaml cannot be read: {type(error).__name__}")

    @property
    def problems(self) -> list[str]:
        """Files that could not be read, and counts of malformed lines."""
        bad = [f"{name}: ignored {file.bad} malformed lines" for name, file in self._files.items() if file.bad]
        return self._errors + bad

    @property
    def quarantined(self) -> int:
        """Samples that could not be used."""
        return len(self._files[QUARANTINE].items)

    @property
    def last(self) -> Mapping[str, Any]:
        """The step that was logged last; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    def steps(self) -> list[dict[str, Any]]:
        """Logged steps in order; one that was repeated after a resume counts as last done."""
        by_step = {int(line["step"]): line for line in self.metrics}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def stages(self) -> list[Stage]:
        """Stages of the configuration; none where it is missing or malformed."""
        stages: list[Stage] = []
        listed = self.config.get("stages")
        for stage in listed if isinstance(listed, list) else []:
            if not isinstance(stage, dict) or not isinstance(stage.get("steps"), int):
                return []
            start = stages[-1].end if stages else 0
            stages.append(Stage(str(stage.get("name")), start, start + stage["steps"]))
        return stages

    def progress(self) -> list[tuple[Stage, int, float | None]]:
        """Each stage, its steps done, and seconds for the others at the pace of its own last logged steps, without
        saves and faults; None before any was timed."""
        reached = int(self.last.get("step", 0))
        result = []
        for stage in self.stages:
            steps = stage.end - stage.start
            done = min(max(reached - stage.start, 0), steps)
            recent = [line for line in self.metrics if line.get("stage") == stage.name][-_RECENT:]
            times = [line["step_s"] for line in recent if is_number(line.get("step_s"))]
            left = (steps - done) * sum(times) / len(times) if times else None
            result.append((stage, done, 0.0 if done == steps else left))
        return result

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if is_fault(event)]

    @property
    def checkpoint(self) -> tuple[float, int] | None:
        """When the newest checkpoint was complete (Unix seconds) and its step, by events or in ``checkpoints``."""
        saved = [(event.time, int(event.fields["step"])) for event in self.events if event.kind == "checkpoint"]
        for step, path in complete_checkpoints(self.path / "checkpoints").items():
            with contextlib.suppress(OSError):  # deleted by the retention policy after it was listed
                saved.append(((path / COMPLETE).stat().st_mtime, step))
        return max(saved, default=None)

    def sample_images(self) -> list[tuple[int, Path]]:
        """Images of the samples' folder with their steps, in order."""
        paths = (self.path / "samples").glob("*.png")
        found = ((_STEP.search(path.stem), path) for path in paths if path.is_file() and not path.is_symlink())
        return sorted((int(match[1]), path) for match, path in found if match)

    def goodput(self, now: float) -> Goodput | None:
        """Where the time went up to ``now`` (Unix seconds); None without a start in ``events.jsonl``.

        A result that was slow to compute is kept for twenty times as long, unless there is a new event.
        """
        computed_at, events, keep_s, result = self._goodput
        if events == len(self.events) and 0 <= now - computed_at < keep_s:
            return result
        start = time.perf_counter()
        result = compute_goodput(self.events, self.metrics, now=now)
        cost_s = time.perf_counter() - start
        self._goodput = (now, len(self.events), 20 * cost_s if cost_s > _SLOW_S else 0.0, result)
        return result

"""What is seen of a run: a progress line, plain lines, ``metrics.jsonl``, wandb, Prometheus, alerts, curves.

Everything that is written or shown here has been scrubbed of secrets.
"""

import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.text import duration
from deco_scale.errors import RunError
from deco_scale.observability.config import MonitorConfig, WandbConfig
from deco_scale.observability.curves import save_curves_png
from deco_scale.observability.events import EVENTS, Event
from deco_scale.observability.goodput import CLASSES
from deco_scale.observability.jsonl import JsonlTailer, JsonlWriter
from deco_scale.observability.prometheus import PrometheusExporter
from deco_scale.observability.redact import redacted, redacted_fields, scrub
from deco_scale.observability.run_dir import METRICS, RunDir
from deco_scale.observability.wandb import WandbRun
from deco_scale.observability.webhooks import AlertSender

LOG, CURVES = "log.txt", "curves.png"


class RunLogger:
    """Writes on rank 0 and is silent elsewhere.

    wandb, Prometheus and alerts that do not work are warned of and do not stop training;
    :func:`~deco_scale.observability.webhooks.check_webhook` finds a wrong ``monitor`` before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        total_steps: int,
        wandb: WandbConfig,
        config: dict[str, Any],
        monitor: MonitorConfig | None = None,
        console: Console | None = None,
    ) -> None:
        self._folder, self._active, self._total = folder, active, total_steps
        self._console = console or Console()
        self._step: int | None = None
        self._progress: Progress | None = None
        self._task: Any = None
        self._tracking: WandbRun | None = None
        self._metrics_server: PrometheusExporter | None = None
        self._alerts: AlertSender | None = None
        self._open = ExitStack()
        if not active:
            return
        self._log, self._metrics, self._events = (self._lines(folder / n) for n in (LOG, METRICS, EVENTS))
        handler = _ConsoleHandler(self)
        for package in map(logging.getLogger, ("deco_scale", "data_pipeline")):
            package.addHandler(handler)
            self._open.callback(package.removeHandler, handler)
        self._start_monitor(monitor or MonitorConfig())
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, shown="")
        if wandb.mode != "disabled":
            self._tracking = WandbRun(folder, wandb, redacted(config), self.say)
            self._open.callback(self._tracking.close)
        if self._progress is not None:
            self._open.callback(self._progress.stop)

    def _lines(self, path: Path) -> JsonlWriter:
        lines = JsonlWriter(path)
        self._open.callback(lines.close)
        return lines

    def _show(self, line: str) -> None:
        """On the console only."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _start_monitor(self, cfg: MonitorConfig) -> None:
        if cfg.webhook_env is not None:
            self._alerts = AlertSender(cfg.webhook_env, run=self._folder.resolve().name)
            self._open.callback(self._alerts.close)
        if cfg.prometheus_port is None:
            return
        host, port = cfg.prometheus_host, cfg.prometheus_port
        try:
            self._metrics_server = PrometheusExporter(host=host, port=port, total_steps=self._total)
        except RunError as error:
            self.say(f"WARNING: {error}; training goes on without them")
            return
        self._open.callback(self._metrics_server.close)
        self.say(f"Prometheus metrics: http://{host}:{port}/metrics")

    def say(self, message: str) -> None:
        """One plain line, on the console and in ``log.txt``."""
        if self._active:
            line = f"{time.strftime('%H:%M:%S')} {scrub(message)}"
            self._show(line)
            self._log.write(line + "\n")

    def begin(self, **fields: Any) -> None:
        """The start of an attempt, numbered after those that the run's folder knows."""
        if self._active:
            events = JsonlTailer(self._folder / EVENTS).read()
            attempt = 1 + sum(e.get("kind") == "start" for e in events)
            self.event("start", attempt=attempt, **fields)

    def event(self, kind: str, **fields: Any) -> None:
        """One line of ``events.jsonl``; see :mod:`deco_scale.observability.events` for the kinds."""
        if not self._active:
            return
        event = Event(time.time(), kind, redacted_fields(fields))
        # First what needs no disk: a full one is worth an alert.
        if self._alerts is not None:
            self._alerts.event(event, self._step)
        if self._metrics_server is not None:
            self._metrics_server.log_event(event)
        self._events.write(event.line())

    def metrics(self, values: dict[str, Any]) -> None:
        """One logged step."""
        if not self._active:
            return
        self._step = values["step"]
        values = self._write(values)
        remaining = (self._total - values["step"]) * values["step_s"]
        parts = " ".join(
            f"{name.removeprefix('loss_')} {values[name]:.4f}"
            for name in ("loss_flow", "loss_freq", "loss_repa")
            if values.get(name) is not None
        )
        shown = (
            f"loss {values['loss']:.4f} | {values['images_per_s']:.1f} images/s | "
            f"data wait {1000 * values['data_wait_s']:.0f} ms | norm {values['grad_norm']:.2f} | {parts}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], shown=shown)
            self._log.write(f"step {values['step']} {shown}\n")
        else:
            self.say(f"step {values['step']}/{self._total} {shown} | ETA {duration(remaining)}")
        if self._tracking is not None:
            self._tracking.log(values["step"], {k: v for k, v in values.items() if isinstance(v, int | float)})

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Scores of an evaluation, as a line of its own with names that begin with ``eval.``."""
        if not self._active or not scores:
            return
        named = {f"eval.{name}": value for name, value in scores.items()}
        self._write({"step": step, **named})
        self.say(f"step {step} evaluation: " + ", ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        if self._tracking is not None:
            self._tracking.log(step, named)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Tell of a picture that was written."""
        self.say(f"{name}: {path}")
        if self._tracking is not None:
            self._tracking.picture(step, name, path)

    def close(self) -> None:
        """Draw the curves and end what runs."""
        if not self._active:
            return
        with self._open:
            self._goodput()
            entries = read_metrics(self._folder)
            if entries:
                self._draw(entries)

    def _draw(self, entries: list[dict[str, Any]]) -> None:
        try:
            save_curves_png(entries, self._folder / CURVES)
        except OSError as error:
            self.say(f"WARNING: no loss curves: {error.filename or CURVES}: {error.strerror}")
        else:
            self.say(f"loss curves: {self._folder / CURVES}")

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        """A line of ``metrics.jsonl``; returns what it says."""
        line: dict[str, Any] = redacted_fields(values)
        self._metrics.write(json.dumps(line) + "\n")
        if self._metrics_server is not None:
            self._metrics_server.log_metrics(line)
        return line

    def _goodput(self) -> None:
        """Say where the run's time has gone, all attempts together; the last line of ``metrics.jsonl``."""
        run = RunDir(self._folder)
        run.refresh()
        found = run.goodput(time.time())
        if found is None:
            return
        self._write(found.as_metrics())
        parts = [f"{name} {found.seconds(name):.0f} s" for name in CLASSES if found.seconds(name) >= 0.5]
        self.say(
            f"of {found.wall_s:.0f} s in {len(found.attempts)} attempt(s): {', '.join(parts)}; "
            f"effective training time {found.effective:.1%}"
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Logged steps in order, without evaluations; a step repeated after a resume counts as last done."""
    run = RunDir(folder)
    run.refresh()
    return run.steps()


class _ConsoleHandler(logging.Handler):
    """Shows warnings of the packages' loggers like the reporter's own lines."""

    def __init__(self, reporter: RunLogger) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.say(f"{record.levelname}: {record.getMessage()}")

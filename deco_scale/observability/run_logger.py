"""Output of a run: progress bar, log lines, ``metrics.jsonl``, events, wandb, Prometheus, alerts, curves.

Everything that is written or shown here has been scrubbed of secrets.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.text import duration
from deco_scale.errors import RunError
from deco_scale.observability.config import MonitorConfig, WandbConfig
from deco_scale.observability.curves import save_curves_png
from deco_scale.observability.events import EVENTS, Event
from deco_scale.observability.goodput import CLASSES, Goodput
from deco_scale.observability.jsonl import JsonlTailer, JsonlWriter
from deco_scale.observability.prometheus import PrometheusExporter
from deco_scale.observability.redact import redacted, redacted_fields, scrub
from deco_scale.observability.run_dir import METRICS, RunDir
from deco_scale.observability.wandb import WandbRun
from deco_scale.observability.webhooks import AlertSender

logger = logging.getLogger(__name__)

LOG, CURVES = "log.txt", "curves.png"
PACKAGES = ("deco_scale", "data_pipeline", "checkpoints_tools", "launcher")


class RunLogger:
    """Writes on rank 0 and is silent elsewhere.

    While it is open, the packages' loggers go to the console and to ``log.txt``. wandb, Prometheus and alerts that
    do not work are warned of and do not stop training;
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
        self._step: int | None = None
        self._wandb: WandbRun | None = None
        self._prometheus: PrometheusExporter | None = None
        self._alerts: AlertSender | None = None
        self._open = ExitStack()
        if not active:
            # Every rank would repeat what rank 0 logs.
            self._open.enter_context(logged_to(logging.NullHandler()))
            return
        self._log, self._metrics, self._events = (
            self._open.enter_context(closing(JsonlWriter(folder / name))) for name in (LOG, METRICS, EVENTS)
        )
        console = console or Console()
        self._open.enter_context(logged_to(_Handler(console, self._log)))
        self._start_monitor(monitor or MonitorConfig())
        if wandb.mode != "disabled":
            self._wandb = self._open.enter_context(closing(WandbRun(folder, wandb, redacted(config))))
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, shown="")
        self._open.enter_context(self._progress)

    def _start_monitor(self, cfg: MonitorConfig) -> None:
        if cfg.webhook_env is not None:
            alerts = AlertSender(cfg.webhook_env, run=self._folder.resolve().name)
            self._alerts = self._open.enter_context(closing(alerts))
        if cfg.prometheus_port is None:
            return
        host, port = cfg.prometheus_host, cfg.prometheus_port
        try:
            exporter = PrometheusExporter(host=host, port=port, total_steps=self._total)
        except RunError as error:
            logger.warning("%s; training continues without them", error)
        else:
            self._prometheus = self._open.enter_context(closing(exporter))
            logger.info("Prometheus metrics: http://%s:%d/metrics", host, port)

    def start(self, **fields: Any) -> None:
        """The start of an attempt, numbered after those that the run's folder has."""
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
        if self._prometheus is not None:
            self._prometheus.log_event(event)
        self._events.write(event.line())

    def metrics(self, values: dict[str, Any]) -> None:
        if not self._active:
            return
        self._step = values["step"]
        values = self._write(values)
        parts = {part: values.get(f"loss_{part}") for part in ("flow", "freq", "repa")}
        losses = " ".join(f"{part} {loss:.4f}" for part, loss in parts.items() if loss is not None)
        shown = (
            f"loss {values['loss']:.4f} | {values['images_per_s']:.1f} images/s | "
            f"data wait {1000 * values['data_wait_s']:.0f} ms | norm {values['grad_norm']:.2f} | "
            f"lr {values['lr']:.3g} | {losses}"
        )
        if self._progress.disable:
            left = duration((self._total - values["step"]) * values["step_s"])
            logger.info("step %d/%d %s | ETA %s", values["step"], self._total, shown, left)
        else:
            self._progress.update(self._task, completed=values["step"], shown=shown)
            self._log.write(f"step {values['step']} {shown}\n")
        if self._wandb is not None:
            self._wandb.log(values["step"], {k: v for k, v in values.items() if isinstance(v, int | float)})

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Scores of an evaluation, as a line of its own with names that begin with ``eval.``."""
        if not self._active or not scores:
            return
        named = {f"eval.{name}": value for name, value in scores.items()}
        self._write({"step": step, **named})
        logger.info("step %d evaluation: %s", step, ", ".join(f"{n} {v:.4f}" for n, v in scores.items()))
        if self._wandb is not None:
            self._wandb.log(step, named)

    def image(self, name: str, path: Path, step: int) -> None:
        logger.info("%s: %s", name, path)
        if self._wandb is not None:
            self._wandb.image(step, name, path)

    def close(self) -> None:
        """Log where the time went, draw the curves, and end what runs."""
        with self._open:
            if not self._active:
                return
            run = RunDir(self._folder).refresh()
            self._log_goodput(run.goodput(time.time()))
            if not run.metrics:
                return
            try:
                save_curves_png(run.steps(), self._folder / CURVES)
            except OSError as error:
                logger.warning("no loss curves: %s: %s", error.filename or CURVES, error.strerror)
            else:
                logger.info("loss curves: %s", self._folder / CURVES)

    def _write(self, values: dict[str, Any]) -> dict[str, Any]:
        """A line of ``metrics.jsonl``; returns its redacted values."""
        line: dict[str, Any] = redacted_fields(values)
        self._metrics.write(json.dumps(line) + "\n")
        if self._prometheus is not None:
            self._prometheus.log_metrics(line)
        return line

    def _log_goodput(self, goodput: Goodput | None) -> None:
        """Where the run's time went, all attempts together; the last line of ``metrics.jsonl``."""
        if goodput is None:
            return
        self._write(goodput.as_metrics())
        parts = [f"{name} {goodput.seconds(name):.0f} s" for name in CLASSES if goodput.seconds(name) >= 0.5]
        where = f"{goodput.wall_s:.0f} s in {len(goodput.attempts)} attempt(s): {', '.join(parts)}"
        logger.info("%s; effective training time %.1f%%", where, 100 * goodput.effective)


class _Handler(logging.Handler):
    """Plain lines with the time, on the console and in ``log.txt``, scrubbed of secrets."""

    def __init__(self, console: Console, log: JsonlWriter) -> None:
        super().__init__(logging.INFO)
        self._console, self._log = console, log

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        line = f"{time.strftime('%H:%M:%S')} {level}{scrub(record.getMessage())}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._log.write(line + "\n")


@contextmanager
def logged_to(handler: logging.Handler) -> Iterator[None]:
    """Within, the loggers of the product's packages write to ``handler`` from INFO on."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(each.level, each.propagate) for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
        # A library may have given the root logger a handler, which would show each line again, on every rank.
        each.propagate = False
    try:
        yield
    finally:
        for each, (level, each.propagate) in zip(loggers, before, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)

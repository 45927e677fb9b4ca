"""A run's numbers as Prometheus metrics, served by rank 0 at ``/metrics``.

Names begin with ``deco_`` and end with their unit. Gauges hold what the last line of ``metrics.jsonl`` said;
``deco_events_total`` counts the events of this attempt.
"""

import threading
from collections.abc import Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from deco_scale.errors import RunError
from deco_scale.observability.events import FIELDS, Event, is_number

GAUGES = {
    "step": ("deco_step", "Updates attempted"),
    "samples": ("deco_samples", "Samples seen by the run"),
    "skipped": ("deco_skipped_steps", "Updates left out in this stage"),
    "grad_norm": ("deco_gradient_norm", "Global gradient norm before clipping"),
    "lr": ("deco_learning_rate", "Learning rate"),
    "images_per_s": ("deco_images_per_second", "Training images a second, all ranks"),
    "mfu": ("deco_model_flops_utilization_ratio", "Share of the accelerators' peak FLOP/s"),
    "step_s": ("deco_step_duration_seconds", "Mean time of a step"),
    "data_wait_s": ("deco_data_wait_seconds", "Mean time a step waited for data"),
    "memory_bytes": ("deco_memory_bytes", "Peak memory of rank 0's accelerator, or its resident set"),
    "checkpoint_stall_s": ("deco_checkpoint_stall_seconds", "Time training was held up by the last save"),
    "time": ("deco_last_log_timestamp_seconds", "Time of the last logged step"),
}
"""Keys of a logged step, with the name and help of their gauges."""
_LOSSES = {"loss": "total", "loss_flow": "flow", "loss_freq": "frequency", "loss_repa": "repa"}


class PrometheusExporter:
    """Serves on ``host``:``port`` until closed; raises :class:`RunError` where it cannot."""

    def __init__(self, *, host: str, port: int, total_steps: int) -> None:
        self._registry, gauge = CollectorRegistry(), self._gauge
        self._made: dict[str, Gauge] = {}
        self._loss = gauge("deco_loss", "Loss by part", "part")
        self._rank = gauge("deco_rank_step_duration_seconds", "Mean time of a step by rank", "rank")
        self._goodput = gauge("deco_goodput_seconds", "Wall clock by what it was spent on", "class")
        self._data = gauge("deco_data", "Counters of the data pipeline in this stage", "counter")
        self._scores = gauge("deco_evaluation", "Scores of the last evaluation", "score")
        self._events = Counter("deco_events", "Events of this attempt", ["kind"], registry=self._registry)
        for kind in FIELDS:
            self._events.labels(kind)  # a rate needs the zero before the first one
        gauge("deco_total_steps", "Steps of the whole run").set(total_steps)
        self._server: WSGIServer
        self._thread: threading.Thread
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise RunError(f"no Prometheus metrics on {host}:{port}: {reason}") from None

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``: a logged step, an evaluation, or where the time has gone."""
        for key, value in values.items():
            head, _, tail = key.partition(".")
            if key == "rank_step_s" and isinstance(value, list | tuple):
                for rank, seconds in enumerate(value):
                    self._rank.labels(str(rank)).set(seconds)
            elif not isinstance(value, int | float):
                continue
            elif key in _LOSSES:
                self._loss.labels(_LOSSES[key]).set(value)
            elif key in GAUGES:
                self._single(*GAUGES[key], value)
            elif key == "goodput.effective":
                self._single("deco_goodput_ratio", "Share of the wall clock spent on steps that count", value)
            elif head == "goodput":
                self._goodput.labels(tail.removesuffix("_s")).set(value)
            elif head == "data":
                self._data.labels(tail).set(value)
            elif head == "eval":
                self._scores.labels(tail).set(value)

    def log_event(self, event: Event) -> None:
        """Count it; a checkpoint's step and time are kept."""
        self._events.labels(event.kind).inc()
        if event.kind == "checkpoint" and is_number(event.fields["step"]):
            self._single("deco_last_checkpoint_step", "Step of the newest checkpoint", event.fields["step"])
            self._single("deco_last_checkpoint_timestamp_seconds", "When it was complete", event.time)

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)

    def _single(self, name: str, text: str, value: float) -> None:
        """A gauge is made with its first value: no value is not zero."""
        if name not in self._made:
            self._made[name] = self._gauge(name, text)
        self._made[name].set(value)

"""Prometheus metrics of a run, served by rank 0 at ``/metrics``.

Names begin with ``deco_`` and end with their unit. Gauges hold the values of the last line of ``metrics.jsonl``;
``deco_events_total`` counts the events of this attempt.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from deco_scale.errors import RunError
from deco_scale.observability.events import FIELDS, Event, is_number

GAUGES = {
    "step": ("deco_step", "Updates attempted"),
    "samples": ("deco_samples", "Samples seen by the run"),
    "skipped": ("deco_skipped_steps", "Updates skipped in this stage"),
    "grad_norm": ("deco_gradient_norm", "Global gradient norm before clipping"),
    "lr": ("deco_learning_rate", "Learning rate"),
    "images_per_s": ("deco_images_per_second", "Training images a second, all ranks"),
    "mfu": ("deco_model_flops_utilization_ratio", "Share of the accelerators' peak FLOP/s"),
    "step_s": ("deco_step_duration_seconds", "Mean time of a step"),
    "data_wait_s": ("deco_data_wait_seconds", "Mean time a step waited for data"),
    "memory_bytes": ("deco_memory_bytes", "Peak memory of rank 0's accelerator, or its resident set"),
    "checkpoint_stall_s": ("deco_checkpoint_stall_seconds", "Time training was blocked by the last save"),
    "goodput.effective": ("deco_goodput_ratio", "Share of the wall clock spent on steps that count"),
    "time": ("deco_last_log_timestamp_seconds", "Time of the last logged step"),
}
"""Keys of a logged step, with the name and help of their gauges."""
_GROUPS = {
    "goodput": ("deco_goodput_seconds", "Wall clock by what it was spent on", "class"),
    "data": ("deco_data", "Counters of the data pipeline in this stage", "counter"),
    "eval": ("deco_evaluation", "Scores of the last evaluation", "score"),
}
"""Metric, help and label of the keys that begin with the group's name and a dot."""
_LOSSES = {"loss": "total", "loss_flow": "flow", "loss_freq": "frequency", "loss_repa": "repa"}


class PrometheusExporter:
    """Serves on ``host``:``port`` until closed; raises :class:`RunError` where it cannot."""

    def __init__(self, *, host: str, port: int, total_steps: int) -> None:
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._events = Counter("deco_events", "Events of this attempt", ["kind"], registry=self._registry)
        for kind in FIELDS:
            self._events.labels(kind)  # a rate needs the zero before the first one
        self._set("deco_total_steps", "Steps of the whole run", total_steps)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise RunError(f"no Prometheus metrics on {host}:{port}: {reason}") from None

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Export one line of ``metrics.jsonl``: a logged step, an evaluation, or goodput."""
        for key, value in values.items():
            group, _, name = key.partition(".")
            if key == "rank_step_s" and isinstance(value, list | tuple):
                for rank, seconds in enumerate(value):
                    self._set("deco_rank_step_duration_seconds", "Mean time of a step by rank", seconds, rank=rank)
            elif not isinstance(value, int | float):
                continue
            elif key in _LOSSES:
                self._set("deco_loss", "Loss by part", value, part=_LOSSES[key])
            elif key in GAUGES:
                self._set(*GAUGES[key], value)
            elif group in _GROUPS:
                metric, text, label = _GROUPS[group]
                self._set(metric, text, value, **{label: name.removesuffix("_s") if group == "goodput" else name})

    def log_event(self, event: Event) -> None:
        """Count it; a checkpoint's step and time are exported."""
        self._events.labels(event.kind).inc()
        if event.kind == "checkpoint" and is_number(event.fields["step"]):
            self._set("deco_last_checkpoint_step", "Step of the newest checkpoint", event.fields["step"])
            self._set("deco_last_checkpoint_timestamp_seconds", "When it was complete", event.time)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, name: str, text: str, value: float, **labels: object) -> None:
        """Set a gauge, which is created with its first value: an unknown value is not zero."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, list(labels), registry=self._registry)
        (self._gauges[name].labels(**labels) if labels else self._gauges[name]).set(value)

"""Training curves of a run, for ``curves.png`` and the HTML report."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deco_scale.observability.events import is_number
from deco_scale.observability.redact import scrub

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#d97706", "#0891b2", "#be185d", "#6b7280")
_LOSSES = ("loss", "loss_flow", "loss_freq", "loss_repa")

Steps = Sequence[Mapping[str, Any]]


def save_curves_png(steps: Steps, path: Path) -> None:
    """Write the curves of logged steps as PNG; raises ``OSError``."""
    _draw(steps, (), ()).savefig(path, dpi=110)


def curves_svg(steps: Steps, *, fault_steps: Iterable[float], stage_ends: Iterable[float]) -> bytes:
    """The curves of logged steps as SVG, with dashed lines at faults and at the ends of stages."""
    import matplotlib

    target = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _draw(steps, fault_steps, stage_ends).savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def _draw(steps: Steps, fault_steps: Iterable[float], stage_ends: Iterable[float]) -> "Figure":
    """Losses, gradient norm, throughput, MFU, learning rate and step time over the step.

    ``steps`` are lines of ``metrics.jsonl`` in the order of their ``step``; values that are no finite number are
    left out, and on logarithmic axes those that are not positive.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for line in steps:
        by_stage.setdefault(str(line.get("stage")), []).append(line)
    panels: list[tuple[str, bool, Sequence[tuple[str, Steps, str]]]] = [
        ("loss, logarithmic", True, [(name, steps, name) for name in _LOSSES]),
        ("gradient norm, logarithmic", True, [("grad_norm", steps, "grad_norm")]),
        ("images/s", False, [("images_per_s", steps, "images_per_s")]),
        ("MFU", False, [("mfu", steps, "mfu")]),
        ("learning rate by stage", False, [("lr", lines, name) for name, lines in by_stage.items()][:8]),
        ("step time and data wait, seconds", False, [(name, steps, name) for name in ("step_s", "data_wait_s")]),
    ]
    for axes, (title, log, curves) in zip(figure.subplots(3, 2).flat, panels, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_prop_cycle(color=COLORS)
        for key, lines, label in curves:
            points = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
            points = [(x, y) for x, y in points if y > 0 or not log]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) == 1 else "",
                          label=_label(label))  # fmt: skip
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes, color="#666666")
            axes.set_axis_off()
            continue
        if log:
            axes.set_yscale("log")
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, loc="upper right")  # the best place is slow to find
        left, right = axes.get_xlim()
        for step in fault_steps if log else stage_ends:
            if left <= step <= right:
                axes.axvline(step, color="#999999", linewidth=1, linestyle=(0, (3, 3)))
        axes.grid(color="#eeeeee")
        axes.tick_params(which="both", labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _label(name: str) -> str:
    """The name as plain text: neither mathematics (``$``) nor hidden from the legend (a leading underscore)."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in scrub(name)[:40])
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")

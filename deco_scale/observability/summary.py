"""A run in a few lines of text, for ``deco watch`` and the head of ``deco report``."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from data_pipeline.text import duration
from data_pipeline.text import printable as without_control
from deco_scale.observability.events import Event, is_number
from deco_scale.observability.goodput import CLASSES, Goodput
from deco_scale.observability.redact import scrub
from deco_scale.observability.run_dir import RunDir

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Eighths of a block, for terminals that know Unicode."""
ASCII_BARS = "_.-=+*#@"

Row = tuple[str, str]


def sparkline(values: Sequence[object], *, width: int, bars: str = BARS) -> str:
    """The last ``width`` numbers as bars from their lowest to their highest; all low where they are equal.

    Empty where there are no numbers, or no ``bars``.
    """
    numbers = [value for value in values if is_number(value)][-width:]
    if not numbers or not bars:
        return ""
    low, high = min(numbers), max(numbers)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in numbers)


def printable(text: object, limit: int = 200) -> str:
    """The text without secrets and control characters, so that it can be shown on a terminal."""
    return without_control(scrub(str(text))[:limit])


def summary_rows(run: RunDir, *, now: float, bars: str = BARS) -> list[Row]:
    """Labels and values of what is known at ``now`` (Unix seconds)."""
    if not run.metrics and not run.events:
        return [("run", f"{run.path} has not started: no metrics.jsonl and no events.jsonl in it yet")]
    goodput, saved = run.goodput(now), run.checkpoint
    return [
        ("run", str(run.path)),
        ("state", _state(run, goodput, now)),
        *_training_rows(run, bars),
        ("checkpoint", f"step {saved[1]}, {duration(max(now - saved[0], 0))} ago" if saved else "none"),
        *_eta_rows(run),
        ("faults", _faults(run)),
        *([("bad samples", f"{run.quarantined} in quarantine.jsonl")] if run.quarantined else []),
        ("effective time", _effective(goodput) if goodput else "unknown: no start in events.jsonl"),
        *(("problem", printable(problem)) for problem in run.problems),
    ]


def _state(run: RunDir, goodput: Goodput | None, now: float) -> str:
    times = [event.time for event in run.events[-1:]]
    times += [run.last["time"]] if is_number(run.last.get("time")) else []
    ago = f"; last line written {duration(max(now - max(times), 0))} ago" if times else ""
    if goodput is None:
        return f"unknown{ago}"
    attempt = goodput.attempts[-1]
    state = "running" if attempt.running else "no sign of life"
    if attempt.reason is not None:
        state = f"ended: {printable(attempt.reason)} (exit code {attempt.exit_code})"
    return f"{state}, attempt {attempt.number} on {attempt.world_size} ranks{ago}"


def _training_rows(run: RunDir, bars: str) -> list[Row]:
    last = run.last
    if not last:
        return [("step", "none yet")]
    stages = run.stages
    total = f" of {stages[-1].end}" if stages else ""
    result = [("step", f"{last['step']}{total}, stage {printable(last.get('stage'))}")]
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("grad_norm", "gradient norm", "{:.3f}"),
        ("images_per_s", "images/s", "{:.1f}"),
    ):
        if is_number(value := last.get(name)):
            spark = sparkline([line.get(name) for line in run.metrics[-40:]], width=40, bars=bars)
            result.append((label, f"{form.format(value)}  {spark}".rstrip()))
        elif name in last:
            result.append((label, f"{printable(value)} (not finite)"))
    if is_number(mfu := last.get("mfu")):
        result.append(("MFU", f"{mfu:.1%}"))
    step_s, data_wait_s = last.get("step_s"), last.get("data_wait_s")
    if is_number(step_s):
        result.append(("step time", f"{step_s:.4g} s"))
        if is_number(data_wait_s) and step_s > 0:
            result.append(("data wait", f"{1000 * data_wait_s:.0f} ms a step, {data_wait_s / step_s:.1%}"))
    if is_number(memory := last.get("memory_bytes")):
        result.append(("memory", f"{memory / 2**30:.2f} GiB at its peak, rank 0"))
    if is_number(skipped := last.get("skipped")) and skipped:
        result.append(("skipped", f"{skipped} steps of this stage in this attempt"))
    times = last.get("rank_step_s")
    if isinstance(times, list) and times and all(is_number(time) for time in times):
        slowest, median = max(range(len(times)), key=times.__getitem__), statistics.median(times)
        text = f"rank {slowest} is slowest, {times[slowest]:.4g} s a step; median of {len(times)}: {median:.4g} s"
        result.append(("ranks", text))
    return result


def _eta_rows(run: RunDir) -> list[Row]:
    result, total = [], 0.0
    for stage, done, left in run.progress():
        text = "not timed yet" if left is None else f"{duration(left)} to go"
        steps = stage.end - stage.start
        result.append((f"ETA of {printable(stage.name, 40)}", f"{done} of {steps} steps, {text}"))
        total += math.nan if left is None else left
    if result:
        result.append(("ETA", "unknown before every stage is timed" if math.isnan(total) else duration(total)))
    return result


def _faults(run: RunDir) -> str:
    faults = run.faults
    if not faults:
        return "none"
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(e.kind for e in faults).items())
    return f"{counts}; the last: {describe(faults[-1])}"


def describe(event: Event) -> str:
    """An event's kind and fields in one line."""
    return printable(" ".join([event.kind, *(f"{name}={value}" for name, value in event.fields.items())]))


def _effective(goodput: Goodput) -> str:
    others = ", ".join(
        f"{name.replace('_', ' ')} {goodput.seconds(name) / goodput.wall_s:.1%}"
        for name in CLASSES
        if name != "step" and goodput.microseconds[name]
    )
    return f"{goodput.effective:.1%} of {duration(goodput.wall_s)}" + (f" ({others})" if others else "")

"""A run in a few lines of text: what ``deco watch`` shows and ``deco report`` begins with."""

import statistics
from collections import Counter
from collections.abc import Sequence

from deco_scale.watching.accounting import CLASSES, Accounting
from deco_scale.watching.events import Event, is_number
from deco_scale.watching.folder import RunFolder
from deco_scale.watching.redact import scrub
from deco_scale.watching.remaining import remaining, total_s

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Eighths of a block, for terminals that know Unicode."""
ASCII_BARS = "_.-=+*#@"

Row = tuple[str, str]


def sparkline(values: Sequence[object], *, width: int, bars: str = BARS) -> str:
    """The last ``width`` numbers as bars from their lowest to their highest; all low where they are equal.

    Empty where there are no numbers, or no ``bars``.
    """
    shown = [value for value in values if is_number(value)][-width:]
    if not shown or not bars:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in shown)


def duration(seconds: float) -> str:
    """Days, hours, minutes, seconds: the two largest that are not empty."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def printable(text: object, limit: int = 200) -> str:
    """One line without control characters and secrets: what a file says may be shown on a terminal."""
    line = scrub(str(text))[:limit]
    return "".join(c if c.isprintable() else "?" for c in line)


def rows(run: RunFolder, *, now: float, bars: str = BARS) -> list[Row]:
    """Labels and values, those of which something is known."""
    if not run.metrics and not run.events:
        return [("run", f"{run.folder} has not begun: no metrics.jsonl and no events.jsonl in it yet")]
    accounting = run.accounting(now)
    found = [("run", str(run.folder)), ("state", _state(run, accounting, now))]
    found += _training_rows(run, bars)
    found += _rank_row(run)
    saved = run.checkpoint
    found.append(
        ("checkpoint", f"step {saved.step}, {duration(max(now - saved.time, 0))} ago" if saved else "none")
    )
    found += _eta_rows(run)
    found.append(("faults", _faults(run)))
    if run.quarantined:
        found.append(("bad samples", f"{run.quarantined} in quarantine.jsonl"))
    if accounting is None:
        found.append(("effective time", "not known: no start in events.jsonl"))
    else:
        found.append(("effective time", _effective(accounting)))
    found += [("problem", printable(problem)) for problem in run.problems]
    return found


def _state(run: RunFolder, accounting: Accounting | None, now: float) -> str:
    signs = [event.time for event in run.events[-1:]]
    signs += [run.last["time"]] if is_number(run.last.get("time")) else []
    ago = f"; last sign of life {duration(max(now - max(signs), 0))} ago" if signs else ""
    if accounting is None:
        return f"not known{ago}"
    attempt = accounting.attempts[-1]
    where = f"attempt {attempt.number} on {attempt.world_size} ranks"
    if attempt.running:
        return f"running, {where}{ago}"
    if attempt.reason is None:
        return f"no sign of life, {where}{ago}"
    return f"ended: {printable(attempt.reason)} (exit code {attempt.exit_code}), {where}{ago}"


def _training_rows(run: RunFolder, bars: str) -> list[Row]:
    last, found = run.last, []
    if not last:
        return [("step", "none yet")]
    stages = run.stages
    total = f" of {stages[-1].end}" if stages else ""
    found.append(("step", f"{last['step']}{total}, stage {printable(last.get('stage'))}"))
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("grad_norm", "gradient norm", "{:.3f}"),
        ("images_per_s", "images/s", "{:.1f}"),
    ):
        if is_number(value := last.get(name)):
            spark = sparkline([line.get(name) for line in run.metrics[-40:]], width=40, bars=bars)
            found.append((label, f"{form.format(value)}  {spark}".rstrip()))
        elif name in last:
            found.append((label, f"{printable(value)} (not finite)"))
    if is_number(mfu := last.get("mfu")):
        found.append(("MFU", f"{mfu:.1%}"))
    step_s, waited = last.get("step_s"), last.get("data_wait_s")
    if is_number(step_s):
        found.append(("step time", f"{step_s:.4g} s"))
    if is_number(waited) and is_number(step_s) and step_s > 0:
        found.append(("data wait", f"{1000 * waited:.0f} ms a step, {waited / step_s:.1%}"))
    if is_number(memory := last.get("memory_bytes")):
        found.append(("memory", f"{memory / 2**30:.2f} GiB at its peak, rank 0"))
    if is_number(skipped := last.get("skipped")) and skipped:
        found.append(("skipped", f"{skipped} steps of this stage in this attempt"))
    return found


def _rank_row(run: RunFolder) -> list[Row]:
    times = run.last.get("rank_step_s")
    if not isinstance(times, list) or not times or not all(is_number(time) for time in times):
        return []
    slowest = max(range(len(times)), key=times.__getitem__)
    median = statistics.median(times)
    return [
        (
            "ranks",
            f"rank {slowest} is slowest, {times[slowest]:.4g} s a step; median of {len(times)}: {median:.4g} s",
        )
    ]


def _eta_rows(run: RunFolder) -> list[Row]:
    parts = remaining(run)
    found = [
        (
            f"ETA of {printable(part.stage.name, 40)}",
            f"{part.done} of {part.stage.end - part.stage.begin} steps, "
            + ("not timed yet" if part.seconds is None else f"{duration(part.seconds)} to go"),
        )
        for part in parts
    ]
    seconds = total_s(parts)
    if parts:
        found.append(("ETA", "not known before every stage is timed" if seconds is None else duration(seconds)))
    return found


def _faults(run: RunFolder) -> str:
    faults = run.faults
    if not faults:
        return "none"
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(e.kind for e in faults).items())
    return f"{counts}; the last: {told(faults[-1])}"


def told(event: Event) -> str:
    """An event's kind and fields in one line."""
    return printable(" ".join([event.kind, *(f"{name}={value}" for name, value in event.fields.items())]))


def _effective(accounting: Accounting) -> str:
    others = ", ".join(
        f"{name.replace('_', ' ')} {accounting.seconds(name) / accounting.wall_s:.1%}"
        for name in CLASSES
        if name != "step" and accounting.microseconds[name]
    )
    return f"{accounting.effective:.1%} of {duration(accounting.wall_s)}" + (f" ({others})" if others else "")

"""A run as one HTML page that loads nothing: curves, pictures, events, layout, settings, goodput, costs."""

import base64
import hashlib
import html
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from deco_scale.watching.accounting import CLASSES, Accounting
from deco_scale.watching.chart import COLOURS, Curve, line_chart, share_bar
from deco_scale.watching.events import is_fault, is_number
from deco_scale.watching.folder import RunFolder
from deco_scale.watching.redact import redacted, scrub
from deco_scale.watching.summary import duration, printable, rows, told

MAX_PICTURES, MAX_SIDE, MAX_PIXELS = 12, 480, 64_000_000
"""Pictures of a page, the longer side of each in pixels, and the pixels of a file that is still opened."""
MAX_EVENTS = 500
_MAX_CONFIG_CHARS = 200_000

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1160px;padding:0 16px;color:#111}
h1{font-size:22px}h2{font-size:17px;margin-top:32px;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:2px 10px 2px 0;text-align:left;vertical-align:top}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:12px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:10px}
figure{margin:0}img{max-width:100%}pre{background:#f6f6f6;padding:10px;overflow-x:auto}
td.n{text-align:right}tr.fault{color:#b91c1c}svg{width:100%;height:auto}
"""


def page(run: RunFolder, *, now: float, usd_per_gpu_hour: float | None) -> str:
    """The whole page; everything that files say is escaped, and secrets by their form are taken out.

    The policy in its head allows pictures within the page and this style sheet, nothing else.
    """
    accounting = run.accounting(now)
    title = html.escape(f"Run {printable(run.folder.name or run.folder)}")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    sections = [
        ("Summary", _table(rows(run, now=now, bars=""))),
        ("Curves", _curves(run)),
        ("Where the time went", _goodput(accounting)),
        ("Costs", _costs(accounting, usd_per_gpu_hour)),
        ("Pictures", _pictures(run.pictures())),
        ("Layout and attempts", _attempts(run, accounting)),
        ("Events", _events(run)),
        ("Configuration", _config(run.config)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><meta name="referrer" content="no-referrer">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1><p>as of {when}</p>{body}</body></html>\n"
    )


def _table(lines: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>" if head else ""
    cells = (
        "<tr>" + "".join(f"<td>{html.escape(scrub(str(value)))}</td>" for value in line) + "</tr>"
        for line in lines
    )
    return f"<table>{top}{''.join(cells)}</table>"


def _curves(run: RunFolder) -> str:
    steps = run.steps()
    faults = [e.fields["step"] for e in run.faults if is_number(e.fields.get("step"))]
    ends = [stage.end for stage in run.stages[:-1]]

    def curve(name: str, lines: Sequence[Mapping[str, Any]] = steps, label: str = "") -> Curve:
        points = [(float(line["step"]), float(line[name])) for line in lines if is_number(line.get(name))]
        return Curve(label or name, points)

    losses = [name for name in ("loss", "loss_flow", "loss_freq", "loss_repa") if curve(name).points]
    stages = list(dict.fromkeys(str(line.get("stage")) for line in steps))[: len(COLOURS)]
    by_stage = [
        curve("lr", [line for line in steps if str(line.get("stage")) == stage], printable(stage, 40))
        for stage in stages
    ]
    charts = [
        line_chart("loss, logarithmic", [curve(name) for name in losses], log=True, marks=faults),
        line_chart("gradient norm, logarithmic", [curve("grad_norm")], log=True, marks=faults),
        line_chart("images/s", [curve("images_per_s")], marks=ends),
        line_chart("MFU", [curve("mfu")], marks=ends),
        line_chart("learning rate by stage", by_stage, marks=ends),
        line_chart(
            "seconds a step, and of them waiting for data", [curve("step_s"), curve("data_wait_s")], marks=ends
        ),
    ]
    return (
        f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'
        "<p>Over the step, as each was last done. Dashed: faults (first two), or ends of stages.</p>"
    )


def _goodput(accounting: Accounting | None) -> str:
    if accounting is None or not accounting.wall_us:
        return "<p>Not known: events.jsonl has no start, or no time has passed since.</p>"
    shares = [(name.replace("_", " "), accounting.microseconds[name] / accounting.wall_us) for name in CLASSES]
    lines = "".join(
        f'<tr><td><svg viewBox="0 0 10 10" width="10" height="10"><rect width="10" height="10" fill="{colour}"/>'
        f'</svg></td><td>{name}</td><td class="n">{accounting.seconds(key):,.1f} s</td>'
        f'<td class="n">{share:.2%}</td></tr>'
        for (name, share), key, colour in zip(shares, CLASSES, COLOURS, strict=True)
    )
    return (
        f"<p>Effective training time: {accounting.effective:.2%} of {duration(accounting.wall_s)} since the first "
        f"start, {len(accounting.attempts)} attempts.</p>{share_bar(shares)}"
        f'<table>{lines}<tr><td></td><td>sum</td><td class="n">{accounting.wall_s:,.1f} s</td></tr></table>'
    )


def gpu_hours(accounting: Accounting) -> tuple[float, float]:
    """Rank-hours of the attempts' lives, and with the time down before each next start on as many ranks."""
    lives = sum(a.world_size * (a.last_sign - a.began) for a in accounting.attempts) / 3600
    begins = [a.began for a in accounting.attempts]
    ends = [*begins[1:], begins[0] + accounting.wall_s]
    held = sum(a.world_size * (end - a.began) for a, end in zip(accounting.attempts, ends, strict=True)) / 3600
    return lives, held


def _costs(accounting: Accounting | None, usd: float | None) -> str:
    if accounting is None:
        return "<p>Not known: events.jsonl has no start.</p>"
    lines = []
    for name, hours in zip(("while attempts lived", "time down included"), gpu_hours(accounting), strict=True):
        money = [f"{hours * usd:,.2f} USD at {usd:g} a GPU-hour"] if usd is not None else []
        lines.append([name, f"{hours:,.3f} GPU-hours", *money])
    return _table(lines) + "<p>One rank is counted as one GPU.</p>"


def _pictures(found: Sequence[tuple[int, Path]]) -> str:
    if not found:
        return "<p>None in samples/.</p>"
    count = min(MAX_PICTURES, len(found))
    chosen = [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = "".join(
        f"<figure>{_thumbnail(path)}<figcaption>step {step}</figcaption></figure>" for step, path in chosen
    )
    return f'<p>{count} of {len(found)}, evenly over time.</p><div class="pictures">{figures}</div>'


def _thumbnail(path: Path) -> str:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                return f"<p>too large: {picture.width} x {picture.height} pixels</p>"
            small = picture.convert("RGB")
        small.thumbnail((MAX_SIDE, MAX_SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"<p>cannot be read: {html.escape(printable(type(error).__name__))}</p>"
    target = io.BytesIO()
    small.save(target, "JPEG", quality=85)
    data = base64.b64encode(target.getvalue()).decode()
    name = html.escape(printable(path.name), quote=True)
    return f'<img alt="{name}" width="{small.width}" height="{small.height}" src="data:image/jpeg;base64,{data}">'


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "?"


def _attempts(run: RunFolder, accounting: Accounting | None) -> str:
    if accounting is None:
        return "<p>Not known: events.jsonl has no start.</p>"
    starts = [event for event in run.events if event.kind == "start"]
    lines = []
    for attempt, start in zip(accounting.attempts, starts, strict=True):
        hosts = start.fields["hosts"]
        lines.append(
            [
                attempt.number,
                _clock(attempt.began),
                duration(max(attempt.last_sign - attempt.began, 0)),
                attempt.world_size,
                printable(", ".join(f"{name} {value}" for name, value in start.fields["layout"].items())),
                printable(f"{len(hosts)}: {', '.join(map(str, hosts))}", 120),
                "-" if attempt.to_step is None else f"{attempt.from_step} to {attempt.to_step}",
                "running" if attempt.running else printable(attempt.reason or "no end was written"),
            ]
        )
    return _table(lines, ("attempt", "began (UTC)", "lived", "ranks", "layout", "hosts", "steps", "end"))


def _events(run: RunFolder) -> str:
    if not run.events:
        return "<p>None in events.jsonl.</p>"
    shown = run.events[-MAX_EVENTS:]
    lines = "".join(
        f"<tr{' class=fault' if is_fault(event) else ''}><td>{_clock(event.time)}</td>"
        f"<td>{html.escape(told(event))}</td></tr>"
        for event in shown
    )
    aside = f"<p>The last {MAX_EVENTS} of {len(run.events)}.</p>" if len(shown) < len(run.events) else ""
    return f"{aside}<table><tr><th>time (UTC)</th><th>event</th></tr>{lines}</table>"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return "<p>No config.yaml that could be read.</p>"
    text = yaml.safe_dump(redacted(config), sort_keys=False, width=100)
    return f"<pre>{html.escape(scrub(text)[:_MAX_CONFIG_CHARS])}</pre>"

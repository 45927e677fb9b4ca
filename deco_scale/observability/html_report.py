"""A run as one HTML page that loads nothing: curves, images, events, layout, configuration, goodput, costs.

The page is ``report.html.j2``, which escapes everything.
"""

import base64
import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from data_pipeline.text import duration
from deco_scale.observability.curves import COLORS, curves_svg
from deco_scale.observability.events import is_fault, is_number
from deco_scale.observability.goodput import CLASSES, Goodput
from deco_scale.observability.redact import redacted, scrub
from deco_scale.observability.run_dir import RunDir
from deco_scale.observability.summary import describe, printable, summary_rows
from deco_scale.yaml import dump_yaml

MAX_IMAGES, MAX_SIDE, MAX_PIXELS = 12, 480, 64_000_000
"""Images of a page, the longer side of each in pixels, and the pixels of a file that is still opened."""
MAX_EVENTS = 500
_MAX_CONFIG_CHARS = 200_000


def render_report(run: RunDir, *, now: float, usd_per_gpu_hour: float | None) -> str:
    """The page as of ``now`` (Unix seconds), without secrets.

    Its content security policy allows images within the page and its own style sheet, nothing else.
    """
    goodput, images = run.goodput(now), run.sample_images()
    count = min(MAX_IMAGES, len(images))
    evenly = [images[round(i * (len(images) - 1) / max(count - 1, 1))] for i in range(count)]
    starts = [event.fields for event in run.events if event.kind == "start"]
    return _environment().get_template("report.html.j2").render(
        name=printable(run.path.name or run.path),
        now=now,
        summary=summary_rows(run, now=now, bars=""),
        curves=curves_svg(
            run.steps(),
            fault_steps=[e.fields["step"] for e in run.faults if is_number(e.fields.get("step"))],
            stage_ends=[stage.end for stage in run.stages[:-1]],
        ),
        goodput=goodput,
        shares=list(_shares(goodput)) if goodput is not None and goodput.wall_us else [],
        hours=gpu_hours(goodput) if goodput is not None else [],
        usd_per_gpu_hour=usd_per_gpu_hour,
        images=[(step, path, _thumbnail(path)) for step, path in evenly],
        num_images=len(images),
        attempts=list(zip(goodput.attempts, starts, strict=True)) if goodput is not None else [],
        events=run.events[-MAX_EVENTS:],
        num_events=len(run.events),
        config=dump_yaml(redacted(run.config))[:_MAX_CONFIG_CHARS] if run.config else "",
    )  # fmt: skip


def gpu_hours(goodput: Goodput) -> list[tuple[str, float]]:
    """Rank-hours of the attempts' lives, and with the downtime before each next start on as many ranks."""
    active = sum(a.world_size * (a.last_active - a.start) for a in goodput.attempts) / 3600
    ends = [*(a.start for a in goodput.attempts[1:]), goodput.attempts[0].start + goodput.wall_s]
    allocated = sum(a.world_size * (end - a.start) for a, end in zip(goodput.attempts, ends, strict=True)) / 3600
    return [("while attempts ran", active), ("including downtime", allocated)]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: scrub(value) if type(value) is str else value,
    )
    environment.filters |= {
        "base64": lambda data: Markup(base64.b64encode(data).decode()),
        "describe": describe,
        "duration": duration,
        "is_fault": is_fault,
        "printable": printable,
        "sha256": lambda text: Markup(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()),
        "utc": _utc,
    }
    return environment


def _shares(goodput: Goodput) -> Iterator[dict[str, Any]]:
    """Name, color, seconds, share of the wall clock and the sum of the shares before, of each class."""
    offset = 0.0
    for name, color in zip(CLASSES, COLORS, strict=True):
        value = goodput.microseconds[name] / goodput.wall_us
        yield {"name": name.replace("_", " "), "color": color, "seconds": goodput.seconds(name), "value": value,
               "offset": offset}  # fmt: skip
        offset += value


def _thumbnail(path: Path) -> bytes | str:
    """A small JPEG of the image, or why there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"too large: {image.width} x {image.height} pixels"
            small = image.convert("RGB")
        small.thumbnail((MAX_SIDE, MAX_SIDE))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be read: {type(error).__name__}"
    target = io.BytesIO()
    small.save(target, "JPEG", quality=85)
    return target.getvalue()


def _utc(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "?"

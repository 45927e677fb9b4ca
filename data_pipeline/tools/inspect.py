"""What an index and its images look like: numbers, histograms, and a sheet of samples with their captions.

Everything is counted in slices of the columns: 100 million samples need no more memory than one million.
"""

import functools
import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.captions import parse_captions, parse_label
from data_pipeline.decode import PILLOW_PIXELS, DecodeError, decode
from data_pipeline.errors import DataError
from data_pipeline.index.build import MAX_SAMPLE_BYTES
from data_pipeline.index.format import BLOCK, IS_JSON, IS_LABEL, SCORE, Index, read_sample
from data_pipeline.storage.base import Store
from data_pipeline.stream.sampler import generator
from data_pipeline.text import human_bytes

Counts = np.ndarray[Any, np.dtype[np.int64]]

_SLICE = 4 * 2**20
_MAX_16, _MAX_BLOCKS = 1 << 16, MAX_SAMPLE_BYTES // BLOCK
_BINS = 60
_MAX_ASPECT_LOG2 = 3.0
_ASPECT_EDGES = np.linspace(-_MAX_ASPECT_LOG2, _MAX_ASPECT_LOG2, _BINS + 1)
_ASPECT_TICKS = {
    "1:8": -3, "1:4": -2, "1:2": -1, "2:3": -0.585, "1:1": 0, "3:2": 0.585, "2:1": 1, "4:1": 2, "8:1": 3,
}  # fmt: skip
_SHEET_KEY = 8
MAX_SAMPLES = 600
"""On a contact sheet: more make an image that few programs open."""
_COLUMNS, _TILE, _GAP, _LINES, _TEXT = 6, 256, 18, 5, 12
_INK, _GREY, _PAPER, _FRAME = "#1a1a1a", "#777777", "#ffffff", "#ececec"
_BLUE = "#3b6fb6"


@dataclass(frozen=True)
class Summary:
    """Counts over an index: ``sides``, ``chars`` and ``sizes`` (in blocks) by value, ``aspects`` by bin.

    ``kinds`` are those of text; ``wide`` images are wider than 3:2, ``tall`` ones taller than 2:3.
    """

    sides: Counts
    chars: Counts
    sizes: Counts
    aspects: Counts
    kinds: dict[str, int]
    captions: int
    wide: int
    tall: int


def summarise(index: Index) -> Summary:
    """One pass over the columns."""
    sides, chars = np.zeros(_MAX_16, np.int64), np.zeros(_MAX_16, np.int64)
    sizes, aspects = np.zeros(_MAX_BLOCKS + 1, np.int64), np.zeros(_BINS, np.int64)
    kinds: Counter[str] = Counter(txt=0, json=0, label=0)
    captions, wide, tall = 0, 0, 0
    for part in _slices(index):
        height, width, flags = part("height"), part("width"), part("flags")
        sides += np.bincount(np.minimum(height, width), minlength=_MAX_16)
        # In 64 bits, where three sides do not overflow.
        high, across = height.astype(np.int64), width.astype(np.int64)
        wide, tall = wide + int((2 * across > 3 * high).sum()), tall + int((2 * high > 3 * across).sum())
        labels = (flags & IS_LABEL) != 0
        chars += np.bincount(part("caption_chars")[~labels], minlength=_MAX_16)
        sizes += np.bincount(np.minimum(part("length"), _MAX_BLOCKS), minlength=_MAX_BLOCKS + 1)
        ratio = np.log2(np.maximum(width, 1) / np.maximum(height, 1))
        aspects += np.histogram(ratio.clip(-_MAX_ASPECT_LOG2, _MAX_ASPECT_LOG2), _ASPECT_EDGES)[0]
        kinds["label"] += int(labels.sum())
        kinds["json"] += int(((flags & IS_JSON) != 0).sum())
        captions += int(part("num_captions").sum(dtype=np.int64))
    kinds["txt"] = len(index) - kinds["json"] - kinds["label"]
    return Summary(sides, chars, sizes, aspects, dict(kinds), captions, wide, tall)


def quantile(counts: Counts, share: float) -> int:
    """Smallest value that at least ``share`` of the counted ones do not exceed; 0 where nothing was counted."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, max(1, math.ceil(share * int(ends[-1]))))) if ends[-1] else 0


def problem_kind(problem: str) -> str:
    """The kind that a problem of the scan names, else its text without numbers."""
    _, _, reason = problem.partition(": ")
    kind = re.match(r".+?: ([a-z_]+): ", reason)
    return kind[1] if kind else re.sub(r"\d+", "N", reason)[:60]


def facts(index: Index, summary: Summary, resolutions: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Quantities and their values, as ``inspect`` shows them."""
    total = sum(shard.size for shard in index.shards)
    yield "digest", index.digest
    yield "shards", f"{len(index.shards):,}"
    yield "samples", f"{len(index):,}"
    yield "bytes", f"{total:,} ({human_bytes(total)})"
    for share in (0, 0.05, 0.5, 0.95, 1):
        yield f"short side, {share:.0%} quantile", f"{quantile(summary.sides, share):,} px"
    for resolution in resolutions:
        usable = int(summary.sides[resolution:].sum())
        yield f"usable at {resolution} px", f"{usable:,} ({usable / len(index):.1%})"
    yield "wider than 3:2, taller than 2:3", f"{summary.wide:,}, {summary.tall:,}"
    yield "text: txt, json, label", ", ".join(f"{summary.kinds[kind]:,}" for kind in ("txt", "json", "label"))
    if summary.captions:
        yield "captions", f"{summary.captions:,}"
        for share in (0.05, 0.5, 0.95, 1):
            yield f"longest caption, {share:.0%} quantile", f"{quantile(summary.chars, share):,} characters"
    for name in index.score_names:
        lowest, highest, count = score_range(index, name)
        yield f"score {name}", f"{lowest:.4g} to {highest:.4g} in {count:,} samples" if count else "in no sample"
    kinds = Counter(map(problem_kind, index.problems))
    yield "problems", f"{kinds.total():,}"
    for kind, count in kinds.most_common(8):
        yield f"  {kind}", f"{count:,}"


def score_range(index: Index, name: str) -> tuple[float, float, int]:
    """Lowest and highest number of a score, and how many samples have one; (nan, nan, 0) where none has."""
    parts = [(float(v.min()), float(v.max()), len(v)) for v in _finite(index, name) if len(v)]
    if not parts:
        return math.nan, math.nan, 0
    lowest, highest, counts = zip(*parts, strict=True)
    return min(lowest), max(highest), sum(counts)


def _finite(index: Index, name: str) -> Iterator[Any]:
    """A score's numbers, slice by slice, without those that samples lack."""
    for part in _slices(index):
        values = part(SCORE + name)
        yield values[np.isfinite(values)]


def draw_histograms(index: Index, summary: Summary, path: Path) -> None:
    """Short side, aspect ratio, caption length, bytes of a sample, and each score, as a PNG."""
    from matplotlib.figure import Figure

    scores = index.score_names
    rows = -(-(4 + len(scores)) // 2)
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained")
    figure.suptitle(f"{len(index):,} samples in {len(index.shards):,} shards, digest {index.digest}", fontsize=12)
    short_side, aspect, caption, size, *others = figure.subplots(rows, 2, squeeze=False).flat
    _by_value(short_side, summary.sides, "short side", "pixels")
    _bars(aspect, summary.aspects, _ASPECT_EDGES, "aspect ratio", "width : height")
    aspect.set_xticks(list(_ASPECT_TICKS.values()), list(_ASPECT_TICKS))
    aspect.set_xlim(-_MAX_ASPECT_LOG2, _MAX_ASPECT_LOG2)
    _by_value(caption, summary.chars, "longest caption", "characters")
    _sizes(size, summary)
    for axis, name in itertools.zip_longest(others, scores):
        if name is None:
            axis.set_axis_off()
        else:
            _score(axis, index, name)
    figure.savefig(path, dpi=110)


def _by_value(axis: Any, counts: Counts, title: str, unit: str) -> None:
    """Up to the 99.9% quantile; the title counts the rest."""
    first, last = quantile(counts, 0), quantile(counts, 0.999)
    step = max(1, -(-(last - first + 1) // _BINS))
    edges = np.arange(first, last + step + 1, step)
    heights = np.histogram(np.arange(len(counts)), edges, weights=counts)[0]
    beyond = int(counts.sum() - heights.sum())
    more = f" ({beyond:,} longer)" if beyond else ""
    _bars(axis, heights, edges, f"{title}: median {quantile(counts, 0.5):,}{more}", unit)


def _sizes(axis: Any, summary: Summary) -> None:
    """Bins of equal ratio between the smallest and the largest."""
    from matplotlib.ticker import LogLocator

    blocks = np.flatnonzero(summary.sizes)
    first, last = int(blocks[0]), int(blocks[-1])
    edges = np.geomspace(first, last + 1, min(_BINS, last - first + 1) + 1)
    heights = np.histogram(blocks, edges, weights=summary.sizes[blocks])[0]
    _bars(axis, heights, edges * BLOCK, "size of a sample", "bytes")
    if edges[-1] > 4 * edges[0]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axis.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axis.xaxis.set_minor_formatter(lambda value, _: "")


def _score(axis: Any, index: Index, name: str) -> None:
    lowest, highest, count = score_range(index, name)
    if not count:
        axis.set_title(f"{name}: no sample has it")
        axis.set_axis_off()
        return
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1, _BINS + 1)
    heights = sum(np.histogram(values, edges)[0] for values in _finite(index, name))
    without = f" ({len(index) - count:,} without)" if count < len(index) else ""
    _bars(axis, heights, edges, f"score {name}{without}", name)


def _bars(axis: Any, heights: Any, edges: Any, title: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.stairs(heights, edges, fill=True, color=_BLUE)
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(label)
    axis.set_ylabel("samples")
    axis.set_ylim(0, max(1, int(np.max(heights, initial=0))) * 1.05)
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)


def draw_contact_sheet(store: Store, index: Index, path: Path, *, samples: int, resolution: int) -> list[str]:
    """The same samples every time, as training sees them at ``resolution``; smaller ones at their own size.

    Returns what could not be shown, by name.
    """
    import matplotlib

    count = min(samples, MAX_SAMPLES, len(index))
    chosen = np.sort(generator(0, _SHEET_KEY).choice(len(index), size=count, replace=False))
    # Of equal characters, so that lines can be counted in them; matplotlib brings it along.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf", _TEXT)
    width, line = int(_TILE / font.getlength("x")), _TEXT + 4
    across = min(_COLUMNS, max(1, count))
    pitch_x, pitch_y = _TILE + _GAP, _TILE + (1 + _LINES) * line + _GAP
    down = -(-count // across)
    sheet = Image.new("RGB", (across * pitch_x + _GAP, down * pitch_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    problems: list[str] = []
    for number, sample in enumerate(int(s) for s in chosen):
        left, top = _GAP + number % across * pitch_x, _GAP + number // across * pitch_y
        draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), fill=_FRAME)
        note = f"{index.column('width', sample, sample + 1)[0]} x {index.column('height', sample, sample + 1)[0]}"
        try:
            image, captions = _load(store, index, sample, resolution)
            sheet.paste(image, (left + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))
            note += f", {len(captions)} captions" if len(captions) > 1 else ""
            shown = captions if len(captions) == 1 else tuple(f"- {caption}" for caption in captions)
        except (DataError, DecodeError) as error:
            problems.append(f"sample {sample}: {error}")
            shown = (f"cannot be shown: {error}",)
        draw.text((left, top + _TILE + 4), f"#{sample}  {note}", _GREY, font)
        for row, words in enumerate(_wrap(shown, width, _LINES), start=1):
            draw.text((left, top + _TILE + 4 + row * line), words, _INK, font)
    sheet.save(path)
    return problems


def _load(store: Store, index: Index, sample: int, resolution: int) -> tuple[Image.Image, tuple[str, ...]]:
    location = index.locate(sample)
    raw = read_sample(store, index, location)
    side = min(resolution, *(int(index.column(n, sample, sample + 1)[0]) for n in ("height", "width")))
    image = Image.fromarray(decode(raw[location.image], (side, side), mode="exact", max_pixels=PILLOW_PIXELS))
    if side > _TILE:
        image = image.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    if location.is_label:
        return image, (f"class {parse_label(raw[location.text])}",)
    fields = index.header["scan"]["caption_fields"]
    return image, parse_captions(raw[location.text], is_json=location.is_json, fields=fields).texts


def _wrap(texts: Sequence[str], width: int, lines: int) -> list[str]:
    """At most so many lines of ``width`` characters; longer words are broken, a text cut short gets dots."""
    # What no sheet has room for need not be wrapped.
    words = ("".join(c if c.isprintable() else " " for c in text[:2000]) for text in texts[: lines + 1])
    rows = [row for text in words for row in textwrap.wrap(text, width)]
    return rows if len(rows) <= lines else [*rows[: lines - 1], f"{rows[lines - 1][: width - 3].rstrip()}..."]


def _slices(index: Index) -> Iterator[Callable[[str], Any]]:
    """For each slice of the index, what gives its part of a column."""
    for first in range(0, len(index), _SLICE):
        last = min(first + _SLICE, len(index))
        yield functools.partial(index.column, first=first, last=last)

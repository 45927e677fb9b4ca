"""Curves and bars as SVG text, without scripts, styles or anything from outside."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#d97706", "#0891b2", "#be185d", "#6b7280")
WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 30, 30
_POINTS = 600
_LARGEST = 1e300
"""Beyond it the span of an axis would be no float; nan is below nothing, and left out as well."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A name and its (x, y) points by rising x; points beyond 1e300 and those that are not finite are left out."""

    name: str
    points: Points


def thinned(points: Points, limit: int = _POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points: of each of equal groups the lowest and the highest, so that peaks stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ends = {min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def line_chart(title: str, curves: Sequence[Curve], *, log: bool = False, marks: Sequence[float] = ()) -> str:
    """An SVG of curves over the step; ``log`` leaves out what is not positive; ``marks`` are upright lines."""
    shown = []
    for curve in curves:
        points = [
            (x, y) for x, y in curve.points if abs(x) < _LARGEST and abs(y) < _LARGEST and (y > 0 or not log)
        ]
        if points:
            scaled = [(x, math.log10(y)) for x, y in points] if log else points
            shown.append(Curve(curve.name, thinned(scaled)))
    head = _head(title)
    if not shown:
        return f'{head}<text x="{_LEFT}" y="{HEIGHT / 2}" fill="#666">nothing was logged</text></svg>'
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [y for curve in shown for _, y in curve.points]
    left, right = min(xs), max(xs)
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = 0.0 if 0 <= low <= pad and not log else low - pad, high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) if right > left else 0.5
        up = (y - low) / (high - low)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [head, _axes(place, (left, right), (low, high), log=log)]
    for x in marks:
        if left <= x <= right:
            at = place(x, low)[0]
            parts.append(
                f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{HEIGHT - _BOTTOM}" stroke="#999" '
                'stroke-dasharray="3 3"/>'
            )
    for number, curve in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve.points))
        if len(curve.points) == 1:
            x, y = place(*curve.points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
        else:
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        if len(shown) > 1:
            parts.append(
                f'<text x="{WIDTH - _RIGHT - 4}" y="{_TOP + 12 + 14 * number}" text-anchor="end" '
                f'fill="{colour}">{html.escape(curve.name)}</text>'
            )
    return "".join(parts) + "</svg>"


def share_bar(shares: Sequence[tuple[str, float]]) -> str:
    """One bar of parts that add up to 1, in the order given, with each part's name and share as its tooltip."""
    parts, at = [f'<svg viewBox="0 0 {2 * WIDTH} 34" role="img" aria-label="shares of the wall clock">'], 0.0
    for number, (name, share) in enumerate(shares):
        width = share * 2 * WIDTH
        label = html.escape(f"{name} {share:.1%}")
        parts.append(
            f'<rect x="{at:.2f}" y="0" width="{width:.2f}" height="34" fill="{COLOURS[number % len(COLOURS)]}">'
            f"<title>{label}</title></rect>"
        )
        at += width
    return "".join(parts) + "</svg>"


def _head(title: str) -> str:
    name = html.escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" font-family="sans-serif" '
        f'font-size="11"><text x="{_LEFT}" y="18" font-size="13" font-weight="bold">{name}</text>'
    )


def _axes(
    place: Callable[[float, float], tuple[float, float]],
    across: tuple[float, float],
    up: tuple[float, float],
    *,
    log: bool,
) -> str:
    parts = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" height="{HEIGHT - _TOP - _BOTTOM}" '
        'fill="none" stroke="#bbb"/>'
    ]
    for i in range(5):
        value = up[0] + (up[1] - up[0]) * i / 4
        y = place(across[0], value)[1]
        told = _power(value) if log else f"{value:.4g}"
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#444">{told}</text>')
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#eee"/>'
            if 0 < i < 4
            else ""
        )
    for i in range(3):
        value = across[0] + (across[1] - across[0]) * i / 2
        x = place(value, up[0])[0]
        anchor = ("start", "middle", "end")[i]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}" fill="#444">{value:,.0f}</text>')
    return "".join(parts)


def _power(exponent: float) -> str:
    # Far beyond any loss a float's power would overflow.
    return f"{10**exponent:.3g}" if abs(exponent) < 300 else f"1e{exponent:.0f}"

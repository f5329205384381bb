"""A line chart as inline SVG. page.js adds the hover; without it the picture is whole.

A library would have to be vendored, or weighs more than the page may: vega and its like take a megabyte of script, and
most of them build code from strings, which the page's content security policy forbids.
"""

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

#: The picture in its own units, its margins, and the points of a line at most.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 205, 46, 10, 10, 34
MOST = 300


class Line(NamedTuple):
    """A named line through points (x, y), in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def chart(title: str, lines: Sequence[Line], across: str, percent: bool = False, log: bool = False) -> str:
    """An <svg> of some lines, of which one has a point at least; across: what x counts, in the plural."""
    lines = [Line(line.name, _thinned(line.points)) for line in lines if line.points]
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    log = log and min(ys) > 0
    up: Callable[[float], float] = math.log10 if log else float
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 5), _log_ticks(min(ys), max(ys)) if log else _ticks(min(ys), max(ys), 4)
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = min(up(min(ys)), up(y_ticks[0])), max(up(max(ys)), up(y_ticks[-1]))
    high = high if high > low else low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (up(y) - low) / (high - low) * (HEIGHT - BOTTOM - TOP),
        )

    drawn = []
    for tick in y_ticks:
        _, y = place(left, tick)
        drawn.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{said(tick, percent)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, max(ys))
        anchor = "end" if x > WIDTH - 30 else "middle"
        drawn.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{count(tick)}</text>')
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(across)}</text>')
    for number, line in enumerate(lines):
        placed = [place(*point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        drawn.append(f'<polyline class="line l{number}" points="{path}"/>')
        if len(placed) < 20:
            drawn += [f'<circle class="dot l{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
    data = [
        {"name": line.name, "x": [x for x, _ in line.points], "y": [_short(y, percent) for _, y in line.points]}
        for line in lines
    ]
    told = f"{title}, by {across}: " + "; ".join(
        f"{line.name} from {said(line.points[0][1], percent)} at {count(line.points[0][0])} to "
        f"{said(line.points[-1][1], percent)} at {count(line.points[-1][0])}"
        for line in lines
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(told)}" '
        f'data-across="{escape(across)}" data-unit="{"%" if percent else ""}" data-lines="{escape(json.dumps(data))}">'
        f'{"".join(drawn)}<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}"/></svg>'
    )


def said(value: float, percent: bool) -> str:
    """A value for people."""
    return f"{100 * value:.4g} %" if percent else f"{value:.3g}"


def count(value: float) -> str:
    """A number of steps or queries, in few letters."""
    for least, letter in ((1e6, "M"), (1e4, "k")):
        if value >= least:
            return f"{value / (1e3 if letter == 'k' else 1e6):.4g}{letter}"
    return f"{value:,.0f}"


def _short(value: float, percent: bool) -> float:
    return float(f"{100 * value if percent else value:.5g}")


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = math.ceil(len(points) / MOST)
    return points[(len(points) - 1) % every :: every]  # the last one stays


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below low to above high, for y; those within, where there are enough, for x."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within, and their multiples where there are fewer than three."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**i for i in range(first, last + 1) for m in multiples if low <= m * 10.0**i <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 5)]
    return [low, high]

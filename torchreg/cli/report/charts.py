"""Charts as inline SVG, whose colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 26
HUGE, ROUNDING = 1e290, 1e-9
"""What is larger is drawn at this size; what differs by less is drawn as equal."""
SPACE = 34
"""Between the first mark of the steps and the next, in pixels."""
MOST_POINTS, LEAST_POINTS, MOST_IN_ALL = 300, 60, 12_000
"""Of a line, and of all lines of a chart."""
LOG_RATIO = 50.0
"""Positive values that span more than this are drawn on a logarithmic axis, where that is allowed."""

Point = tuple[int, float]


@dataclass(frozen=True)
class Line:
    """A curve, the class that gives it its colour, and what is said when the pointer rests on it."""

    points: Sequence[Point]
    style: str
    label: str


def line_chart(lines: Sequence[Line], *, log: bool = False, percent: bool = False, zero: bool = False) -> str:
    """Curves over the step. Values that are not finite make gaps.

    Args:
        lines: the curves.
        log: whether the axis may be logarithmic.
        percent: values are fractions; the axis goes from 0 to 100 %.
        zero: the axis begins at 0, for counts.

    >>> chart = line_chart([Line([(0, 1.0), (10, 2.0)], "c0", "a<b")])
    >>> chart.startswith("<svg"), "a&lt;b" in chart
    (True, True)
    """
    lines = [Line([(s, _tamed(v)) for s, v in line.points], line.style, line.label) for line in lines]
    finite = [v for line in lines for _, v in line.points if math.isfinite(v)]
    steps = [s for line in lines for s, _ in line.points]
    least, most = (min(finite), max(finite)) if finite else (0.0, 1.0)
    least = min(least, 0.0) if zero else least
    scale = "percent" if percent and least >= 0 and most <= 1 else "linear"
    if log and least > 0 and most / least > LOG_RATIO:
        scale = "log"
    first, last = min(steps, default=0), max(steps, default=1)
    most_each = max(LEAST_POINTS, min(MOST_POINTS, MOST_IN_ALL // max(1, len(lines))))
    low, high, ticks = _axis(least, most, scale)

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        place = math.log10(value) if scale == "log" else value
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (place - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_label(lines)}">']
    for value, text in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{text}</text>')
    spaced = [step for step in _nice(first, last) if x(int(step)) - LEFT > SPACE]
    for step in [first, *spaced]:
        anchor = "start" if step == first else "middle"
        parts.append(
            f'<text class="tick" x="{x(int(step)):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_si(step)}</text>'
        )
    for line in lines:
        parts.append(f'<g class="{line.style}"><title>{html.escape(line.label)}</title>')
        for piece in _pieces(thinned(line.points, most_each)):
            corners = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in piece)
            if len(piece) == 1:
                place = corners.split(",")
                parts.append(f'<circle class="dot" cx="{place[0]}" cy="{place[1]}" r="3"/>')
            else:
                parts.append(f'<polyline class="line" points="{corners}"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def bars(least: float, limits: Sequence[float], counts: Sequence[float], style: str, label: str) -> str:
    """A histogram: bins up to each limit, the first from ``least``, as high as the root of what is in them."""
    edges = [least, *limits]
    known = [(a, b, c) for a, b, c in zip(edges, edges[1:], counts, strict=False) if c > 0 and b > a]
    known = [(a, b, c) for a, b, c in known if all(abs(v) < HUGE for v in (a, b, c))]  # NaN isn't
    if not known:
        return ""
    low, high, top = min(k[0] for k in known), max(k[1] for k in known), math.sqrt(max(k[2] for k in known))
    wide, high_px = WIDTH - 20, 100
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {high_px + 26}" role="img" aria-label="{html.escape(label)}"><g class="{style}">'
    ]
    for a, b, c in known:
        tall = high_px * math.sqrt(c) / top
        left, width = 10 + wide * (a - low) / (high - low), wide * (b - a) / (high - low)
        parts.append(
            f'<rect x="{left:.1f}" y="{high_px - tall:.1f}" width="{max(width, 0.5):.1f}" height="{tall:.1f}"/>'
        )
    parts.append("</g>")
    for value, place, anchor in ((low, 10, "start"), (high, WIDTH - 10, "end")):
        parts.append(f'<text class="tick" x="{place}" y="{high_px + 18}" text-anchor="{anchor}">{value:.3g}</text>')
    if low < 0 < high:
        zero = 10 + wide * -low / (high - low)
        parts.append(f'<text class="tick" x="{zero:.1f}" y="{high_px + 18}" text-anchor="middle">0</text>')
    return "".join([*parts, "</svg>"])


def _tamed(value: float) -> float:
    return max(-HUGE, min(HUGE, value)) if math.isfinite(value) else value


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """At most about so many points: the least and the greatest of half as many pieces, so that no spike is lost.

    >>> len(thinned([(i, float(i == 500)) for i in range(1000)])) <= 300
    True
    >>> max(v for _, v in thinned([(i, float(i == 500)) for i in range(1000)]))
    1.0
    """
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        broken = [p for p in piece if not math.isfinite(p[1])]
        finite = [p for p in piece if math.isfinite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted({*ends, *broken[:1]})
    return kept


def _pieces(points: Sequence[Point]) -> list[list[Point]]:
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _axis(least: float, most: float, scale: str) -> tuple[float, float, list[tuple[float, str]]]:
    """Both ends of the axis, in decades for a logarithmic one, and its marks."""
    if scale == "percent":
        return 0.0, 1.0, [(k / 4, f"{25 * k} %") for k in range(5)]
    if scale == "log":
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
        every = max(1, -(-(last - first) // 5))
        return first, last, [(10.0**k, f"1e{k}") for k in range(first, last + 1, every) if -308 < k < 309]
    size = max(abs(least), abs(most))
    if most - least <= ROUNDING * size or size < 1 / HUGE:  # nothing between them that could be marked
        pad = size / 2 if size >= 1 / HUGE else 0.5
        least, most = least - pad, most + pad
    marks = _nice(least, most)
    gap = marks[1] - marks[0] if len(marks) > 1 else most - least
    low, high = min(least, marks[0] if marks else least), max(most, marks[-1] if marks else most)
    digits = max(0, -math.floor(math.log10(gap))) if gap < 1 else 0
    exponent = max(abs(low), abs(high)) >= 1e5 or digits > 5
    return low, high, [(v, f"{v:.3g}" if exponent else f"{v:.{digits}f}") for v in marks]


def _nice(low: float, high: float) -> list[float]:
    """Round numbers in between, four to eight of them.

    >>> _nice(0, 600)
    [0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0]
    """
    if not high > low:
        return [float(low)]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.8)
    begin, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(begin, min(end, begin + 20) + 1)]


def _si(step: float) -> str:
    """A step with a suffix for thousands and millions.

    >>> _si(1500), _si(200)
    ('1.5 k', '200')
    """
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(step) >= size:
            return f"{step / size:.4g}{suffix}"
    return f"{step:.4g}"


def _label(lines: Sequence[Line]) -> str:
    return html.escape(f"{len(lines)} curve{'s' * (len(lines) != 1)}: " + "; ".join(line.label for line in lines[:20]))

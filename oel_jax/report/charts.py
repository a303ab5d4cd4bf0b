"""Line charts as inline SVG: fixed size in its own units, colours by CSS class, no scripts.

Every name that is drawn is escaped here, so callers pass plain text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250  # a phone shows this about one to one, so that labels stay readable
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 40
COLOURS = 6  # classes c0 .. c5 of page.css


@dataclass(frozen=True)
class Point:
    """A value at x, with the ends of its interval where there is one; `note` is a tooltip."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A curve; `dashed` tells it from another one of the same colour, `dots` marks its points."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """Range and ticks (value, text) of one axis."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


def percent_axis(label: str) -> Axis:
    """0 to 100 %, for fractions."""
    return Axis(label, 0.0, 1.0, [(part / 4, f"{part * 25} %") for part in range(5)])


def value_axis(label: str, values: Sequence[float], zero: bool = True) -> Axis:
    """An axis with round ticks that covers the values; from 0 unless `zero` is off."""
    low = min([*values, 0.0] if zero else values, default=0.0)
    high = max(values, default=1.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [(i * step, f"{i * step:,.{digits}f}") for i in range(first, last + 1)]
    return Axis(label, first * step, last * step, ticks)


def count_axis(label: str, low: int, high: int, names: dict[int, str] | None = None) -> Axis:
    """Whole numbers, at most about eight ticks; `names` gives some of them another text."""
    step = max(1, math.ceil(_round_step((high - low) / 8)))
    ticks = [(value, (names or {}).get(value, str(value))) for value in range(low, high + 1, step)]
    return Axis(label, low - 0.25, max(high, low + 1) + 0.25, ticks)


def _round_step(size: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `size`."""
    if size <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= size * (1 - 1e-9))


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    levels: Sequence[tuple[str, float]] = (),
    dividers: Sequence[float] = (),
) -> str:
    """A figure with title, curves and legend; '' if there is no point to draw.

    Args:
      levels: (name, y) of horizontal lines, e.g. the random policy.
      dividers: x of vertical lines, e.g. between rounds.
    """
    shown = [line for line in series if line.points]
    if not shown:
        return ""

    def at(value: float, axis: Axis, start: float, end: float) -> float:
        return round(start + (value - axis.low) / (axis.high - axis.low) * (end - start), 2)

    def across(value: float) -> float:
        return at(value, x, _LEFT, WIDTH - _RIGHT)

    def up(value: float) -> float:
        return at(value, y, HEIGHT - _BOTTOM, _TOP)

    parts = _frame(x, y, across, up)
    for value in dividers:
        place = across(value)
        parts.append(
            f'<line class="divider" x1="{place}" x2="{place}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        )
    for number, (_, value) in enumerate(levels):
        parts.append(
            f'<line class="level l{number}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" '
            f'y1="{up(value)}" y2="{up(value)}"/>'
        )
    for line in shown:
        parts.append(_curve(line, across, up))
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{_legend(shown, levels)}</figure>"
    )


def _frame(x: Axis, y: Axis, across, up) -> list[str]:
    """Grid, ticks and the names of the axes."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value, text in y.ticks:
        place = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{place + 4}">{escape(text)}</text>')
    for value, text in x.ticks:
        place = across(value)
        parts.append(
            f'<line class="tick" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(f'<text class="middle" x="{place}" y="{bottom + 17}">{escape(text)}</text>')
    parts.append(f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    label = escape(x.label)
    parts.append(f'<text class="middle name" x="{middle}" y="{HEIGHT - 6}">{label}</text>')
    return parts


def _curve(line: Series, across, up) -> str:
    """Intervals, the line, and its points with tooltips."""
    parts = []
    for point in line.points:
        if point.low is not None and point.high is not None:
            place, low, high = across(point.x), up(point.low), up(point.high)
            parts.append(
                f'<path class="interval" d="M{place} {low}V{high}M{place - 4} {low}h8'
                f'M{place - 4} {high}h8"/>'
            )
    path = "L".join(f"{across(p.x)} {up(p.y)}" for p in line.points)
    parts.append(f'<path class="line" d="M{path}"/>')
    for point in line.points if line.dots else ():
        tip = f"<title>{escape(point.note)}</title>" if point.note else ""
        parts.append(f'<circle cx="{across(point.x)}" cy="{up(point.y)}" r="3.5">{tip}</circle>')
    dashed = " dashed" if line.dashed else ""
    return f'<g class="c{line.colour % COLOURS}{dashed}">{"".join(parts)}</g>'


def _legend(series: Sequence[Series], levels: Sequence[tuple[str, float]]) -> str:
    """Names below the picture, where long ones can wrap."""
    entries = [
        (f"c{line.colour % COLOURS}{' dashed' if line.dashed else ''}", "line", line.name)
        for line in series
    ] + [("", f"level l{number}", name) for number, (name, _) in enumerate(levels)]
    items = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><g class="{group}">'
        f'<path class="{kind}" d="M0 4H24"/></g></svg>{escape(name)}</li>'
        for group, kind, name in entries
    )
    return f'<ul class="legend">{items}</ul>'

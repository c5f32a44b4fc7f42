"""Plots as inline SVG, from the standard library alone; equal data give equal text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

__all__ = ["COLOURS", "Series", "bar_chart", "plot", "thin", "ticks"]

COLOURS = ("#2f6fb0", "#d9822b", "#3f9142", "#8c4fa3", "#b3261e", "#52606d")

_WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 30, 44
_BAR, _GAP = 26, 14


@dataclass(frozen=True)
class Series:
    """Points of a plot.

    Attributes:
        name: For the legend.
        points: (x, y), finite.
        style: "line" joins them, "steps" holds each value until the next, "dots" shows them alone.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["line", "steps", "dots"] = "line"


def plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[str, float]] = (),
    from_zero: bool = True,
    height: int = 240,
) -> str:
    """Draw series over one pair of axes.

    Args:
        series: One or more, with one point or more each.
        title: What a reader of the page hears of it.
        x_label: With the unit.
        y_label: With the unit.
        marks: Vertical lines: a name, and x.
        from_zero: Whether the vertical axis begins at 0.
        height: In pixels; the width is 760.
    """
    xs = [x for one in series for x, _ in one.points] + [x for _, x in marks]
    ys = [y for one in series for _, y in one.points] + ([0.0] if from_zero else [])
    x_axis = _Axis(*_range(xs), _LEFT, _WIDTH - _RIGHT)
    low, high = _range(ys)
    low = low if from_zero else low - (high - low) / 20
    y_axis = _Axis(low, high, height - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, height, x_label, y_label)]
    for i, one in enumerate(series):
        parts.append(_drawn(one, x_axis, y_axis, COLOURS[i % len(COLOURS)]))
    parts.append(_marked(sorted(marks, key=lambda mark: mark[1]), x_axis, height - _BOTTOM))
    if len(series) > 1:
        parts.append(_legend([one.name for one in series]))
    return _svg(height, title, parts)


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    *,
    title: str,
    x_label: str,
) -> str:
    """Draw a horizontal bar for each row, made of one part for each name.

    Args:
        rows: A label, and the parts' lengths, 0 or more.
        names: Of the parts, for the legend.
        title: What a reader of the page hears of it.
        x_label: With the unit.
    """
    height = _TOP + len(rows) * (_BAR + _GAP) + _BOTTOM
    left = _LEFT + 46
    axis = _Axis(*_range([0.0, *(math.fsum(values) for _, values in rows)]), left, _WIDTH - _RIGHT)
    parts = [_legend(names)]
    for tick in ticks(axis.low, axis.high):
        at = axis(tick)
        parts.append(
            f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{height - _BOTTOM}" stroke="#e4e9ee"/>'
            + _text(at, height - _BOTTOM + 16, f"{tick:g}", "middle")
        )
    for row, (label, values) in enumerate(rows):
        y, begin = _TOP + _GAP / 2 + row * (_BAR + _GAP), 0.0
        parts.append(_text(left - 8, y + _BAR / 2 + 4, label, "end"))
        for i, value in enumerate(values):
            width = round(axis(begin + value) - axis(begin), 2)
            parts.append(
                f'<rect x="{axis(begin)}" y="{y}" width="{width}" height="{_BAR}" '
                f'fill="{COLOURS[i % len(COLOURS)]}"/>'
            )
            begin += value
    parts.append(_text((left + _WIDTH) / 2, height - 8, x_label, "middle"))
    return _svg(height, title, parts)


def thin(points: Sequence[tuple[float, float]], *, limit: int) -> list[tuple[float, float]]:
    """Keep about `limit` points: of each stretch the lowest and the highest, so no peak is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for begin in range(0, len(points), size):
        stretch = points[begin : begin + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 3 to 11 of them, in [low, high], in steps of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    """Values low to high, drawn from pixel begin to pixel end."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 2)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the greatest, with a margin above; never empty."""
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    return low, high + (high - low) / 20


def _grid(x_axis: _Axis, y_axis: _Axis, height: int, x_label: str, y_label: str) -> str:
    bottom, right = height - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in ticks(y_axis.low, y_axis.high):
        y = y_axis(tick)
        parts.append(
            f'<line x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#e4e9ee"/>'
            + _text(_LEFT - 6, y + 4, f"{tick:g}", "end")
        )
    for tick in ticks(x_axis.low, x_axis.high):
        x = x_axis(tick)
        parts.append(
            f'<line x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 4}" stroke="#9aa5b1"/>'
            + _text(x, bottom + 16, f"{tick:g}", "middle")
        )
    parts.append(
        f'<line x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#9aa5b1"/>'
        + _text((_LEFT + right) / 2, height - 8, x_label, "middle")
        + _text(_LEFT - 50, 12, y_label, "start")
    )
    return "".join(parts)


def _drawn(series: Series, x_axis: _Axis, y_axis: _Axis, colour: str) -> str:
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    if series.style == "dots" or len(places) == 1:
        return "".join(
            f'<circle cx="{x}" cy="{y}" r="1.8" fill="{colour}" fill-opacity=".55"/>'
            for x, y in places
        )
    path = f"M{places[0][0]} {places[0][1]}" + "".join(
        f"H{x}V{y}" if series.style == "steps" else f"L{x} {y}" for x, y in places[1:]
    )
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _marked(marks: Sequence[tuple[str, float]], axis: _Axis, bottom: float) -> str:
    """Vertical lines in order; where two are close, the second name stands a line higher."""
    parts, line, last = [], 0, -math.inf
    for name, x in marks:
        at = axis(x)
        line = line + 1 if at - last < 8 * len(name) else 0
        last = at
        parts.append(
            f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}" stroke="#52606d" '
            f'stroke-dasharray="3 3"/>{_text(at + 3, bottom - 6 - 14 * line, name, "start")}'
        )
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    """Above the plot, from the right; a letter is about 7 pixels wide."""
    parts, x = [], float(_WIDTH - _RIGHT)
    for i, name in reversed(list(enumerate(names))):
        x -= 7 * len(name) + 26
        parts.append(
            f'<rect x="{x}" y="5" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>'
            + _text(x + 14, 14, name, "start")
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: Literal["start", "middle", "end"]) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" font-size="12" fill="#1f2933" '
        f'font-family="system-ui, sans-serif"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )

"""Charts as inline SVG, coloured by the style of the page: lines with errors, steps over intervals, marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from undiffuse.report.html import Markup, element, join

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 14, 44
"""Margins of the axes, in units of the drawing."""
MAX_POINTS = 400
"""Points of a line, at most; longer ones are drawn by the means of equal parts."""
LEGEND_LINE = 19


class Line(NamedTuple):
    """Points (x, y) with standard ``errors``, or for ``stairs`` the edges x (N + 1,) of intervals with values y (N,).

    A ``name`` is shown in the legend. A ``faint`` line is thin, a ``dashed`` one interrupted; ``dots`` mark the points.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    errors: Sequence[float] | np.ndarray = ()
    stairs: bool = False
    faint: bool = False
    dashed: bool = False
    dots: bool = False
    colour: int = 0


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Markup:
    """An image of ``lines`` on common axes, of which that of y is logarithmic if ``log``.

    ``low`` and ``high`` are values that the y axis includes. ``title`` is the text for screen readers.
    """
    lines = [_finite(_thinned(line), log) for line in lines]
    lines = [line for line in lines if len(line.y)]
    legend = [line for line in lines if line.name]
    top = TOP + LEGEND_LINE * (len(legend) if len(legend) > 1 else 0)
    xs = np.concatenate([line.x for line in lines])
    ys = np.concatenate([*(_reach(line, log) for line in lines), [v for v in (low, high) if v is not None]])
    x_low, x_high = _range(xs.min(), xs.max(), 0)
    y_low, y_high = float(ys.min()), float(ys.max())
    y_low, y_high = _range(math.log10(y_low), math.log10(y_high), 0.05) if log else _range(y_low, y_high, 0.05)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - ((math.log10(y) if log else y) - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - top)

    parts = [element("title", title)]
    for y in _log_ticks(y_low, y_high) if log else ticks(y_low, y_high, 5):
        parts.append(_segment("grid", LEFT, at_y(y), WIDTH - RIGHT, at_y(y)))
        parts.append(_label(LEFT - 7, at_y(y) + 4.5, number(y), "end"))
    for x in ticks(x_low, x_high, 5):
        parts.append(_segment("axis", at_x(x), HEIGHT - BOTTOM, at_x(x), HEIGHT - BOTTOM + 4))
        parts.append(_label(at_x(x), HEIGHT - BOTTOM + 18, number(x), "middle"))
    parts.append(_segment("axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))
    parts += [_drawn(line, at_x, at_y) for line in lines]
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    middle = (top + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 13 {middle:.1f})"
    parts.append(element("text", y_label, x=13, y=f"{middle:.1f}", text_anchor="middle", transform=turned))
    for row, line in enumerate(legend if len(legend) > 1 else ()):
        height = TOP + LEGEND_LINE * row
        mark = _segment(f"s{line.colour} line{' dashed' * line.dashed}", LEFT, height, LEFT + 22, height)
        parts += [mark, _label(LEFT + 29, height + 4.5, line.name, "start")]
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor, most in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10.1)) if rough <= most * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number beside a tick: 1,000,000 as 1M, 2,500 as 2,500, with a proper minus."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.4g}{letter}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [10^low, 10^high], or where these are few also 2 and 5 times them, else multiples."""
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    marks = [factor * 10.0**power for power in powers for factor in factors]
    marks = [float(f"{mark:.12g}") for mark in marks if low <= math.log10(mark) <= high]
    marks = marks if len(marks) >= 2 else [mark for mark in ticks(10**low, 10**high, 4) if mark > 0]
    return marks[:: math.ceil(len(marks) / 8)]


def _range(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):  # a single value
        half = max(abs(low) / 10, 0.5)
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _thinned(line: Line) -> Line:
    x, y, errors = (np.asarray(values, np.float64) for values in (line.x, line.y, line.errors))
    if line.stairs or len(y) <= MAX_POINTS:
        return line._replace(x=x, y=y, errors=errors)
    parts = [np.array_split(values, MAX_POINTS) if len(values) else () for values in (x, y, errors)]
    x, y, errors = (np.array([part.mean() for part in each]) for each in parts)
    return line._replace(x=x, y=y, errors=errors)


def _finite(line: Line, log: bool) -> Line:
    if line.stairs:
        whole = np.isfinite(line.x).all() and np.isfinite(line.y).all() and len(line.y)
        return line if whole else line._replace(x=np.empty(0), y=np.empty(0))
    keep = np.isfinite(line.x) & np.isfinite(line.y) & ((np.asarray(line.y) > 0) | (not log))
    errors = np.where(np.isfinite(line.errors), line.errors, 0)[keep] if len(line.errors) else line.errors
    return line._replace(x=np.asarray(line.x)[keep], y=np.asarray(line.y)[keep], errors=errors)


def _reach(line: Line, log: bool) -> np.ndarray:
    """All values that the y axis has to include."""
    y = np.asarray(line.y)
    if line.stairs:
        return np.append(y, 0.0)
    if log or not len(line.errors):
        return y
    return np.concatenate([y - line.errors, y + line.errors])


def _drawn(line: Line, at_x, at_y) -> Markup:
    kind = f"s{line.colour}"
    if line.stairs:
        corners = [(x, y) for i, y in enumerate(line.y) for x in line.x[i : i + 2]]
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in corners)
        below = f"L{at_x(line.x[-1]):.1f} {at_y(0):.1f}L{at_x(line.x[0]):.1f} {at_y(0):.1f}Z"
        area = None if line.dashed else element("path", d=f"M{path}{below}", class_=f"{kind} area")
        return join(area, element("path", d=f"M{path}", class_=f"{kind} line{' dashed' * line.dashed}"))
    points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    parts = []
    if len(line.errors):
        for x, y, error in zip(line.x, line.y, line.errors, strict=True):
            if error > 0:
                parts.append(_segment(f"{kind} error", at_x(x), at_y(y - error), at_x(x), at_y(y + error)))
    if len(points) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        words = f"{kind} line{' faint' * line.faint}{' dashed' * line.dashed}"
        parts.append(element("path", d=f"M{path}", class_=words))
    if line.dots or len(points) == 1:
        parts += [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"{kind} dot") for x, y in points]
    return join(*parts)


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return element("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=kind)


def _label(x: float, y: float, words: str, anchor: str) -> Markup:
    return element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)

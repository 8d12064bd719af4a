"""Items that are no pictures: points, tables and series, plotted by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from undiffuse.report.axes import COLOURS, new_figure, point_mark, render, style_axes, whole_ticks

MAX_COLUMNS = 6  # of a table that are plotted against each other, or channels of a series


def scatter(points: np.ndarray, names: Sequence[str] = ("", "")) -> Image.Image:
    """Points (N, 2) in the plane, with the ``names`` of their two columns on the axes."""
    figure = new_figure(5, 5)
    axes = style_axes(figure.subplots(), *map(_short, names))
    size = float(np.clip(8000 / len(points), 3, 20))
    axes.scatter(*points.T, s=size, color=COLOURS[0], alpha=0.5, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    for axis, values in zip((axes.xaxis, axes.yaxis), points.T, strict=True):
        whole_ticks(axis, values)
    return render(figure)


def pairs(points: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The first six columns of (N, D), titled by ``names``: against each other, with histograms on the diagonal."""
    points = points[:, :MAX_COLUMNS]
    n = points.shape[1]
    figure = new_figure(max(4, 1.6 * n), max(3, 1.5 * n))
    panels: Any = figure.subplots(n, n, sharex="col", squeeze=False)
    for i, j in np.ndindex(n, n):
        axes = style_axes(panels[i, j], "", "")
        axes.tick_params(labelsize=7)
        if i < j:
            axes.set_axis_off()
        elif i == j:
            low, high = float(points[:, i].min()), float(points[:, i].max())
            pad = max(0.5, 1e-6 * abs(low)) * (low == high)  # numpy has no bins for a range without a length
            bins = min(50, 1 + math.ceil(2 * len(points) ** 0.5))
            axes.hist(points[:, i], bins=bins, range=(low - pad, high + pad), color=COLOURS[0])
            whole_ticks(axes.xaxis, points[:, j], 4)
            axes.set_yticks([])
        else:
            axes.scatter(points[:, j], points[:, i], s=3, color=COLOURS[0], alpha=0.5, linewidths=0)
            for axis, values in ((axes.xaxis, points[:, j]), (axes.yaxis, points[:, i])):
                whole_ticks(axis, values, 4)
        if i == n - 1:
            axes.set_xlabel(_short(str(names[j])) if names else str(j), fontsize=8)
        if i > j == 0:
            axes.set_ylabel(_short(str(names[i])) if names else str(i), fontsize=8)
    return render(figure)


def lines(signals: np.ndarray, columns: int | None, names: Sequence[str], titles: Sequence[str] = ()) -> Image.Image:
    """Series (N, C, L) in rows of ``columns`` items, with an axis for each of the first six channels.

    The limits of a channel, titled by ``names``, are the same in all rows. ``titles`` stand above the columns.
    """
    n, channels, length = signals.shape
    columns, channels = columns or min(4, math.ceil(math.sqrt(n))), min(channels, MAX_COLUMNS)
    rows, width = -(-n // columns), 1.08 * length  # a gap between items
    figure = new_figure(2 * columns + 0.5, max(1.4, 0.8 * channels) * rows)
    panels = figure.subplots(rows * channels, 1, sharex=True, squeeze=False).flat
    for (row, channel), axes in zip(np.ndindex(rows, channels), panels, strict=True):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False, labelsize=6)
        low, high = signals[:, channel].min(), signals[:, channel].max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
        whole_ticks(axes.yaxis, signals[:, channel], 3)
        if channel < len(names):
            axes.set_ylabel(_short(str(names[channel])), fontsize=6)
        for column, signal in enumerate(signals[row * columns : (row + 1) * columns, channel]):
            axes.plot(
                np.arange(length) + width * column,
                signal,
                color=COLOURS[channel],
                linewidth=1.2,
                marker=point_mark(signal),
            )
        axes.set_xlim(-0.04 * width, width * columns)
        for column, title in enumerate(titles if row == channel == 0 else ()):
            place = (width * column + length / 2, 1.05)
            axes.text(*place, title, fontsize=7, ha="center", transform=axes.get_xaxis_transform())
    return render(figure)


def _short(name: str) -> str:
    return (name if len(name) <= 16 else name[:15] + "…").replace("$", r"\$")

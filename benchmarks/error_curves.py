"""The figure of ``benchmarks/choosing``: errors of samplers by the number of network calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from undiffuse.report.axes import COLOURS, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":")


def error_by_calls(
    curves: Mapping[str, Sequence[tuple[int, float, float]]], floors: Mapping[str, float], measure: str
) -> Figure:
    """A figure of a ``measure`` of samplers against network calls, both axes logarithmic.

    ``curves`` maps a name to points (network calls, measure, standard error); points that are not above 0 are omitted.
    ``floors`` maps a name to a measure, drawn as a horizontal line.
    """
    figure = new_figure(7.6, 4.6)
    axes = style_axes(figure.subplots(), "network calls a sample", measure)
    for i, (name, points) in enumerate((name, points) for name, points in curves.items() if points):
        calls, values, errors = zip(*points, strict=True)
        shown = [v if v > 0 else math.nan for v in values]
        mark = {"marker": "o", "markersize": 3} if len(calls) > 1 else {"marker": "*", "markersize": 11}
        (line,) = axes.plot(calls, shown, label=name, color=COLOURS[i % len(COLOURS)], **mark)
        line.set_linestyle(STYLES[i // len(COLOURS) % len(STYLES)])
        axes.errorbar(calls, shown, errors, fmt="none", ecolor=line.get_color(), elinewidth=0.7, alpha=0.7)
    for name, value in floors.items():
        axes.axhline(value, color="0.5", linewidth=0.8)
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({calls for points in curves.values() for calls, *_ in points})
    axes.set_xticks(ticks, [f"{calls:,}" for calls in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure

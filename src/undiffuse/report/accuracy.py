"""A picture of what a classifier still sees in the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from undiffuse.report.pictures import COLOURS, _figure, _tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """A figure of the ``accuracy`` with its ``stderr`` over ``log_snr``, from noise to data."""
    figure = _figure(6.4, 3.2)
    axes = _tidy(figure.subplots(), "noise  ←  log SNR  →  data", "held-out accuracy")
    at, share, stderr = ([row[name] for row in rows] for name in ("log_snr", "accuracy", "stderr"))
    axes.errorbar(at, share, stderr, color=COLOURS[0], marker="o", markersize=4, linewidth=1.6, capsize=2)
    axes.set_ylim(0, 1.02)
    return figure

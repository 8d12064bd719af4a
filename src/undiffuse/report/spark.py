"""A curve as one line of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BARS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], width: int = 40) -> str:
    """At most ``width`` bars from the least value to the greatest: means of equal parts; blank where none is finite."""
    each = np.asarray(values, np.float64)
    if not len(each):
        return ""
    parts = [part[np.isfinite(part)] for part in np.array_split(each, min(width, len(each)))]
    means = np.array([part.mean() if len(part) else np.nan for part in parts])
    if not np.isfinite(means).any():
        return " " * len(means)
    low, high = np.nanmin(means), np.nanmax(means)
    height = (means - low) / (high - low) if high > low else np.zeros_like(means)
    return "".join(" " if np.isnan(h) else BARS[min(int(h * len(BARS)), len(BARS) - 1)] for h in height)

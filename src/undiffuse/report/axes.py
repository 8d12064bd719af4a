"""What all figures of matplotlib share: size, style, colours, ticks.

matplotlib is imported when a figure is made, and never through pyplot, so that no global state changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # [Okabe08], safe for the colour-blind


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches. Raises `ConfigError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        cause = "figures need matplotlib, which is not installed"
        raise ConfigError("MISSING", "matplotlib", cause, "Run: pip install 'undiffuse[report]'") from missing
    return Figure((width, height), dpi=150, layout="constrained")


def style_axes(axes: Axes, x: str, y: str) -> Axes:
    """``axes`` in the style of all figures, labelled ``x`` and ``y``."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    return axes


def point_mark(values: Sequence[float] | np.ndarray) -> str:
    """The mark of a line's points: none, unless it is a single point, which would not be seen."""
    return "o" if len(values) == 1 else ""


def whole_ticks(axis: Axis, values: np.ndarray, most: int | None = None) -> None:
    """Ticks at whole numbers where all ``values`` are whole, ``most`` intervals of them if given."""
    from matplotlib.ticker import MaxNLocator

    whole = bool((values == np.round(values)).all())
    least = 1 if whole else 2  # with 2, a range without two whole numbers gets others
    bins = "auto" if most is None else most
    axis.set_major_locator(MaxNLocator(bins, integer=whole, min_n_ticks=least, steps=[1, 2, 2.5, 5, 10]))


def render(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

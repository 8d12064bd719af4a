"""Pictures of data, samples and measurements, as one would print them.

Images are put together by Pillow and numpy alone; lines, points and curves are drawn by matplotlib,
imported when first needed and never through pyplot, so no global state is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from undiffuse.errors import ConfigError, DataError, NonFiniteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 1200  # of a whole picture, in screen pixels
TILE = 64  # the least height that a small image is enlarged to
GAP = 2
PAPER, INK = (255, 255, 255), (64, 64, 64)
WALL = (124, 130, 140)  # between tiles: neither their black nor their white
COLUMNS = 6  # of a table, at most, that are drawn against one another
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # [Okabe08], safe for the colour-blind
STYLES = ("-", "--", ":")


def grid(
    values,
    levels: int | None = None,
    columns: int | None = None,
    scale: int | None = None,
    names: Sequence[str] = (),
) -> Image.Image:
    """The items of ``values`` side by side, by their shape.

    (N, C, H, W): tiles; 1, 3 and 4 channels as grey, RGB and RGBA on white, others as grey tiles side
    by side. (N, C, D, H, W): the middle slices across D, H and W. (N, C, L): line plots, a colour a
    channel. (N, 2): a scatter plot. (N, D): the first six coordinates against one another, each called as in ``names``,
    and how often each takes its values. Pixels run from 0 to ``levels`` − 1 and are clipped there; without
    ``levels`` the least value is black and the greatest white. ``scale`` enlarges by a whole factor.

    Raises DataError for other shapes and NonFiniteError for values that cannot be shown.
    """
    values = _finite(values)
    if values.ndim == 2:
        return _scatter(values) if values.shape[1] == 2 and not names else _pairs(values[:, :COLUMNS], names)
    if values.ndim == 3:
        return _lines(values, columns)
    tiles, gap = _tiles(values, levels, columns or 1, scale)
    n, height, width = tiles.shape[:3]
    fitting = max(1, (WIDTH - gap) // (width + gap))
    return Image.fromarray(_mosaic(tiles, columns or min(fitting, math.ceil(math.sqrt(n * height / width))), gap, gap))


def strip(frames, labels: Sequence[str], levels: int | None = None, scale: int | None = None) -> Image.Image:
    """Rows of items and columns of noise levels, a caption under each column: a forward or reverse process.

    ``frames`` (T, N, C, H, W) or with volumes, as `grid`; ``labels``, T captions of a few letters.
    """
    frames = _finite(frames)
    if frames.ndim < 5 or len(labels) != len(frames):
        cause = f"{len(labels)} captions do not go with frames of shape {frames.shape}"
        raise DataError("SHAPE", "frames", cause, "Give (T, N, C, H, W) and T captions")
    moments, items = frames.shape[:2]
    by_item = frames.swapaxes(0, 1).reshape(items * moments, *frames.shape[2:])
    tiles, gap = _tiles(by_item, levels, moments, scale)
    width = tiles.shape[2]
    font = ImageFont.load_default(13)
    captions = [label.translate({ord("−"): "-", ord("∞"): "inf"}) for label in labels]  # what the font can draw
    widest = max(math.ceil(font.getlength(caption)) for caption in captions)
    across = max(gap, widest + 8 - width)
    rows = _mosaic(tiles, moments, gap, across)
    picture = Image.new("RGB", (rows.shape[1], rows.shape[0] + 22), PAPER)
    picture.paste(Image.fromarray(rows), (0, 0))
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        middle = across + i * (width + across) + width / 2
        draw.text((middle, rows.shape[0] + 3), caption, fill=INK, font=font, anchor="ma")
    return picture


def bits_per_step(curves: Mapping[str, tuple[Any, Any]], title: str = "") -> Figure:
    """A figure of where the bits of a bound are: their density over log-SNR, so that an area is bits per dimension.

    ``curves`` are legend: (edges (N + 1,) of log-SNR, rising, and the bits (N,) between them); the first is filled.
    """
    figure = _figure(6.4, 4.0)
    axes = _tidy(figure.subplots(), "noise  ←  log SNR  →  data", "bits per dimension per unit of log SNR")
    for (label, (edges, bits)), colour in zip(curves.items(), COLOURS, strict=False):
        edges = np.asarray(edges, float)
        density = np.asarray(bits, float) / np.diff(edges)
        if colour == COLOURS[0]:
            axes.stairs(density, edges, color=colour, alpha=0.15, fill=True)
        axes.stairs(density, edges, color=colour, linewidth=1.5, label=label)
    axes.margins(x=0.02)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8 + 15 * len(curves))
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def by_calls(
    curves: Mapping[str, Sequence[tuple[int, float, float]]], floors: Mapping[str, float], measure: str
) -> Figure:
    """A figure of a ``measure`` of samplers, both axes logarithmic, from [(network calls, measure, its error)] by name.

    ``floors`` are lines across, name: measure. What is not above 0 is left out.
    """
    figure = _figure(7.6, 4.6)
    axes = _tidy(figure.subplots(), "network calls a sample", measure)
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
    asked = sorted({calls for points in curves.values() for calls, *_ in points})
    axes.set_xticks(asked, [f"{calls:,}" for calls in asked])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def training_curve(records: Iterable[Mapping[str, Any]]) -> Figure:
    """A figure of the training loss and the held-out bound against the step, whichever are recorded.

    Each record has ``step`` and some of ``loss``, ``bits_per_dim`` (held out) and its ``stderr``. The last
    ``final_bits_per_dim`` ± ``final_stderr``, of more draws than the curve, is said above it.
    Raises DataError if none has a loss or a bound.
    """
    records = list(records)
    losses = np.array([(r["step"], r["loss"]) for r in records if "loss" in r], float)
    held_out = [r for r in records if "bits_per_dim" in r]
    bounds = np.array([(r["step"], r["bits_per_dim"], r.get("stderr", 0)) for r in held_out], float)
    panels = [(draw, points) for draw, points in ((_loss, losses), (_bound, bounds)) if len(points)]
    if not panels:
        raise DataError("EMPTY", "records", "no record has a loss or a bound", "Train for some steps first")
    figure = _figure(6.4, 0.6 + 2.4 * len(panels))
    for row, (draw, points) in zip(figure.subplots(len(panels), sharex=True, squeeze=False), panels, strict=True):
        draw(row[0], points)
    figure.axes[-1].set_xlabel("step")
    for r in [r for r in held_out if "final_bits_per_dim" in r][-1:]:
        error = f" ± {r['final_stderr']:.3f}" if "final_stderr" in r else ""
        said = f"at the end, of more draws, {r['final_bits_per_dim']:.3f}{error}"
        figure.axes[-1].set_title(said, loc="left", fontsize=9, color="0.35")
    return figure


def _loss(axes: Axes, losses: np.ndarray) -> None:
    steps, values = losses.T
    window = max(1, len(values) // 50)
    _tidy(axes, "", "training loss")
    axes.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=0.8)
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    axes.plot(steps[window // 2 :][: len(smooth)], smooth, color=COLOURS[0], linewidth=1.6)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")


def _bound(axes: Axes, bounds: np.ndarray) -> None:
    steps, bits, stderr = bounds.T
    _tidy(axes, "", "held-out bits per dimension")
    axes.errorbar(steps, bits, stderr, color=COLOURS[1], marker="o", markersize=4, linewidth=1.6, capsize=2)
    best = bits.argmin()
    axes.set_title(f"best {bits[best]:.3f} at step {steps[best]:,.0f}", loc="right", fontsize=9, color="0.35")


def _finite(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise DataError("EMPTY", "values", "there is nothing to be shown", "Give at least one item")
    if not np.isfinite(values).all():
        raise NonFiniteError("NONFINITE", "picture", "a value to be shown is not a finite number", "Look at the model")
    return values


def _tiles(values: np.ndarray, levels: int | None, columns: int, scale: int | None) -> tuple[np.ndarray, int]:
    """Enlarged tiles (N, H, W, 3) uint8, ``columns`` of which fit a picture if they can, and the gap for them."""
    if values.ndim not in (4, 5):
        cause = f"no picture for values of shape {values.shape}"
        raise DataError("SHAPE", "values", cause, "Give (N, C, H, W), (N, C, D, H, W), (N, C, L) or (N, D)")
    low, high = (0, levels - 1) if levels else (values.min(), values.max())
    shown = np.round((np.clip(values, low, high) - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    planes = [shown] if shown.ndim == 4 else [shown.take(shown.shape[axis] // 2, axis) for axis in (2, 3, 4)]
    parts = [part for plane in planes for part in _coloured(plane)]
    height, width = max(part.shape[1] for part in parts), sum(part.shape[2] for part in parts)
    scale = scale or max(1, min(math.ceil(TILE / height), WIDTH // columns // width))
    enlarged = [part.repeat(scale, 1).repeat(scale, 2) for part in parts]
    return _beside(enlarged), max(GAP, scale) if len(parts) == 1 else 4 * GAP


def _coloured(shown: np.ndarray) -> list[np.ndarray]:
    """(N, C, H, W) uint8 as one (N, H, W, 3), or as C of them where channels have no colour."""
    channels = np.moveaxis(shown, 1, -1)
    if channels.shape[-1] == 3:
        return [channels]
    if channels.shape[-1] == 4:
        opacity = channels[..., 3:] / 255
        return [np.round(channels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)]
    return [channels[..., [i] * 3] for i in range(channels.shape[-1])]


def _beside(parts: list[np.ndarray]) -> np.ndarray:
    """One tile of several (N, H_i, W_i, 3), centred on paper, a pixel apart."""
    height = max(part.shape[1] for part in parts)
    width = sum(part.shape[2] + 1 for part in parts) - 1
    joined = np.full((len(parts[0]), height, width, 3), PAPER, np.uint8)
    left = 0
    for part in parts:
        top = (height - part.shape[1]) // 2
        joined[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        left += part.shape[2] + 1
    return joined


def _mosaic(tiles: np.ndarray, columns: int, down: int, across: int) -> np.ndarray:
    """(height, width, 3) uint8 of tiles row by row on a wall, ``down`` and ``across`` pixels apart."""
    n, height, width = tiles.shape[:3]
    rows = -(-n // columns)
    canvas = np.full((down + rows * (height + down), across + columns * (width + across), 3), WALL, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = down + i // columns * (height + down), across + i % columns * (width + across)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        cause = "curves are drawn by matplotlib, which is not installed"
        raise ConfigError("MISSING", "matplotlib", cause, "Run: pip install 'undiffuse[report]'") from missing
    return Figure((width, height), dpi=150, layout="constrained")


def _tidy(axes: Axes, x: str, y: str) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    return axes


def _scatter(points: np.ndarray) -> Image.Image:
    figure = _figure(5, 5)
    axes = _tidy(figure.subplots(), "", "")
    size = float(np.clip(8000 / len(points), 3, 20))
    axes.scatter(*points.T, s=size, color=COLOURS[0], alpha=0.5, linewidths=0)
    axes.set_aspect("equal", adjustable="datalim")
    return _drawn(figure)


def _pairs(points: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Below the diagonal column against column, on it how often each value is taken."""
    n = points.shape[1]
    figure = _figure(max(4, 1.6 * n), max(3, 1.5 * n))
    panels: Any = figure.subplots(n, n, sharex="col", squeeze=False)
    for i, j in np.ndindex(n, n):
        axes = _tidy(panels[i, j], "", "")
        axes.tick_params(labelsize=7)
        if i < j:
            axes.set_axis_off()
        elif i == j:
            axes.hist(points[:, i], bins="auto" if len(points) < 1000 else 50, color=COLOURS[0])
            axes.set_yticks([])
        else:
            axes.scatter(points[:, j], points[:, i], s=3, color=COLOURS[0], alpha=0.5, linewidths=0)
        if i == n - 1:
            axes.set_xlabel(_short(str(names[j])) if names else str(j), fontsize=8)
        if i > j == 0:
            axes.set_ylabel(_short(str(names[i])) if names else str(i), fontsize=8)
    return _drawn(figure)


def _short(name: str) -> str:
    return (name if len(name) <= 16 else name[:15] + "…").replace("$", r"\$")


def _lines(signals: np.ndarray, columns: int | None) -> Image.Image:
    columns = columns or min(4, math.ceil(math.sqrt(len(signals))))
    rows = -(-len(signals) // columns)
    figure = _figure(2 * columns, 1.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for i, axes in enumerate(panels):
        axes.set_axis_off()
        if i < len(signals):
            axes.axhline(0, color="0.9", linewidth=0.8)
            for channel, line in enumerate(signals[i]):
                axes.plot(line, color=COLOURS[channel % len(COLOURS)], linewidth=1.2)
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

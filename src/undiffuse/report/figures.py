"""Images of items, and curves of measurements.

Mosaics of images need Pillow and numpy alone; curves, tables and series are drawn by matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from undiffuse.errors import DataError, NonFiniteError
from undiffuse.report.axes import COLOURS, new_figure, style_axes
from undiffuse.report.item_plots import lines, pairs, scatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 1200  # of a mosaic, in pixels; wider where it would be more than about twice as high as wide
TILE = 64  # height to which smaller images are enlarged, in pixels
GAP = 2  # least distance of tiles, in pixels
PAPER, INK = (255, 255, 255), (64, 64, 64)
BACKGROUND = (124, 130, 140)  # between tiles: neither black nor white, which occur in tiles
MAX_PROMPTS, MAX_COLUMNS, MAX_ROWS, MAX_NAME = 32, 10, 8, 28
"""Prompts, columns and rows of images of a grid by prompts, and characters of a prompt below its column."""


def image_grid(
    values,
    num_values: int | None = None,
    columns: int | None = None,
    names: Sequence[str] = (),
) -> Image.Image:
    """The items of ``values`` side by side, by their shape.

    (N, C, H, W): tiles; 1, 3 and 4 channels as grey, RGB and RGBA on white, other numbers as a grey tile for each
    channel. (N, C, D, H, W): the middle slices across D, H and W. (N, C, L): line plots side by side, each of the first
    six channels on an axis in its own units, titled by ``names``. (N, 2): a scatter plot. (N, D): the first six
    columns, titled by ``names``, against each other, with histograms on the diagonal. Pixels are clipped to
    0 .. ``num_values`` − 1; without ``num_values`` the least value is black and the greatest white.

    Raises DataError for other shapes and NonFiniteError for NaN or infinite values.
    """
    values = _finite(values)
    if values.ndim == 2:
        return scatter(values) if values.shape[1] == 2 and not names else pairs(values, names)
    if values.ndim == 3:
        return lines(values, columns, names)
    tiles, gap = _tiles(values, num_values, columns or 1)
    n, height, width = tiles.shape[:3]
    fitting, square = max(1, (WIDTH - gap) // (width + gap)), math.ceil(math.sqrt(n * height / width))
    return Image.fromarray(_mosaic(tiles, columns or max(min(fitting, square), math.ceil(square / 1.5)), gap, gap))


def image_strip(
    frames, labels: Sequence[str], num_values: int | None = None, widest: int = 0, names: Sequence[str] = ()
) -> Image.Image:
    """A row for each item and a column for each of T frames, with a caption under each column, above those of series.

    ``frames`` (T, N, C, H, W), or of volumes or series as in `image_grid`, with the ``names`` of the channels of
    series; ``labels`` holds T short captions, for which columns of images are at least ``widest`` pixels apart.
    """
    frames = _finite(frames)
    if frames.ndim < 4 or len(labels) != len(frames):
        cause = f"{len(labels)} captions do not fit frames of shape {frames.shape}"
        raise DataError("SHAPE", "frames", cause, "Give (T, N, C, H, W) or (T, N, C, L), and T captions")
    moments, items = frames.shape[:2]
    by_item = frames.swapaxes(0, 1).reshape(items * moments, *frames.shape[2:])
    if frames.ndim == 4:
        return lines(by_item, moments, names, labels)
    tiles, gap = _tiles(by_item, num_values, moments)
    width = tiles.shape[2]
    font = ImageFont.load_default(13)
    captions = [label.translate({ord("−"): "-", ord("∞"): "inf"}) for label in labels]  # the font lacks both
    widest = max(widest, *(math.ceil(font.getlength(caption)) for caption in captions))
    across = max(gap, widest + 8 - width)
    rows = _mosaic(tiles, moments, gap, across)
    picture = Image.new("RGB", (rows.shape[1], rows.shape[0] + 22), PAPER)
    picture.paste(Image.fromarray(rows), (0, 0))
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        middle = across + i * (width + across) + width / 2
        draw.text((middle, rows.shape[0] + 3), caption, fill=INK, font=font, anchor="ma")
    return picture


def prompt_grid(values, prompts: Sequence[str], num_values: int | None = None) -> Image.Image:
    """A column for each of the first T ``prompts``, named below it, of images (N, C, H, W): image i has prompt i mod T.

    At most `MAX_PROMPTS` columns, in parts of equal width where they are more than `MAX_COLUMNS`, and `MAX_ROWS` rows;
    there must be an image of each prompt.
    """
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..." for name in prompts[:MAX_PROMPTS]]
    starts = range(0, len(names), math.ceil(len(names) / math.ceil(len(names) / MAX_COLUMNS)))
    rows = min(len(values) // len(prompts), MAX_ROWS // len(starts))
    table = np.asarray(values)[: rows * len(prompts)].reshape(rows, len(prompts), *values.shape[1:]).swapaxes(0, 1)
    widest = max(math.ceil(ImageFont.load_default(13).getlength(name)) for name in names)
    parts = [slice(start, min(start + starts.step, len(names))) for start in starts]
    strips = [image_strip(table[part], names[part], num_values, widest=widest) for part in parts]
    picture = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        picture.paste(strip, (0, top))
        top += strip.height
    return picture


def bits_per_step(curves: Mapping[str, tuple[Any, Any]], title: str = "") -> Figure:
    """A figure of the density of a bound's bits over log-SNR, so that an area is bits per dimension.

    ``curves`` maps a legend to the rising edges of log-SNR (N + 1,) and the bits (N,) between them; the first curve is
    filled.
    """
    figure = new_figure(6.4, 4.0)
    axes = style_axes(figure.subplots(), "noise  ←  log SNR  →  data", "bits per dimension per unit of log SNR")
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


def _finite(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise DataError("EMPTY", "values", "there are no values to draw", "Give at least one item")
    if not np.isfinite(values).all():
        raise NonFiniteError("NON_FINITE", "values", "a value to draw is NaN or infinite", "Check the model")
    return values


def _tiles(values: np.ndarray, num_values: int | None, columns: int) -> tuple[np.ndarray, int]:
    """Enlarged tiles (N, H, W, 3) uint8, of which ``columns`` fit into `WIDTH` if possible, and their gap."""
    if values.ndim not in (4, 5):
        cause = f"values of shape {values.shape} cannot be drawn"
        raise DataError("SHAPE", "values", cause, "Give (N, C, H, W), (N, C, D, H, W), (N, C, L) or (N, D)")
    low, high = (0, num_values - 1) if num_values else (values.min(), values.max())
    shown = np.round((np.clip(values, low, high) - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    planes = [shown] if shown.ndim == 4 else [shown.take(shown.shape[axis] // 2, axis) for axis in (2, 3, 4)]
    parts = [part for plane in planes for part in _to_rgb(plane)]
    height, width = max(part.shape[1] for part in parts), sum(part.shape[2] for part in parts)
    scale = max(1, min(math.ceil(TILE / height), WIDTH // columns // width))
    enlarged = [part.repeat(scale, 1).repeat(scale, 2) for part in parts]
    return _join(enlarged), max(GAP, scale) if len(parts) == 1 else 4 * GAP


def _to_rgb(shown: np.ndarray) -> list[np.ndarray]:
    """(N, C, H, W) uint8 as one array (N, H, W, 3) of colours, or as C arrays of grey where channels are no colours."""
    channels = np.moveaxis(shown, 1, -1)
    if channels.shape[-1] == 3:
        return [channels]
    if channels.shape[-1] == 4:
        opacity = channels[..., 3:] / 255
        return [np.round(channels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)]
    return [channels[..., [i] * 3] for i in range(channels.shape[-1])]


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """(N, H_i, W_i, 3) tiles joined to one for each item, side by side, vertically centred, one pixel apart."""
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
    """(height, width, 3) uint8 of tiles row by row, ``down`` and ``across`` pixels apart."""
    n, height, width = tiles.shape[:3]
    rows = -(-n // columns)
    canvas = np.full((down + rows * (height + down), across + columns * (width + across), 3), BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = down + i // columns * (height + down), across + i % columns * (width + across)
        canvas[top : top + height, left : left + width] = tile
    return canvas

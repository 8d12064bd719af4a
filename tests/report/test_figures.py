"""Images and figures, read back from the pixels and from the data of the figures."""

import sys

import numpy as np
import pytest
import torch

from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.report import figures
from undiffuse.report.figures import (
    BACKGROUND,
    WIDTH,
    bits_per_step,
    image_grid,
    image_strip,
)

RNG = np.random.default_rng(0)


def pixels(image):
    return np.asarray(image)


def test_a_grid_enlarges_and_places_every_pixel():
    values = RNG.integers(0, 17, (6, 1, 8, 8))
    shown = pixels(image_grid(torch.from_numpy(values), 17, columns=3))
    assert shown.shape == (8 + 2 * 72, 8 + 3 * 72, 3)
    for i in range(6):
        top, left = 8 + i // 3 * 72, 8 + i % 3 * 72
        tile = shown[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(tile[4::8, 4::8, 0], np.round(values[i, 0] * 255 / 16))
        assert (tile.reshape(8, 8, 8, 8, 3).std((1, 3)) == 0).all()
    assert (shown[:8] == BACKGROUND).all()
    assert (shown[72:80] == BACKGROUND).all()


def test_values_are_clipped_and_scaled(monkeypatch):
    monkeypatch.setattr(figures, "TILE", 1)
    values = np.array([-5.0, 0.0, 65535.0, 70000.0, 32768.0]).reshape(5, 1, 1, 1)
    assert pixels(image_grid(values, 65536, columns=5))[2, 2::3, 0].tolist() == [0, 0, 255, 255, 128]
    assert pixels(image_grid(values[:3] - 7, columns=3))[2, 2::3, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ([9], [(9, 9, 9)]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([10, 20, 30, 255], [(10, 20, 30)]),
        ([10, 20, 30, 0], [(255, 255, 255)]),
        ([1, 2], [(1, 1, 1), (2, 2, 2)]),
        ([1, 2, 3, 4, 5], [(i, i, i) for i in range(1, 6)]),
    ],
)
def test_channels(channels, expected, monkeypatch):
    monkeypatch.setattr(figures, "TILE", 1)
    shown = pixels(image_grid(np.reshape(channels, (1, -1, 1, 1)), 256))
    gap = 2 if len(expected) == 1 else 8
    assert [tuple(p) for p in shown[gap, gap:-gap:2].tolist()] == expected


def test_volumes_show_the_three_middle_slices(monkeypatch):
    monkeypatch.setattr(figures, "TILE", 1)
    volume = RNG.integers(0, 256, (1, 1, 3, 4, 5))
    shown = pixels(image_grid(volume, 256))[8:-8, 8:-8, 0]
    across_d, across_h, across_w = volume[0, 0, 1], volume[0, 0, :, 2], volume[0, 0, :, :, 2]
    np.testing.assert_array_equal(shown[:, :5], across_d)
    np.testing.assert_array_equal(shown[:3, 6:11], across_h)
    np.testing.assert_array_equal(shown[:3, 12:], across_w)


@pytest.mark.parametrize(
    "shape",
    [
        (64, 1, 8, 8),
        (100, 1, 28, 28),
        (64, 3, 32, 32),
        (30, 3, 256, 256),
        (9, 4, 8, 80),
        (5, 7, 64, 64),
        (1, 3, 900, 900),
    ],
)
def test_images_fit_the_width(shape):
    values = np.zeros(shape)
    assert image_grid(values, 256).width <= WIDTH
    assert image_grid(values[:4], 256, columns=1).width <= WIDTH


@pytest.mark.parametrize("n", [30, 1200])
@pytest.mark.parametrize("value", [0.0, 1.7e18, -1e30])
def test_a_constant_column_is_drawn(value, n):
    points = np.stack([np.full(n, value), np.arange(n), np.arange(n) % 7], 1).astype(np.float64)
    assert image_grid(points, names=("time", "x", "y")).width > 100


def test_a_mosaic_of_many_large_images_is_wider_but_not_much_higher_than_wide():
    grid = image_grid(np.zeros((64, 1, 512, 512)), 256)
    assert WIDTH < grid.width < grid.height < 2 * grid.width


def test_a_strip_has_a_row_for_each_item_and_a_captioned_column_for_each_frame():
    frames = RNG.integers(0, 256, (5, 3, 1, 8, 8))
    shown = pixels(image_strip(frames, ["∞", "4.0", "0.0", "−4.0", "−9.0"], 256))
    assert shown.shape == (8 + 3 * 72 + 22, 8 + 5 * 72, 3)
    np.testing.assert_array_equal(
        shown[8 + 72 + 4 : 8 + 72 + 64 : 8, 8 + 3 * 72 + 4 : 8 + 3 * 72 + 64 : 8, 0], frames[3, 1, 0]
    )
    captions = shown[8 + 3 * 72 :]
    for i in range(5):
        assert (captions[:, 8 + i * 72 : 72 + i * 72] < 128).any()
        assert (captions[:, 72 + i * 72 : 80 + i * 72] == 255).all()


def test_series_have_the_captions_above_their_columns():
    frames = RNG.normal(size=(3, 2, 1, 8))
    shown, plain = (
        pixels(image_strip(frames, ["a", "b", "c"])),
        pixels(image_grid(np.concatenate([*frames]), columns=3)),
    )
    assert shown.shape == plain.shape
    thirds = np.array_split(np.arange(shown.shape[1] // 12, shown.shape[1]), 3)
    assert all((shown[:30, third] < 128).any() and (plain[:10, third] == 255).all() for third in thirds)


def test_long_captions_do_not_overlap():
    frames = np.zeros((3, 1, 1, 8, 8))
    assert image_strip(frames, ["a caption of many letters"] * 3, 2).width > 3 * 140
    assert image_strip(np.zeros((30, 2, 3, 32, 32)), ["1"] * 30, 256).width <= WIDTH


@pytest.mark.parametrize("shape", [(5, 2, 40), (300, 2)])
def test_sequences_and_points_are_drawn(shape):
    shown = pixels(image_grid(RNG.normal(size=shape)))
    assert shown.ndim == 3
    assert ((shown[..., 2] > 150) & (shown[..., 0] < 80)).sum() > 50  # the first colour, a blue


def test_each_channel_of_a_series_has_an_axis_in_its_own_units(monkeypatch):
    """A temperature of some degrees beside a pressure of some thousand: each fills its panel, with ticks."""
    drawn = []
    monkeypatch.setattr("undiffuse.report.item_plots.render", drawn.append)
    values = np.stack([RNG.normal(20, 3, (5, 30)), np.round(RNG.normal(1e5, 50, (5, 30)))], 1)
    image_grid(values, columns=3, names=["temperature", "pressure"])
    axes = drawn[0].axes
    assert [a.get_ylabel() for a in axes] == ["temperature", "pressure"] * 2
    assert [len(a.lines) for a in axes] == [3, 3, 2, 2]
    for panel, channel in zip(axes, (0, 1, 0, 1), strict=True):
        low, high = panel.get_ylim()
        assert values[:, channel].min() - low == pytest.approx(high - values[:, channel].max())
        assert np.ptp(values[:, channel]) > 0.9 * (high - low)
        assert sum(low <= tick <= high for tick in panel.get_yticks()) >= 2
    assert all(tick == round(tick) for tick in axes[1].get_yticks())
    np.testing.assert_array_equal(axes[3].lines[1].get_ydata(), values[4, 1])


def test_a_curve_of_one_point_is_seen(monkeypatch):
    drawn = []
    monkeypatch.setattr("undiffuse.report.item_plots.render", drawn.append)
    image_grid(np.zeros((2, 1, 1)))
    lines = drawn[0].axes[0].lines
    assert len(lines) == 2
    assert all(line.get_marker() == "o" for line in lines)


@pytest.mark.parametrize("steps", [[1], [1, 2], [0, 1, 2, 3], [50, 100], [1000, 400000]])
def test_ticks_of_whole_numbers_are_whole(steps, monkeypatch):
    drawn = []
    monkeypatch.setattr("undiffuse.report.item_plots.render", drawn.append)
    table = np.stack([steps, np.linspace(0, 1, len(steps))], 1)
    image_grid(table)
    image_grid(table, names=["whole", "real"])
    for axes in (drawn[0].axes[0], drawn[1].axes[0], drawn[1].axes[2]):
        ticks = axes.get_xticks()
        assert len(ticks) >= 1
        assert all(tick == round(tick) for tick in ticks), ticks


def test_areas_in_the_figure_of_bits_are_bits():
    curves = {"chain": (torch.tensor([-5.0, 0.0, 2.0]), [0.5, 0.4]), "points": (np.array([-5.0, 2.0]), [0.7])}
    (axes,) = bits_per_step(curves, "at most 1.5").axes
    assert axes.get_title(loc="left") == "at most 1.5"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["chain", "points"]
    filled, chain, points = (patch.get_data() for patch in axes.patches)
    for density, edges, _ in (filled, chain):
        np.testing.assert_allclose(density, [0.1, 0.2])
        np.testing.assert_array_equal(edges, [-5, 0, 2])
    np.testing.assert_allclose(points.values, [0.1])
    assert axes.get_ylim()[0] == 0


def test_values_that_cannot_be_drawn(monkeypatch):
    with pytest.raises(DataError, match="SHAPE"):
        image_grid(np.zeros(4))
    with pytest.raises(DataError, match="EMPTY"):
        image_grid(np.zeros((0, 1, 8, 8)))
    with pytest.raises(NonFiniteError):
        image_grid(np.full((1, 1, 2, 2), np.nan), 256)
    with pytest.raises(DataError, match="2 captions"):
        image_strip(np.zeros((3, 1, 1, 2, 2)), ["a", "b"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"undiffuse\[report\]"):
        image_grid(np.zeros((3, 2)))
    image_grid(np.zeros((3, 1, 2, 2)), 2)  # grids need no matplotlib


def test_columns_are_drawn_against_each_other(monkeypatch):
    drawn = []
    monkeypatch.setattr("undiffuse.report.item_plots.render", drawn.append)
    values = RNG.normal(size=(50, 8))
    image_grid(values, names=["a $", "b", "c" * 20, "d", "e", "f", "g", "h"])
    image_grid(values[:, :1])
    image_grid(values[:, :2], names="ab")
    image_grid(values[:, :2])
    many, one, two, scatter = drawn
    panels = np.reshape(many.axes, (6, 6))
    np.testing.assert_array_equal(panels[4, 1].collections[0].get_offsets(), values[:, [1, 4]])
    assert sum(bar.get_height() for bar in panels[3, 3].patches) == 50
    assert not panels[1, 4].axison
    assert [axes.get_xlabel() for axes in panels[5]] == [r"a \$", "b", "c" * 15 + "…", "d", "e", "f"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["", "b", "c" * 15 + "…", "d", "e", "f"]
    assert ([axes.get_xlabel() for axes in one.axes], len(two.axes), len(scatter.axes)) == (["0"], 4, 1)

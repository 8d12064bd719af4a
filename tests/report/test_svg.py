"""Charts: where points and ticks are, and what is left out."""

import math
import re

import numpy as np
import pytest
from page_checks import Page

from undiffuse.report.svg import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Line, chart, number, ticks


def paths(written, kind):
    return [
        np.array([pair.split() for pair in re.split("[ML]", p["d"].rstrip("Z"))[1:]], float)
        for p in Page(written).all("path")
        if kind in p["class"].split()
    ]


def test_points_are_where_their_values_are():
    written = chart("t", [Line("", [0, 5, 10], [1.0, 3.0, 2.0], [0.5, 0.0, 1.0])], "x", "y")
    (line,) = paths(written, "line")
    np.testing.assert_allclose(line[:, 0], [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    low, high = 0.5 - 0.05 * 2.5, 3.0 + 0.05 * 2.5  # the errors are part of the axis, with a margin
    at = HEIGHT - BOTTOM - (np.array([1.0, 3.0, 2.0]) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
    np.testing.assert_allclose(line[:, 1], at, atol=0.06)
    bars = paths(written, "error")
    assert len(bars) == 2  # that of 0 is left out
    assert bars[1][:, 1].mean() == pytest.approx(at[2], abs=0.06)


def test_a_logarithmic_axis_and_values_that_are_not_finite():
    lines = [Line("", [0, 1, 2, 3, 4], [1.0, math.nan, 100.0, 0.0, 10.0]), Line("", [0], [math.inf])]
    written = chart("t", lines, "x", "y", log=True)
    (line,) = paths(written, "line")
    assert len(line) == 3
    assert line[2, 1] == pytest.approx(line[:2, 1].mean(), abs=0.1)  # 10 is halfway between 1 and 100
    assert {"1", "10", "100"} <= {text for _, text in Page(written).texts}


def test_intervals_are_steps_over_their_edges():
    written = chart(
        "t", [Line("a", [0, 1, 4], [2.0, 1.0], stairs=True), Line("b", [0, 4], [1.0], stairs=True)], "x", "y"
    )
    first, second, *_ = paths(written, "s0")[1], *paths(written, "s0")[2:]
    assert len(paths(written, "area")) == 2
    assert first[:, 0].tolist() == [LEFT, *[round(LEFT + (WIDTH - LEFT - RIGHT) / 4, 1)] * 2, WIDTH - RIGHT]
    assert first[0, 1] == first[1, 1] < first[2, 1] == first[3, 1]
    assert len(second) in (2, 4)
    assert [text for _, text in Page(written).texts if text in "ab"] == ["a", "b"]  # a legend of two


def test_long_lines_are_thinned_and_single_points_are_seen():
    x = np.arange(10_000)
    (line,) = paths(chart("t", [Line("", x, np.sin(x / 1000))], "x", "y"), "line")
    assert len(line) == MAX_POINTS
    written = chart("t", [Line("", [3], [0.25])], "x", "y")
    assert len(Page(written).all("circle")) == 1
    assert "NaN" not in written
    assert "nan" not in written


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-5.2, 7.9, [-4, -2, 0, 2, 4, 6]), (0, 9345, [0, 2000, 4000, 6000, 8000])],
)
def test_ticks_are_round(low, high, marks):
    assert ticks(low, high, 5) == marks


@pytest.mark.parametrize(
    ("value", "text"),
    [(-2.5, "−2.5"), (2500, "2,500"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G"), (0.001, "0.001")],
)
def test_numbers_beside_ticks(value, text):
    assert number(value) == text

"""benchmarks/error_curves: the figure of benchmarks/choosing, read back from its data."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
from error_curves import error_by_calls  # noqa: E402

sys.path.remove(BENCHMARKS)


def test_curves_of_errors_by_calls():
    curves = {"none": [], **{str(i): [(5, 2.0, 0.5), (10, 1.0 + i, 0.1)] for i in range(7)}}
    curves["at 0"] = [(5, 0.0, 0.1), (10, 1.0, 0.1)]
    (axes,) = error_by_calls(curves, {"floor": 0.5}, "distance").axes
    assert [line.get_label() for line in axes.lines[:8]] == [*map(str, range(7)), "at 0"]
    assert axes.lines[3].get_xydata().tolist() == [[5, 2], [10, 4]]
    assert np.isnan(axes.lines[7].get_ydata()[0])
    bars = axes.collections[3]
    assert np.concatenate(bars.get_segments()).ravel() == pytest.approx([5, 1.5, 5, 2.5, 10, 3.9, 10, 4.1])
    assert bars.get_color()[0, :3] == pytest.approx(to_rgb(axes.lines[3].get_color()))
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines[:8]]
    assert len(set(looks)) == 8
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylabel()) == ("log", "log", "distance")
    assert axes.lines[8].get_ydata()[0] == 0.5

"""The table of metrics: each row gives the value of a known case, and an error that is the spread of the value."""

import math
import subprocess
import sys

import pytest
import torch

from undiffuse.evaluation.metrics import METRICS, Value


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(n, seed, shift=0.0):
    """``n`` rows of N(0, I) in four dimensions, and as many of a distribution ``shift`` away in each."""
    return noise(n, 4, seed=2 * seed), noise(n, 4, seed=2 * seed + 1) + shift


SAME = {"frechet": 0.0, "precision": 1.0, "recall": 1.0, "nearest": 0.0}
FAR = {"frechet": 4 * 10.0**2, "precision": 0.0, "recall": 0.0, "nearest": 20.0, "kernel": 1045412.5}
"""Values for distributions ten standard deviations apart in each of four dimensions.

The kernel distance is E k(a, a') + E k(b, b') - 2 E k(a, b) with k = (a.b/4 + 1)^3, from the moments of a.b.
"""


def test_every_metric_has_its_rows():
    assert {*SAME, "kernel"} == {*FAR} == {*METRICS}


@pytest.mark.parametrize("name", METRICS)
def test_equal_and_separated_sets(name):
    metric, (a, b) = METRICS[name], pair(200, 0, shift=10.0)
    same = metric.function(a, a).value
    assert same < 0 if name == "kernel" else same == pytest.approx(SAME[name], abs=1e-6)
    far = metric.function(a, b)
    assert far.value == pytest.approx(FAR[name], rel=0.15)
    low, high = metric.interval(far)
    assert low <= far.value <= high
    assert metric.bounds[0] <= low <= high <= metric.bounds[1]


@pytest.mark.parametrize("name", sorted({*METRICS} - {"recall"}))
def test_the_error_is_the_spread_of_the_value(name):
    """Over 60 fresh sets the values spread as the errors state, to a factor of 1.6; χ² with 59 degrees of freedom
    leaves a factor of 1.6 with a probability below 1e-6. A Fréchet distance is correlated over rows that it shares with
    the reference, so its jackknife may overstate the error, but not by more than 2."""
    runs = [METRICS[name].function(*pair(150, seed, shift=0.7)) for seed in range(60)]
    values, errors = torch.tensor(runs, dtype=torch.float64).T
    assert 1 / 2 < float(values.std() / errors.square().mean().sqrt()) < 1.6


@pytest.mark.parametrize("name", METRICS)
def test_direction_of_each_metric(name):
    metric = METRICS[name]
    near, far = (metric.function(*pair(200, 1, shift=shift)).value for shift in (0.0, 2.0))
    assert (near > far) == (metric.better == "higher")
    assert metric.reference == ("training" if name == "nearest" else "held-out")


def test_recall_is_precision_with_the_sets_exchanged():
    a, b = pair(100, 3, shift=0.5)
    assert METRICS["recall"].function(a, b) == METRICS["precision"].function(b, a)


def test_intervals():
    assert METRICS["kernel"].interval(Value(1.0, 0.5)) == pytest.approx((-0.131, 2.131))
    assert METRICS["precision"].interval(Value(0.99, 0.1)) == (pytest.approx(0.99 - 0.2262), 1.0)
    assert METRICS["frechet"].interval(Value(0.1, 0.1))[0] == 0
    assert METRICS["nearest"].interval(Value(1.0, 0.5)) == pytest.approx((0.02, 1.98))
    assert METRICS["kernel"].interval(Value(0.0, math.inf)) == (-math.inf, math.inf)


def test_the_tables_need_no_torch():
    code = "import sys, undiffuse.evaluation.metrics, undiffuse.evaluation.features; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

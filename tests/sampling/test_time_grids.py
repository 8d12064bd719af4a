"""Every spacing against the formula of its source, on tables and on functions of time."""

import math

import numpy as np
import pytest
import torch

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.sampling import time_grids
from undiffuse.sampling.tables import SPACINGS
from undiffuse.sampling.time_grids import time_grid

f64 = torch.float64
ZERO_TERMINAL = DS.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0])
SCHEDULES = {
    "linear": DS.linear(),
    "short": DS.linear_rescaled(40),
    "zero terminal": ZERO_TERMINAL,
    "log-SNR": S.LinearLogSNR(),
    "learned": LearnedSchedule(),
    "sigmoid": S.Sigmoid(),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(0.002, 80.0),
}


def times(levels) -> np.ndarray:
    return np.array([float(level.t) for level in levels])


def ratios(levels) -> np.ndarray:
    return np.array([float(level.sigma.detach() / level.alpha.detach()) for level in levels])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_spacing_falls_from_noise_to_data(name, spacing):
    schedule = SCHEDULES[name]
    if spacing == "leading" and schedule.chain_length is None:
        with pytest.raises(ConfigError, match=r"'leading': the schedule is a function of time, .*Use 'uniform'"):
            time_grid(schedule, 5, spacing)
        return
    for steps in (1, 2, 3, 5):
        t = times(time_grid(schedule, steps, spacing))
        assert len(t) == steps + 1
        assert (np.diff(t) < 0).all()
        assert t[-1] == 0
        assert t[0] == 1 or spacing == "leading"
        T = schedule.chain_length
        if T and spacing not in ("log_snr", "karras"):
            np.testing.assert_array_equal(t, np.round(t * T) / T)
        if T:
            assert t[-2] >= 1 / T


@pytest.mark.parametrize("T", [1, 2, 7, 50])
def test_uniform_times_of_a_table_are_the_tables(T):
    schedule = DS.linear_rescaled(T)
    for steps in range(1, T + 1):
        t = times(time_grid(schedule, steps))
        assert len(t) == steps + 1
        np.testing.assert_array_equal(t, np.round(t * T) / T)
        assert (t[0], t[-1]) == (1, 0)
        assert (np.diff(t) < 0).all()
        assert np.abs(t * T - np.linspace(T, 0, steps + 1)).max() <= 0.5 + 1e-9
    assert len(time_grid(schedule)) == T + 1


def test_uniform_times_of_functions_and_explicit_times():
    levels = time_grid(S.Flow(), 4)
    assert times(levels).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert [float(level.sigma) for level in levels] == [1, 0.75, 0.5, 0.25, 0]
    assert len(time_grid(S.LinearLogSNR())) == 1001
    assert times(time_grid(DS.linear(10), 3, times=[0.9, 0.2])).tolist() == [0.9, 0.2]
    assert levels[-1].final_log_var is not None
    assert len(time_grid(S.Flow(), 1)) == 2


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 300, 1000])
def test_trailing_and_leading_are_those_of_other_libraries(steps):
    """Their integers count the steps of a table from 0; the last step goes to data."""
    schedule = DS.linear()
    trailing = np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
    np.testing.assert_array_equal(times(time_grid(schedule, steps, "trailing"))[:-1] * 1000 - 1, trailing)
    leading = (np.arange(steps) * (1000 // steps))[::-1]
    np.testing.assert_allclose(times(time_grid(schedule, steps, "leading"))[:-1] * 1000 - 1, leading, atol=1e-9)
    if steps == 10:
        assert trailing.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
        assert leading.tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


def test_quadratic():
    np.testing.assert_allclose(times(time_grid(S.Flow(), 4, "quadratic")), [1, 9 / 16, 1 / 4, 1 / 16, 0])
    assert (times(time_grid(DS.linear(), 4, "quadratic")) * 1000).round().tolist() == [1000, 562, 250, 62, 0]
    # (i/6)² 10 rounds to 0, 0, 1, 2, 4, 7, 10 and (i/9)² 10 to 0, 0, 0, 1, ...: distinct all the same
    assert (times(time_grid(DS.linear(10), 6, "quadratic")) * 10).round().tolist() == [10, 7, 4, 3, 2, 1, 0]
    assert (times(time_grid(DS.linear(10), 9, "quadratic")) * 10).round().tolist() == [10, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def karras(low, high, n):
    """The sigmas of Karras 2022, eq. 5, from the noisiest, with rho = 7."""
    i = np.arange(n)
    return (high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def test_karras():
    exploding = time_grid(S.VarianceExploding(0.002, 80.0), 9, "karras")
    np.testing.assert_allclose(ratios(exploding), karras(0.002, 80, 10), rtol=1e-10)
    table = DS.linear()
    low, high = ratios([table(1e-3), table(1.0)])
    levels = time_grid(table, 10, "karras")
    np.testing.assert_allclose(ratios(levels), [*karras(low, high, 10), 0], rtol=1e-9)
    preserving = time_grid(S.LinearLogSNR(), 10, "karras")
    np.testing.assert_allclose(ratios(preserving), karras(math.exp(-6.65), math.exp(2.5), 11), rtol=1e-9)


def test_log_snr():
    """Linear from t = 1 to 0 where both ends are finite, else to t_min and from log_snr = −20."""
    np.testing.assert_allclose(times(time_grid(S.LinearLogSNR(), 8, "log_snr")), np.linspace(1, 0, 9), atol=1e-12)
    table = DS.cosine(100)
    levels = time_grid(table, 6, "log_snr")
    low, high = float(table(1.0).log_snr), float(table(0.01).log_snr)
    np.testing.assert_allclose([float(v.log_snr) for v in levels[:-1]], np.linspace(low, high, 6), rtol=1e-9)
    flow = time_grid(S.Flow(), 6, "log_snr")
    line = np.linspace(-20, float(S.Flow()(1e-5).log_snr), 6)
    np.testing.assert_allclose([float(v.log_snr) for v in flow[1:-1]], line[1:], rtol=1e-9)
    assert float(flow[0].alpha) == float(flow[-1].sigma) == 0


@pytest.mark.parametrize("T", [3000, 10_000])
def test_a_table_far_below_the_lowest_log_snr_is_spaced_from_there(T):
    """u = e^10 is log-SNR −20; the linear tables end at −30 and −101, where steps would be wasted."""
    table = DS.linear(T)
    low, levels = float(ratios([table(1 / T)])[0]), time_grid(table, 10, "karras")
    np.testing.assert_allclose(ratios(levels[1:]), [*karras(low, math.exp(10), 10)[1:], 0], rtol=1e-6)
    assert float(levels[0].t) == 1.0
    line = np.linspace(-20, float(table(1 / T).log_snr), 10)
    levels = time_grid(table, 10, "log_snr")
    np.testing.assert_allclose([float(v.log_snr) for v in levels[1:-1]], line[1:], rtol=1e-6)


def test_times_between_those_of_a_table_and_rounded_ones():
    table = DS.cosine(50)
    for spacing in ("log_snr", "karras"):
        between = times(time_grid(table, 9, spacing)) * 50
        assert np.abs(between - between.round()).max() > 0.1
    # 50, 49.63, 49.27, 48.52, 45.10, 34.06, 15.04, 4.30, 1 and 0, of which the first four crowd
    rounded = time_grids._round_to_table(time_grids.log_snr(table, 9), 50) * 50
    np.testing.assert_allclose(rounded.flip(0), [50, 49, 48, 47, 45, 34, 15, 4, 1, 0])
    # with all fifty steps, and all but one, rounding loses no time at either end
    every = time_grids._round_to_table(time_grids.karras(table, 50), 50) * 50
    assert every.round().tolist() == list(range(51))
    assert (time_grids._round_to_table(time_grids.log_snr(table, 49), 50).diff() > 0).all()
    assert len(time_grid(table, 80, "karras")) == 81


@pytest.mark.parametrize(
    ("schedule", "settings", "words"),
    [
        (DS.linear(10), {"num_steps": 11}, "steps = 11: the number must be from 1 to 10"),
        (DS.linear(10), {"num_steps": 11, "spacing": "quadratic"}, "must be from 1 to 10"),
        (DS.linear(10), {"num_steps": 0}, "steps = 0: the number must be from 1 to 10"),
        (DS.linear(10), {"num_steps": 0, "spacing": "log_snr"}, "must be at least 1"),
        (S.Flow(), {"num_steps": 0}, "must be at least 1"),
        (S.Flow(), {"times": [0.5, 0.5]}, r"times = \[0.5, 0.5\]: a chain is a falling list .* Choose other times"),
        (S.Flow(), {"times": [0.5]}, "at least two"),
        (S.Flow(), {"times": [1.5, 0.5]}, r"\[0, 1\]"),
        (
            S.Flow(),
            {"num_steps": 3, "spacing": "cubic"},
            "spacing 'cubic': no such spacing of noise levels. Use one of uniform",
        ),
    ],
)
def test_grid_errors(schedule, settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        time_grid(schedule, **settings)
    assert error.value.code == "GRID"

"""The order of every named solver on the default grid of ``sample``: equally spaced in t, from t = 1 to t = 0.

Strong and weak errors are those of `test_order`, with the exact denoiser, from the exact marginal at t = 1. The learned
schedule is tested by its ends alone: they are finite, as those of the linear log-SNR that it starts from.
"""

import math

import numpy as np
import pytest
import test_order
from solver_table import ROWS

from undiffuse.cli.sampler_options import parse_sampler
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.solvers.solver import end_power

FUNCTIONS = {
    "flow": S.Flow(),
    "sigmoid": S.Sigmoid(),
    "log-SNR": S.LinearLogSNR(),
    "exploding": S.VarianceExploding(),
}
TABLES = {
    "linear": DS.linear(),
    "cosine": DS.cosine(),
    "quadratic": DS.quadratic(),
    "rescaled": DS.linear_rescaled(2000),
    "tabulated": DS.Tabulated(np.linspace(2e-4, 0.03, 500)),
}
ORDERED = {row.name: row for row in ROWS.values() if row.name and row.order is not None}
LOG = {("flow", name) for name in SOLVERS if name.startswith(("dpm", "exponential", "unipc"))}
LOG |= {("sigmoid", name) for name in SOLVERS}
"""Where step k before data contributes h^p/k to the error, which is then h^p log 1/h."""
FINEST = {("flow", "dpm++2m"): 320, ("flow", "dpm++3m_sde"): 2560, **{(name, "exponential"): 640 for name in FUNCTIONS}}
"""Steps at which the order shows, where they are more than 160."""


def error(name: str, schedule: S.Schedule, steps: int) -> float:
    solver = ORDERED[name].solver
    levels = parse_sampler(solver=name, steps=steps).noise_levels(schedule)
    assert (float(levels[0].t), float(levels[-1].t), len(levels)) == (1, 0, steps + 1)
    return (test_order.weak_error if solver.noises_per_step else test_order.strong_error)(solver, schedule, levels)


def slope(name: str, schedule: S.Schedule, first: int, last: int) -> float:
    errors = [error(name, schedule, steps) for steps in (first, last)]
    return math.log(errors[0] / errors[1]) / math.log(last / first)


def table_slopes(name: str, schedule: str) -> list[float]:
    return [slope(name, TABLES[schedule], first, 250) for first in (25, 100)]


def cases():
    for schedule in FUNCTIONS:
        for name in ORDERED:
            weak_on_sigmoid = schedule == "sigmoid" and ORDERED[name].noises_per_step and name != "dpm++2m_sde"
            slow = schedule in ("log-SNR", "exploding") or weak_on_sigmoid or FINEST.get((schedule, name), 0) > 640
            marks = [pytest.mark.release] if slow else []
            yield pytest.param(schedule, name, marks=marks, id=f"{name}-{schedule}")


@pytest.mark.parametrize(("schedule", "name"), list(cases()))
def test_declared_orders_hold_with_the_ends_of_the_default_grid(schedule, name):
    """Not below the declared order, less 1/log n where the error has a logarithm; without noise not above it either.

    A Gaussian's mean and variance can be more accurate than the declared weak order.
    """
    function, finest = FUNCTIONS[schedule], FINEST.get((schedule, name), 160)
    declared, measured = (
        ORDERED[name].solver.order_on(function, at_data=True),
        slope(name, function, finest // 2, finest),
    )
    assert declared is not None
    assert measured > declared - 0.15 - ((schedule, name) in LOG) / math.log(finest)
    assert ORDERED[name].noises_per_step or measured < declared + 0.15


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[] if name == "linear" else [pytest.mark.release]) for name in TABLES]
)
def test_declared_orders_hold_on_tables(schedule, name):
    """A table has finitely many levels, so a slope is between that of the method and that of its step into data.

    The larger of two, because errors of different signs can cancel at some number of steps.
    """
    declared = ORDERED[name].solver.order_on(TABLES[schedule], at_data=True)
    assert declared == 1
    assert max(table_slopes(name, schedule)) > declared - 0.15


@pytest.mark.parametrize("name", ["heun", "unipc"])
def test_the_step_into_data_limits_the_order_on_a_long_table(name):
    assert slope(name, DS.quadratic(), 250, 500) == pytest.approx(1, abs=0.15)


def test_rk4_has_order_four_on_the_whole_flow():
    """It had order 2, with errors of 5.4e-3, 1.3e-3 and 3.2e-4, where both end steps were those of DDIM."""
    errors = [error("rk4", S.Flow(), steps) for steps in (20, 40, 80)]
    assert errors == pytest.approx([8.4e-7, 5.2e-8, 3.3e-9], rel=0.02)


def test_a_denoiser_that_does_not_predict_at_data_limits_the_order():
    """Such as a clamped one."""
    rk4 = ORDERED["rk4"].solver
    errors = []
    for steps in (160, 320):
        levels = parse_sampler(solver="rk4", steps=steps).noise_levels(S.Flow())
        errors.append(test_order.strong_error(rk4, S.Flow(), levels, predicts_at_data=False))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(rk4.order_on(S.Flow()), abs=0.15)


def test_euler_maruyama_does_not_diverge_where_the_signal_is_almost_zero():
    """Its first step on the sigmoid schedule, from alpha² = 1e-9, had an error of 1e9 with 40 steps."""
    assert error("euler_maruyama", S.Sigmoid(), 40) < 0.01


def test_end_power():
    assert [end_power(s) for s in FUNCTIONS.values()] == [2, 1, math.inf, math.inf]
    assert end_power(LearnedSchedule()) == math.inf
    assert [end_power(s) for s in TABLES.values()] == [1] * len(TABLES)
    assert end_power(S.Sigmoid(min_signal=0.0)) == 1
    assert end_power(S.Sigmoid(min_signal=0.01)) == 1  # by the end at data alone

"""What the tables of `test_affine` and `test_order` do not say of the solvers of the flow and of its equation."""

import math

import pytest
import torch
from oracles import GaussianData, Spy
from test_affine import COVS, MEAN, D

from undiffuse import solvers
from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.process import schedule as S
from undiffuse.process.level import NoiseLevel
from undiffuse.sample import trajectory
from undiffuse.solvers import DDIM, EDM, EulerMaruyama, RungeKutta
from undiffuse.solvers.rates import rates

f64 = torch.float64
DATA = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
SCHEDULES = {
    "linear": S.linear(),
    "cosine": S.cosine(50),
    "sigmoid": S.Sigmoid(),
    "log-SNR": S.LinearLogSNR(),
    "learned": S.Learned(),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(),
    "exploding little": S.VarianceExploding(0.001, 0.5),
}


def none(draws: int) -> torch.Tensor:
    return torch.empty(draws, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_the_scales_are_their_differences(name):
    """Between the times of a table, where they do not jump."""
    schedule = SCHEDULES[name]
    t, h = torch.tensor([0.1234, 0.5057, 0.9111], dtype=f64), 1e-6
    low, high = schedule(t - h), schedule(t + h)
    for rate, below, above in zip(rates(schedule, schedule(t)), low[1:3], high[1:3], strict=True):
        torch.testing.assert_close(rate, (above - below) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_schedule_that_binds_its_scales_otherwise_has_no_rates():
    class Odd(S.Flow):
        def __call__(self, t):
            t, alpha, sigma, *rest = super().__call__(t)
            return NoiseLevel(t, 1.1 * alpha, 1.1 * sigma, *rest)

    odd = Odd()
    x, (t, s) = torch.ones(1, D, dtype=f64), grid(odd, times=[0.9, 0.4])
    for solver in (RungeKutta("heun", "t"), EulerMaruyama()):
        with pytest.raises(ConfigError, match="neither alpha² \\+ sigma², nor alpha \\+ sigma, nor alpha at 1"):
            solver.step(DATA.denoiser(odd), x, t, s, (), x[None])
    t, s = grid(odd, times=[0.6, 0.5])
    for variable in ("ratio", "angle"):
        found, _ = RungeKutta("rk4", variable).step(DATA.denoiser(odd), x, t, s, (), x[None])
        torch.testing.assert_close(found, DATA.flow(x, t, s), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_in_the_ratio_is_ddim(name):
    schedule, x = SCHEDULES[name], torch.ones(1, D, dtype=f64)
    levels = grid(schedule, 5)
    runs = [
        torch.stack([step.x for step in trajectory(DATA.denoiser(schedule), solver, levels, x, none)])
        for solver in (DDIM(), solvers.build("euler"), RungeKutta("euler", "t"), RungeKutta("euler", "angle"))
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(runs[2], runs[0], rtol=1e-9) == (name == "flow")
    assert not torch.allclose(runs[3], runs[0], rtol=1e-3)


def test_each_stage_is_at_a_level_of_the_schedule():
    schedule, x = S.LinearLogSNR(), torch.ones(1, D, dtype=f64)
    t, s = grid(schedule, times=[0.9, 0.4])
    middle = {
        "ratio": (t.sigma / t.alpha + s.sigma / s.alpha) / 2,
        "angle": torch.tan((torch.atan(t.sigma / t.alpha) + torch.atan(s.sigma / s.alpha)) / 2),
        "t": schedule(0.65).sigma / schedule(0.65).alpha,
    }
    for variable, u in middle.items():
        spy = Spy(DATA.denoiser(schedule))
        RungeKutta("rk4", variable).step(spy, x, t, s, (), x[:0])
        told = [level for _, level, _, _ in spy.seen]
        assert (told[0], told[3]) == (t, s)
        for level in told[1:3]:
            torch.testing.assert_close(level.sigma / level.alpha, u)
            assert level[:4] == schedule(level.t)[:4]
        assert [to for _, _, _, to in spy.seen] == [s, None, None, None]


@pytest.mark.parametrize("solver", [RungeKutta("heun"), RungeKutta("rk4", "angle"), EDM(2.0), EulerMaruyama()])
def test_single_precision_stays(solver):
    schedule, x = S.cosine(10), torch.ones(2, D)
    spy = Spy(DATA.denoiser(schedule))
    *_, last = trajectory(spy, solver, grid(schedule), x, lambda n: torch.ones(n, 2, D))
    assert {last.x.dtype} | {at.dtype for at, *_ in spy.seen} == {torch.float32}


# --- EDM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_edm_without_churn_is_heun_to_the_bit(name):
    schedule, x = SCHEDULES[name], torch.ones(1, D, dtype=f64)
    levels = grid(schedule, 6)
    quiet = (EDM(0.0), EDM(5.0, low=1e9, high=1e10), RungeKutta())
    runs = [
        [
            step.x
            for step in trajectory(DATA.denoiser(schedule), solver, levels, x, lambda n: torch.ones(n, 1, D, dtype=f64))
        ]
        for solver in quiet
    ]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*runs, strict=True))


def test_churn_holds_at_both_ends_of_its_range():
    t, s = grid(S.LinearLogSNR(), times=[0.7, 0.4])
    u, x, noise = float(t.sigma / t.alpha), torch.ones(1, D, dtype=f64), torch.ones(1, 1, D, dtype=f64)

    def walked(low: float, high: float) -> torch.Tensor:
        return EDM(5.0, low, high).step(DATA.denoiser(S.LinearLogSNR()), x, t, s, (1,), noise)[0]

    assert torch.equal(walked(u, u), walked(0.0, math.inf))
    for low, high in (0.0, u - 1e-9), (u + 1e-9, math.inf):
        assert not torch.equal(walked(low, high), walked(u, u))


def test_churn_stays_below_the_noisiest_level():
    x = torch.ones(1, D, dtype=f64)
    for schedule, most in ((S.linear(10), 1.0), (S.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0]), 0.8), (S.LinearLogSNR(), 1.0)):
        spy = Spy(DATA.denoiser(schedule))
        levels = grid(schedule, times=[most, most - 0.1, 0.3, 0.0])
        *_, last = trajectory(spy, EDM(100.0, 0, math.inf), levels, x, lambda n: torch.ones(n, 1, D, dtype=f64))
        assert bool(torch.isfinite(last.x).all())
        told = [float(level.t) for _, level, _, _ in spy.seen]
        assert told[0] == pytest.approx(most)
        assert max(told) <= most + 1e-12
        assert told[2] > most - 0.1 + 1e-3  # more noise, but no more than there is


def test_the_added_noise_brings_the_law_of_the_higher_level():
    """With inflation 1, x ~ q(x_t) becomes x ~ q(x_t'), t' the level that the denoiser is told first."""
    schedule = S.Flow()
    t, s = grid(schedule, times=[0.5, 0.4])
    for churn, share in ((0.1, 0.1), (5.0, math.sqrt(2) - 1)):
        spy = Spy(DATA.denoiser(schedule))
        solver = EDM(churn, 0, math.inf, 1.0)
        x = torch.tensor([[1.0], [0.0]], dtype=f64)
        solver.step(spy, x.expand(2, D), t, s, solver.init(x, [t, s]), (1 - x).expand(1, 2, D))
        told, level, _, _ = spy.seen[0]
        torch.testing.assert_close(level.sigma / level.alpha, (1 + share) * t.sigma / t.alpha)
        torch.testing.assert_close(told[0, 0], level.alpha / t.alpha)
        torch.testing.assert_close(told[1, 0] ** 2, level.sigma**2 - (level.alpha / t.alpha) ** 2 * t.sigma**2)


def test_settings():
    assert solvers.build("rk4", variable="t") == RungeKutta("rk4", "t")
    assert solvers.build("rk4") == RungeKutta("rk4", "angle")
    assert solvers.build("heun") == RungeKutta("heun", "angle")
    for settings in ({"variable": "log"}, {"method": "rk5"}):
        with pytest.raises(ConfigError, match=r"= '(log|rk5)': unknown. Use one of (ratio|euler), "):
            RungeKutta(**settings)
    with pytest.raises(ConfigError, match=r"heun: method = 'rk4': there is no such setting. Its settings are var"):
        solvers.build("heun", method="rk4")
    assert [RungeKutta(name).order for name in ("euler", "heun", "rk4")] == [1, 2, 4]
    assert solvers.build("edm") == EDM(40.0, 0.05, 50.0, 1.003)
    assert (EDM().order, EDM(inflation=1.0).order, EDM(0.0).order) == (None, 2, 2)
    assert (EDM().draws, EDM(0.0).draws, EDM().calls) == (1, 0, 2)
    for bad in ({"churn": -1.0}, {"low": 2.0, "high": 1.0}, {"low": -1.0}, {"inflation": 0.0}, {"churn": math.nan}):
        with pytest.raises(ConfigError, match="no noise can be added so"):
            EDM(**bad)

"""Properties of the Runge–Kutta and EDM solvers beyond the tables of `test_affine` and `test_order`."""

import math

import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from test_affine import COVS, MEAN, D

from undiffuse.denoising.denoiser import (
    Clipped,
    ConditionedDenoiser,
    NetworkDenoiser,
    Preconditioning,
    predicts_at_data,
)
from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.rates import scale_derivatives
from undiffuse.process.target import TARGETS
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.edm import EDM
from undiffuse.sampling.solvers.euler_maruyama import EulerMaruyama
from undiffuse.sampling.solvers.runge_kutta import RungeKutta
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

f64 = torch.float64
DATA = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
SCHEDULES = {
    "linear": DS.linear(),
    "cosine": DS.cosine(50),
    "sigmoid": S.Sigmoid(),
    "log-SNR": S.LinearLogSNR(),
    "learned": LearnedSchedule(),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(),
    "exploding little": S.VarianceExploding(0.001, 0.5),
}


def none(draws: int) -> torch.Tensor:
    return torch.empty(draws, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scale_derivatives_are_the_difference_quotients(name):
    """Between the times of a table, where the derivatives do not jump."""
    schedule = SCHEDULES[name]
    t, h = torch.tensor([0.1234, 0.5057, 0.9111], dtype=f64), 1e-6
    low, high = schedule(t - h), schedule(t + h)
    for rate, below, above in zip(scale_derivatives(schedule, schedule(t)), low[1:3], high[1:3], strict=True):
        torch.testing.assert_close(rate, (above - below) / (2 * h), rtol=1e-6, atol=1e-8)


def test_other_schedules_have_no_scale_derivatives():
    class Odd(S.Flow):
        def __call__(self, t):
            t, alpha, sigma, *rest = super().__call__(t)
            return NoiseLevel(t, 1.1 * alpha, 1.1 * sigma, *rest)

    odd = Odd()
    x, (t, s) = torch.ones(1, D, dtype=f64), time_grid(odd, times=[0.9, 0.4])
    for solver in (RungeKutta("heun", "t"), EulerMaruyama()):
        with pytest.raises(ConfigError, match="none of alpha² \\+ sigma², alpha \\+ sigma and alpha at 1"):
            solver.step(DATA.denoiser(odd), x, t, s, (), x[None])
    t, s = time_grid(odd, times=[0.6, 0.5])
    for variable in ("ratio", "angle"):
        found, _ = RungeKutta("rk4", variable).step(DATA.denoiser(odd), x, t, s, (), x[None])
        torch.testing.assert_close(found, DATA.flow(x, t, s), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_in_the_ratio_is_ddim(name):
    schedule, x = SCHEDULES[name], torch.ones(1, D, dtype=f64)
    levels = time_grid(schedule, 5)
    runs = [
        torch.stack([step.x for step in trajectory(DATA.denoiser(schedule), solver, levels, x, none)])
        for solver in (DDIM(), solvers.build("euler"), RungeKutta("euler", "t"), RungeKutta("euler", "angle"))
    ]
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(runs[2], runs[0], rtol=1e-9) == (name == "flow")
    assert not torch.allclose(runs[3], runs[0], rtol=1e-3)


def test_each_stage_is_at_a_level_of_the_schedule():
    schedule, x = S.LinearLogSNR(), torch.ones(1, D, dtype=f64)
    t, s = time_grid(schedule, times=[0.9, 0.4])
    middle = {
        "ratio": (t.sigma / t.alpha + s.sigma / s.alpha) / 2,
        "angle": torch.tan((torch.atan(t.sigma / t.alpha) + torch.atan(s.sigma / s.alpha)) / 2),
        "t": schedule(0.65).sigma / schedule(0.65).alpha,
    }
    for variable, u in middle.items():
        spy = Spy(DATA.denoiser(schedule))
        RungeKutta("rk4", variable).step(spy, x, t, s, (), x[:0])
        used = [level for _, level, _, _ in spy.seen]
        assert (used[0], used[3]) == (t, s)
        for level in used[1:3]:
            torch.testing.assert_close(level.sigma / level.alpha, u)
            assert level[:4] == schedule(level.t)[:4]
        assert [to for _, _, _, to in spy.seen] == [s, None, None, None]


@pytest.mark.parametrize("solver", [RungeKutta("heun"), RungeKutta("rk4", "angle"), EDM(2.0), EulerMaruyama()])
def test_float32_stays_float32(solver):
    schedule, x = DS.cosine(10), torch.ones(2, D)
    spy = Spy(DATA.denoiser(schedule))
    *_, last = trajectory(spy, solver, time_grid(schedule), x, lambda n: torch.ones(n, 2, D))
    assert {last.x.dtype} | {at.dtype for at, *_ in spy.seen} == {torch.float32}


# --- the ends of a grid --------------------------------------------------------------------------------------------


class OfATarget(torch.nn.Module):
    """The network of a target whose denoiser is exact on N(0, 1): y = a E[x given x_t] + b E[ε given x_t]."""

    def __init__(self, target: str, schedule: S.Schedule) -> None:
        super().__init__()
        self.target, self.schedule, self.times = TARGETS[target], schedule, []

    def forward(self, x_t, time, cond=None):
        self.times.append(float(time[0]))
        level = self.schedule(time[:1].double())
        total = level.alpha**2 + level.sigma**2
        return self.target.combine(level.alpha / total * x_t, level.sigma / total * x_t, level)


@pytest.mark.parametrize(
    ("target", "clip", "stages"),
    [("flow", False, 4), ("v", False, 4), ("eps", False, 4), ("edm", False, 4), ("x", False, 1), ("flow", True, 1)],
)
def test_the_step_into_data_has_its_stages_where_the_denoiser_predicts_there(target, clip, stages):
    """eps cannot be solved at alpha = 0, so its schedule starts below; the network gets no time below t_min."""
    schedule = S.Sigmoid() if target == "eps" else S.Flow()
    network = OfATarget(target, schedule)
    denoise = NetworkDenoiser(network, schedule, TARGETS[target], Preconditioning("none", "t"))
    assert predicts_at_data(denoise) == predicts_at_data(ConditionedDenoiser(denoise, None)) == (target != "x")
    denoise = Clipped(denoise, -9, 9) if clip else denoise
    assert predicts_at_data(denoise) == (stages == 4)
    x, (t, s) = torch.ones(1, 1, dtype=f64), time_grid(schedule, times=[0.1, 0.0])
    found, _ = RungeKutta("rk4", "angle").step(denoise, x, t, s, (), x[:0])
    assert len(network.times) == stages
    assert min(network.times) == (schedule.t_min if stages == 4 else 0.1)
    exact = x / torch.hypot(t.alpha, t.sigma)  # x_t/√(alpha² + sigma²) does not change along the flow of N(0, 1)
    assert float((found - exact).abs()) < (1e-4 if stages == 4 else 0.1)
    low, _ = RungeKutta("rk4", "angle", "low").step(denoise, x, t, s, (), x[:0])
    assert torch.equal(low, DDIM().step(denoise, x, t, s, (), x[:0])[0])


def test_a_head_of_probabilities_does_not_predict_at_data():
    denoise = NetworkDenoiser(torch.nn.Identity(), S.Flow(), TARGETS["flow"], Preconditioning(), categorical=True)
    assert not predicts_at_data(denoise)


def test_data_without_a_density_are_free_of_noise_only_after_a_step_by_ddim():
    """From two (almost) points with noise of std 0.05, the average of slopes keeps a sixth of the noise."""
    data = MixtureData(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1), 1e-12))
    schedule = S.Flow()
    t, s = time_grid(schedule, times=[0.05, 0.0])
    x = 0.95 + 0.05 * torch.ones(1, 1, dtype=f64)
    ends = [
        float(RungeKutta("rk4", "angle", end).step(data.denoiser(schedule), x, t, s, (), x[:0])[0])
        for end in ("high", "low")
    ]
    assert ends[0] - 1 == pytest.approx(0.05 / 0.95 / 6, rel=0.05)
    assert ends[1] == pytest.approx(1, abs=1e-6)


# --- EDM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_edm_without_churn_is_heun_to_the_bit(name):
    schedule, x = SCHEDULES[name], torch.ones(1, D, dtype=f64)
    levels = time_grid(schedule, 6)
    quiet = (EDM(0.0), EDM(5.0, low=1e9, high=1e10), RungeKutta(end="low"))
    runs = [
        [
            step.x
            for step in trajectory(DATA.denoiser(schedule), solver, levels, x, lambda n: torch.ones(n, 1, D, dtype=f64))
        ]
        for solver in quiet
    ]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*runs, strict=True))


def test_churn_range_includes_both_ends():
    t, s = time_grid(S.LinearLogSNR(), times=[0.7, 0.4])
    u, x, noise = float(t.sigma / t.alpha), torch.ones(1, D, dtype=f64), torch.ones(1, 1, D, dtype=f64)

    def sampled(low: float, high: float) -> torch.Tensor:
        return EDM(5.0, low, high).step(DATA.denoiser(S.LinearLogSNR()), x, t, s, (1,), noise)[0]

    assert torch.equal(sampled(u, u), sampled(0.0, math.inf))
    for low, high in (0.0, u - 1e-9), (u + 1e-9, math.inf):
        assert not torch.equal(sampled(low, high), sampled(u, u))


def test_churn_stays_below_the_noisiest_level():
    x = torch.ones(1, D, dtype=f64)
    for schedule, most in (
        (DS.linear(10), 1.0),
        (DS.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0]), 0.8),
        (S.LinearLogSNR(), 1.0),
    ):
        spy = Spy(DATA.denoiser(schedule))
        levels = time_grid(schedule, times=[most, most - 0.1, 0.3, 0.0])
        *_, last = trajectory(spy, EDM(100.0, 0, math.inf), levels, x, lambda n: torch.ones(n, 1, D, dtype=f64))
        assert bool(torch.isfinite(last.x).all())
        used = [float(level.t) for _, level, _, _ in spy.seen]
        assert used[0] == pytest.approx(most)
        assert max(used) <= most + 1e-12
        assert used[2] > most - 0.1 + 1e-3  # more noise, within the schedule


def test_added_noise_gives_the_distribution_of_the_higher_level():
    """With inflation 1, x ~ q(x_t) becomes x ~ q(x_t'), with t' the level of the first network call."""
    schedule = S.Flow()
    t, s = time_grid(schedule, times=[0.5, 0.4])
    for churn, share in ((0.1, 0.1), (5.0, math.sqrt(2) - 1)):
        spy = Spy(DATA.denoiser(schedule))
        solver = EDM(churn, 0, math.inf, 1.0)
        x = torch.tensor([[1.0], [0.0]], dtype=f64)
        solver.step(spy, x.expand(2, D), t, s, solver.init(x, [t, s]), (1 - x).expand(1, 2, D))
        used, level, _, _ = spy.seen[0]
        torch.testing.assert_close(level.sigma / level.alpha, (1 + share) * t.sigma / t.alpha)
        torch.testing.assert_close(used[0, 0], level.alpha / t.alpha)
        torch.testing.assert_close(used[1, 0] ** 2, level.sigma**2 - (level.alpha / t.alpha) ** 2 * t.sigma**2)


def test_settings():
    assert solvers.build("rk4", variable="t") == RungeKutta("rk4", "t")
    for settings in ({"variable": "log"}, {"method": "rk5"}, {"end": "middle"}):
        with pytest.raises(ConfigError, match=r"= '(log|rk5|middle)': unknown. Use one of (ratio|euler|high), "):
            RungeKutta(**settings)
    with pytest.raises(ConfigError, match=r"heun: method = 'rk4': there is no such setting. Its settings are var"):
        solvers.build("heun", method="rk4")
    assert [RungeKutta(name).order for name in ("euler", "heun", "rk4")] == [1, 2, 4]
    assert (EDM().order, EDM(inflation=1.0).order, EDM(0.0).order) == (None, 2, 2)
    assert (EDM().noises_per_step, EDM(0.0).noises_per_step, EDM().calls) == (1, 0, 2)
    for bad in ({"churn": -1.0}, {"low": 2.0, "high": 1.0}, {"low": -1.0}, {"inflation": 0.0}, {"churn": math.nan}):
        with pytest.raises(ConfigError, match="these settings are out of range"):
            EDM(**bad)

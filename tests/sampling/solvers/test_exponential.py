"""The exponential family: its integrals to fourteen digits, its identities, and mistakes that lower the order."""

import math
from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from mistakes import OtherThird, WrongSubscript
from oracles import GaussianData, Spy
from solver_table import PROCESSES
from test_affine import CHAINS, COVS, MEAN, probe
from test_order import slope

from undiffuse.denoising.denoiser import Prediction
from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import NoiseLevel, vp_level
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.dpm_singlestep import SingleStep
from undiffuse.sampling.solvers.exponential import advance, half_log_snr_gap, moments, weights
from undiffuse.sampling.solvers.unipc import UniPC
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

f64 = torch.float64
DATA = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
FAMILY = [
    SingleStep(1),
    SingleStep(2),
    SingleStep(3),
    *(Multistep(points, rule=rule) for points in (1, 2, 3, 4) for rule in ("exact", "bh2")),
    Multistep(3, start="low"),
    *(UniPC(points, start=start) for points in (1, 2, 3) for start in ("high", "low")),
]


# --- integrals -----------------------------------------------------------------------------------------------------


def exact_moment(H: float, k: int) -> mpmath.mpf:
    """H ∫_0^1 e^(−H(1 − v)) v^k dv = H e^(−H) Σ_n H^n/n!/(n + k + 1), in fifty digits."""
    with mpmath.workdps(60):
        H = mpmath.mpf(H)
        return H * mpmath.exp(-H) * mpmath.nsum(lambda n: H**n / mpmath.factorial(n) / (n + k + 1), [0, 40 + 6 * H])


@pytest.mark.parametrize("H", [1e-12, 1e-5, 0.03, 0.5, 0.999, 1.0, 1.001, 3.7, 14.0])
def test_moments_keep_thirteen_digits(H):
    for k, value in enumerate(moments(H, 5)):
        assert abs(value / exact_moment(H, k) - 1) < 1e-13
    assert moments(H, 2) == moments(H, 5)[:2] or H < 1


def test_moments_at_the_ends():
    assert moments(0.0, 4) == [0, 0, 0, 0]
    assert moments(math.inf, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize("H", [1e-9, 0.2, 2.5, 13.0])
@pytest.mark.parametrize("nodes", [(-1.0,), (0.5,), (-0.3, -7.0), (1.0, -1.0, -2.0), (-0.01, -1.0, -40.0)])
def test_weights_integrate_polynomials_exactly(H, nodes):
    """Σ_j W_j v_j^k = M_k for k = 1 ... n: the conditions of order, and as many as there are nodes."""
    for k in range(1, len(nodes) + 1):
        terms = [w * v**k for w, v in zip(weights(H, nodes), nodes, strict=True)]
        assert sum(terms) == pytest.approx(moments(H, k + 1)[k], rel=1e-12, abs=1e-13 * max(map(abs, terms)))


def test_rules_are_of_a_single_node():
    """B(h)/2 in place of M_1 [Zhao23], equal to second order in H; more nodes are integrated exactly."""
    assert weights(0.3, [-2.0], "bh1") == [0.3 / 2 / -2]
    assert weights(0.3, [-2.0], "bh2") == [-math.expm1(-0.3) / 2 / -2]
    for rule in ("bh1", "bh2"):
        assert weights(1e-4, [0.5], rule)[0] == pytest.approx(weights(1e-4, [0.5])[0], rel=1e-4)
        assert weights(0.3, [-2.0, -1.0], rule) == weights(0.3, [-2.0, -1.0], "exact")
    assert weights(0.3, [], "bh2") == []


def test_the_gap_is_half_of_the_log_snr_and_keeps_its_digits():
    def flow(t: float) -> NoiseLevel:
        return S.Flow()(t)

    with mpmath.workdps(50):
        for t, s in ((0.7, 0.2), (0.7, 0.7 - 1e-9), (0.999, 0.001), (0.2, 0.7), (1e-5, 0.99e-5)):
            at = [mpmath.log((1 - mpmath.mpf(v)) / mpmath.mpf(v)) for v in (s, t)]
            assert abs(half_log_snr_gap(flow(t), flow(s)) / (at[0] - at[1]) - 1) < 1e-14 * max(1, 0.1 / abs(t - s))
    assert half_log_snr_gap(flow(1.0), flow(0.5)) == half_log_snr_gap(flow(0.5), flow(0.0)) == math.inf
    assert half_log_snr_gap(flow(0.4), flow(0.4)) == 0


# --- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_one_point_is_ddim_and_with_eta_1_ancestral(chain):
    formula, times = CHAINS[chain]
    schedule = PROCESSES[formula].schedule
    for pair in (SingleStep(1), DDIM()), (Multistep(1), DDIM()), (Multistep(1, 1.0), Ancestral("small")):
        a, b = (probe(solver, DATA.denoiser(schedule), time_grid(schedule, times=times)) for solver in pair)
        for left, right in zip(a, b, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)


@dataclass(frozen=True)
class InLambda:
    """x̂ is a polynomial in lambda and does not depend on x_t."""

    clean: np.polynomial.Polynomial
    schedule: S.Schedule

    def __call__(self, x_t, level, cond=None, next_level=None) -> Prediction:
        x = torch.full_like(x_t, self.clean(float(level.log_snr) / 2))
        return Prediction(x, (x_t - level.alpha * x) / level.sigma)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("points", [1, 2, 3, 4])
def test_a_polynomial_in_lambda_is_integrated_exactly_by_as_many_points(points, eta):
    """x_s − alpha_s p(lambda_s) = (sigma_s/sigma_t) e^(−eta h) (x_t − alpha_t p(lambda_t)), where p + p'/a = x̂."""
    p = clean = np.polynomial.Polynomial([0.3, -1.0, 0.4, 0.2][:points])
    for _ in range(points):
        p = clean - p.deriv() / (1 + eta)
    denoise = InLambda(clean, S.LinearLogSNR())
    *before, t, s = time_grid(denoise.schedule, times=[0.9, 0.8, 0.72, 0.6, 0.3])
    x = torch.full((1, 1), 0.8, dtype=f64)
    known = tuple((denoise(x, level).x, level) for level in before[::-1])[: points - 1]
    state = (torch.zeros((), dtype=f64), *known)
    x_s, _ = Multistep(points, eta).step(denoise, x, t, s, state, torch.zeros(1, 1, 1, dtype=f64))
    left, right = float(t.log_snr) / 2, float(s.log_snr) / 2
    kept = float(s.sigma / t.sigma) * math.exp(-eta * (right - left))
    torch.testing.assert_close(x_s, s.alpha * p(right) + kept * (x - t.alpha * p(left)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", FAMILY, ids=str)
def test_steps_into_data_and_out_of_pure_noise_are_ddim_and_cost_one_call(solver):
    schedule, x = S.Flow(), torch.tensor([[0.3, 1.0, -2.0, 0.1]], dtype=f64)
    levels = time_grid(schedule, times=[1.0, 0.7, 0.4, 0.2, 0.0])
    spy = Spy(DATA.denoiser(schedule))
    states = [step.x for step in trajectory(spy, solver, levels, x, lambda n: x[None][:n])]
    assert all(float(level.sigma) > 0 for _, level, _, _ in spy.seen)
    first, _ = DDIM().step(DATA.denoiser(schedule), x, levels[0], levels[1], (), x)
    torch.testing.assert_close(states[1], first, rtol=1e-14, atol=1e-14)
    at_last = [x_t for x_t, level, _, _ in spy.seen if level.t == levels[3].t]
    assert len(at_last) == 1
    torch.testing.assert_close(states[-1], DATA.predict(at_last[0], levels[3]).x, rtol=1e-14, atol=1e-14)
    assert {float(to.t) for _, _, _, to in spy.seen} == {0.7, 0.4, 0.2, 0.0}
    calls = len(spy.seen)
    alone = [step.x for step in trajectory(spy, solver, levels[1::3], x, lambda n: x[None][:n])][-1]
    assert len(spy.seen) == calls + 1
    torch.testing.assert_close(alone, DATA.predict(x, levels[1]).x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", FAMILY, ids=str)
def test_levels_close_together_lose_no_digits(solver):
    """At 1e-9 in log-SNR the step is Euler's, to the square of that."""
    levels = [vp_level(torch.tensor(1 - k / 10, dtype=f64), torch.tensor(1.0 + k * 1e-9, dtype=f64)) for k in range(6)]
    x = torch.tensor([[0.3, 1.0, -2.0, 0.1]], dtype=f64)
    denoise = DATA.denoiser(S.LinearLogSNR(1 + 1e-8, 1 - 1e-8))
    *_, last = trajectory(denoise, solver, levels, x, lambda n: x[None][:n])
    exact = DATA.flow(x, levels[0], levels[-1])
    torch.testing.assert_close(last.x, exact, rtol=1e-14, atol=1e-14)
    assert not torch.equal(last.x, x)


@pytest.mark.parametrize("solver", FAMILY, ids=str)
def test_a_step_is_pure_and_at_least_float32(solver):
    schedule = S.LinearLogSNR()
    x = torch.tensor([[0.3, 1.0, -2.0, 0.1]])
    levels, none = time_grid(schedule, 6), torch.empty(0, 1, 4)
    start = solver.step(DATA.denoiser(schedule), x, levels[0], levels[1], solver.init(x, levels), none)
    once, twice = (
        solver.step(DATA.denoiser(schedule), start[0], levels[1], levels[2], start[1], none) for _ in range(2)
    )
    assert torch.equal(once[0], twice[0])
    assert isinstance(once[1], tuple)
    assert once[0].dtype == torch.float32
    low = x.bfloat16()
    assert advance(low, levels[0], levels[1], [(low, levels[0])]).dtype == torch.float32


# --- orders --------------------------------------------------------------------------------------------------------


def test_a_wrong_subscript_costs_an_order():
    steps = [64, 128, 256, 512]
    assert abs(slope(WrongSubscript(2, rule="bh2"), "log-SNR", steps).order - 1) < 0.15
    assert abs(slope(OtherThird(start="high"), "log-SNR", steps).order - 2) < 0.15


# --- refusals ------------------------------------------------------------------------------------------------------


def test_settings_out_of_range():
    for build in (
        lambda: SingleStep(4),
        lambda: SingleStep(0),
        lambda: Multistep(5),
        lambda: Multistep(0),
        lambda: Multistep(2, -0.1),
        lambda: Multistep(2, math.nan),
        lambda: Multistep(2, rule="heun"),
        lambda: Multistep(2, start="slow"),
        lambda: Multistep(2, end="slow"),
        lambda: UniPC(4),
        lambda: UniPC(0),
        lambda: UniPC(2, "bh3"),
        lambda: UniPC(2, start="slow"),
    ):
        with pytest.raises(ConfigError, match=r"error\[SOLVER\] (order|points) ?=.*: (there is no such|unknown order)"):
            build()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_single_step_declares_as_many_calls_as_its_order(order):
    assert SingleStep(order).calls == order


def test_the_order_of_unipc_is_three_at_most_where_it_starts_low():
    orders = {start: [UniPC(points, start=start).order for points in (1, 2, 3)] for start in ("high", "low")}
    assert orders == {"high": [2, 3, 4], "low": [2, 3, 3]}

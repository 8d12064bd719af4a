"""Flow maps of Gaussian and mixture data, which have closed forms; float64 throughout."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.denoising.denoiser import ConditionedDenoiser, NetworkDenoiser, Preconditioning, Prediction
from undiffuse.denoising.guidance import ClassifierFree
from undiffuse.denoising.two_times import (
    average_velocity,
    flow_map,
    level_at_straight_time,
    log_ratio,
    map_log_det,
    predict_to,
    predict_to_with_slope,
    straight_scale,
    straight_time,
)
from undiffuse.likelihood.few_calls import few_call_nll
from undiffuse.model.consistency import few_call_sampler, noisiest_level
from undiffuse.model.flow_map import (
    OBJECTIVES,
    WIDTH,
    flow_map_loss,
    lagrangian_with_slope,
    map_levels,
    slope_estimate,
    stencil,
)
from undiffuse.networks.condition import Condition
from undiffuse.networks.dit import DiT
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.prior import prior_sample, prior_scale
from undiffuse.process.target import TARGETS
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.flow_map import FlowMapSampling
from undiffuse.sampling.trajectory import last_step, trajectory

f64 = torch.float64
SCHEDULES = {
    "flow": S.Flow(),
    "linear_log_snr": S.LinearLogSNR(),
    "exploding": S.VarianceExploding(0.002, 80.0),
    "sigmoid": S.Sigmoid(),
}
GAUSSIAN = GaussianData(torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0]))
MIXTURE = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.02], [0.3]]))
DATA = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@dataclass
class ExactMap:
    """The pair of the map X_{t→s} of ``data``, solved from x_t and x_s = ``data.flow``; ``change`` is added to u."""

    data: GaussianData | MixtureData
    schedule: S.Schedule
    change: torch.Tensor | float = 0.0
    slope_change: torch.Tensor | float = 0.0

    def __call__(self, x_t, level, cond=None, next_level=None):
        ends = level.t.expand(len(x_t)) if cond is None or cond.end_time is None else cond.end_time
        pairs = [
            self._pair(x_t[i : i + 1], self.schedule(level.t.expand(len(x_t))[i]), self.schedule(ends[i]))
            for i in range(len(x_t))
        ]
        x, eps = (torch.cat(part) for part in zip(*pairs, strict=True))
        at = level.broadcast_like(x_t)
        wrong = self.change / (at.alpha + at.sigma)
        return Prediction(x - at.sigma * wrong, eps + at.alpha * wrong)

    def predict_with_slope(self, x_t, level, cond=None):
        """The slope is the logarithm of the Jacobian by differences of the exact map, solved from `map_log_det`."""
        ends = level.t if cond is None or cond.end_time is None else cond.end_time
        slopes = [
            self._slope(x_t[i], self.schedule(level.t.expand(len(x_t))[i]), self.schedule(ends.expand(len(x_t))[i]))
            for i in range(len(x_t))
        ]
        return self(x_t, level, cond), torch.stack(slopes) + self.slope_change

    def _slope(self, x_t, t, s):
        if t.t == s.t:
            return exact_slope(self.data, x_t[None], t)[0]
        h, moved = 1e-5 * straight_scale(t), []
        for i in range(len(x_t)):  # the maps of both data act on each element alone
            step = h * (torch.arange(len(x_t)) == i)
            ends = [self.data.flow((x_t + sign * step)[None], t, s)[0, i] for sign in (1, -1)]
            moved.append((ends[0] - ends[1]) / (2 * h))
        grown = torch.log(torch.stack(moved))
        return (torch.log(s.sigma / t.sigma) - grown) / (log_ratio(s) - log_ratio(t))

    def _pair(self, x_t, t, s):
        if t.t == s.t:
            return self.data.predict(x_t, t)[:2]
        x_s = self.data.flow(x_t, t, s)
        d = s.sigma * t.alpha - t.sigma * s.alpha
        return (s.sigma * x_t - t.sigma * x_s) / d, (t.alpha * x_s - s.alpha * x_t) / d


def exact_slope(data, x_t, t):
    """alpha ∂x̂_i/∂x_i at a level () or (B,), by autograd."""
    with torch.enable_grad():
        at = x_t.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(data.predict(at, t).x.sum(), at)
    return t.alpha.reshape(-1, 1) * gradient


def level_at(schedule, *ratios):
    """The levels with these sigma/alpha, (B,)."""
    ratio = torch.tensor(ratios, dtype=f64)
    return level_at_straight_time(schedule, ratio / (1 + ratio))


def states(data, t):
    """A point of the flow at each level of ``t``."""
    n, dims = len(t.t), len(data.means[0])
    at = torch.linspace(-1.5, 1.5, n * dims, dtype=f64).reshape(n, dims)
    return t.alpha[:, None] * data.mean() + torch.hypot(t.alpha, t.sigma)[:, None] * at


# --- the parametrization ----------------------------------------------------------------------------------------------


@every_schedule
def test_the_pair_is_the_mean_of_the_predictions_along_the_flow(schedule):
    """x̂ over alpha/sigma and ε̂ over sigma/alpha, on one trajectory of a mixture; u over sigma/(alpha + sigma)."""
    t, s = (schedule(level.t[0]) for level in (level_at(schedule, 3.0), level_at(schedule, 0.2)))
    x_t = torch.tensor([[0.7]], dtype=f64) * t.alpha + t.sigma * 0.3
    spy = Spy(MIXTURE.denoiser(schedule))
    predict_to(spy, x_t, t, s)
    _, at, cond, next_level = spy.seen[0]
    assert (at, next_level, cond.end_time.tolist()) == (t, s, [float(s.t)])

    def along(part, at):
        ratio = {"x": 1 / at, "eps": at, "u": at / (1 - at)}[part]
        level = schedule(level_at(schedule, ratio).t[0])
        x, eps, _ = MIXTURE.predict(MIXTURE.flow(x_t, t, level), level)
        return float({"x": x, "eps": eps, "u": eps - x}[part])

    def mean(part, start, end):
        """Of equal weights from ``start`` to ``end``: 20 points of Gauss and Legendre in the logarithm."""
        points, weights = np.polynomial.legendre.leggauss(20)
        at = np.exp(math.log(start) + (points + 1) / 2 * math.log(end / start))
        values = [w * p * along(part, p) for p, w in zip(at, weights, strict=True)]
        return sum(values) * math.log(end / start) / 2 / (end - start)

    denoise = ExactMap(MIXTURE, schedule)
    x, eps, _ = predict_to(denoise, x_t, t, s)
    assert float(x) == pytest.approx(mean("x", 1 / 3.0, 1 / 0.2), rel=1e-6)
    assert float(eps) == pytest.approx(mean("eps", 3.0, 0.2), rel=1e-6)
    assert float(average_velocity(denoise, x_t, t, s)) == pytest.approx(mean("u", 0.75, 1 / 6), rel=1e-6)


def test_for_flow_matching_the_map_is_a_step_with_the_average_velocity():
    schedule, t, s = S.Flow(), S.Flow()(torch.tensor(0.8)), S.Flow()(torch.tensor(0.3))
    x_t, denoise = torch.tensor([[0.4, -2.0]], dtype=f64), ExactMap(GAUSSIAN, schedule)
    expected = x_t + (s.t - t.t) * average_velocity(denoise, x_t, t, s)
    torch.testing.assert_close(flow_map(denoise, x_t, t, s), expected, rtol=1e-13, atol=0)
    assert float(straight_time(t)) == pytest.approx(0.8)
    assert float(straight_scale(t)) == pytest.approx(1)


@every_schedule
def test_in_straight_coordinates_every_map_is_such_a_step(schedule):
    t, s = level_at(schedule, 5.0, 0.1, 2.0), level_at(schedule, 0.02, 0.5, 2.0)
    x_t, denoise = states(GAUSSIAN, t), ExactMap(GAUSSIAN, schedule)
    z_t, z_s = x_t / straight_scale(t)[:, None], flow_map(denoise, x_t, t, s) / straight_scale(s)[:, None]
    u = average_velocity(denoise, x_t, t, s)
    torch.testing.assert_close(z_s, z_t + (straight_time(s) - straight_time(t))[:, None] * u, rtol=1e-10, atol=1e-10)
    assert torch.equal(level_at_straight_time(schedule, straight_time(t)).t.round(decimals=9), t.t.round(decimals=9))


@every_schedule
def test_on_gaussian_data_the_map_is_affine(schedule):
    """X_{t→s}(x) = alpha_s m + √(V_s/V_t)(x − alpha_t m), and at s = t the velocity is that of the denoiser."""
    t, s = schedule(level_at(schedule, 4.0).t[0]), schedule(level_at(schedule, 0.1).t[0])
    x_t, m, c = torch.tensor([[0.3, 2.0]], dtype=f64), GAUSSIAN.m, GAUSSIAN.cov
    V_t, V_s = (v.alpha**2 * c + v.sigma**2 for v in (t, s))
    denoise = ExactMap(GAUSSIAN, schedule)
    expected = s.alpha * m + torch.sqrt(V_s / V_t) * (x_t - t.alpha * m)
    torch.testing.assert_close(flow_map(denoise, x_t, t, s), expected, rtol=1e-12, atol=1e-12)
    x, eps, _ = GAUSSIAN.predict(x_t, t)
    torch.testing.assert_close(average_velocity(denoise, x_t, t, t), eps - x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@every_schedule
def test_maps_compose(schedule, data):
    """X_{s→r} ∘ X_{t→s} = X_{t→r}, also through the solver with any number of calls."""
    denoise, n = ExactMap(data, schedule), 3
    levels = [schedule(level_at(schedule, ratio).t[0]) for ratio in (8.0, 1.5, 0.4, 0.05)]
    x = torch.linspace(-1, 1, n * len(data.means[0]), dtype=f64).reshape(n, -1) * straight_scale(levels[0])
    direct = flow_map(denoise, x, levels[0], levels[-1])
    torch.testing.assert_close(direct, torch.cat([data.flow(row[None], levels[0], levels[-1]) for row in x]))
    moved = x
    for t, s in pairwise(levels):
        moved = flow_map(denoise, moved, t, s)
    torch.testing.assert_close(moved, direct, rtol=1e-9, atol=1e-9)
    sampled = last_step(trajectory(denoise, FlowMapSampling(), levels, x, lambda k: torch.zeros(k, *x.shape)))
    torch.testing.assert_close(sampled.x, direct, rtol=1e-9, atol=1e-9)
    back = flow_map(denoise, direct, levels[-1], levels[0])
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)


def test_one_call_draws_from_a_mixture():
    """Quantiles of the prior become those of the data, F_0⁻¹(F_1(x)), in one step from the noisiest level."""
    schedule = S.Flow()
    sampler = few_call_sampler(schedule, 1, "flow_map")
    levels = sampler.noise_levels(schedule)
    z = torch.linspace(-2, 2, 9, dtype=f64)[:, None]
    x = prior_sample(levels[0], z)
    drawn = last_step(trajectory(ExactMap(MIXTURE, schedule), sampler.build_solver(), levels, x, lambda k: z[None][:0]))
    data = S.Flow()(torch.tensor(0.0))
    quantiles = MIXTURE.cdf(drawn.x, data)
    torch.testing.assert_close(quantiles, MIXTURE.cdf(x, levels[0]), rtol=1e-9, atol=1e-9)
    assert float((quantiles - torch.special.ndtr(z)).abs().max()) < 0.02  # the prior is that of sigma/alpha = 80


# --- the objectives ---------------------------------------------------------------------------------------------------


def residual(name, schedule, data, change=0.0, width=1e-4, velocity=None):
    t, s = level_at(schedule, 6.0, 1.0, 0.5, 3.0), level_at(schedule, 0.05, 0.2, 0.5, 0.01)
    denoise = ExactMap(data, schedule, change)
    return OBJECTIVES[name](denoise, velocity or batched_velocity(data, schedule), states(data, t), t, s, width=width)


def batched_velocity(data, schedule):
    exact = ExactMap(data, schedule)

    def velocity(x_t, level):
        x, eps, _ = exact(x_t, level)
        return eps - x

    return velocity


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("name", OBJECTIVES)
@every_schedule
def test_an_objective_is_zero_and_stationary_at_the_exact_map_alone(schedule, name, data):
    assert float(residual(name, schedule, data).abs().max()) < 2e-6
    change = torch.zeros((), dtype=f64, requires_grad=True)
    loss = residual(name, schedule, data, change).square().mean()
    (slope,) = torch.autograd.grad(loss, change)
    assert abs(float(slope)) < 1e-5
    for wrong in (0.1, -0.1):  # of u
        losses = flow_map_loss(residual(name, schedule, data, wrong))
        assert losses.shape == (4,)
        assert float(losses.min()) > 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_error_of_the_differences_is_of_second_order(name):
    errors = [float(residual(name, S.LinearLogSNR(), MIXTURE, width=w).norm()) for w in (0.08, 0.04, 0.02)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_an_objective_by_hand():
    """u = a + b τ_s + c τ_t + d z in straight coordinates, in which both equations are polynomials."""
    a, b, c, d, v = 0.3, 0.7, -0.4, 0.2, 1.1
    schedule = S.LinearLogSNR()
    t, s = level_at(schedule, 2.0), level_at(schedule, 0.25)
    tau_t, tau_s = 2 / 3, 0.2

    class Map:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, x_t, level, cond=None, next_level=None):
            end = straight_time(schedule(cond.end_time))
            u = a + b * end + c * straight_time(level) + d * float(x_t) / float(straight_scale(level))
            at = level.broadcast_like(x_t)
            return Prediction(
                (x_t - at.sigma * u) / (at.alpha + at.sigma), (x_t + at.alpha * u) / (at.alpha + at.sigma)
            )

    z = 0.9
    x_t = z * straight_scale(t)[:, None]
    u = a + b * tau_s + c * tau_t + d * z
    found = OBJECTIVES["meanflow"](Map(), lambda x, level: torch.full_like(x, v), x_t, t, s, width=1e-3)
    assert float(found) == pytest.approx(u - (v - (tau_t - tau_s) * (c + d * v)), rel=1e-9)
    found = OBJECTIVES["lagrangian"](Map(), lambda x, level: x, x_t, t, s, width=1e-3)
    at_s = (z + (tau_s - tau_t) * u) * float(straight_scale(s))
    assert float(found) == pytest.approx(tau_s * (1 - tau_s) * (u + (tau_s - tau_t) * b - at_s), rel=1e-5)


def test_meanflow_may_take_the_velocity_from_pairs_of_data_and_noise():
    """The residual's mean over ε − x given x_t is 0 at the exact map, of which one ε − x alone is far."""
    schedule, exact = S.LinearLogSNR(), batched_velocity(GAUSSIAN, S.LinearLogSNR())
    apart = [
        residual("meanflow", schedule, GAUSSIAN, velocity=lambda x, level, d=d: exact(x, level) + d)
        for d in (-0.5, 0.5)
    ]
    assert float(apart[0].abs().min()) > 0.02
    assert float((apart[0] + apart[1]).abs().max()) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_reaches_the_velocity_nor_the_goal(name):
    """The gradient of the Lagrangian residual is that of the map's derivative, MeanFlow's that of u."""
    schedule, change = S.Flow(), torch.zeros((), dtype=f64, requires_grad=True)
    t, s = level_at(schedule, 2.0), level_at(schedule, 0.25)

    def velocity(x, level):
        return x * (1 + change)

    denoise = ExactMap(GAUSSIAN, schedule, change)
    found = OBJECTIVES[name](denoise, velocity, states(GAUSSIAN, t), t, s, width=1e-3)
    slopes = torch.stack([torch.autograd.grad(value, change, retain_graph=True)[0] for value in found[0]])
    # u changes by 1, in Z_{t→s} − z = (τ_s − τ_t) u too, whose derivative is u where u is constant
    expected = 1.0 if name == "meanflow" else 0.2 * 0.8
    torch.testing.assert_close(slopes, torch.full_like(slopes, expected), rtol=1e-6, atol=0)


@every_schedule
def test_levels_of_training(schedule):
    u, r = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0), dtype=f64)
    t, s = map_levels(schedule, u, r)
    assert float((t.t == s.t).double().mean()) == pytest.approx(0.25, abs=0.03)
    cleanest = float(s.t.min())
    assert float((s.t == cleanest).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert bool((s.t <= t.t).all())
    for level in (t, s):
        low, high, half = stencil(schedule, level, WIDTH)
        torch.testing.assert_close(straight_time(high) - straight_time(low), 2 * half, rtol=1e-4, atol=1e-9)
    top = straight_time(noisiest_level(schedule))
    assert float(straight_time(t).max()) > 0.97 * float(top)
    (noisiest,) = straight_time(map_levels(schedule, torch.ones(1), torch.zeros(1))[0])
    assert float(noisiest) == pytest.approx(float(top - WIDTH * top * (1 - top)), rel=1e-6)
    inner = (s.t > cleanest) & (s.t < t.t)
    tau = [torch.logit(straight_time(level)[inner]) for level in (t, s)]
    bottom = torch.logit(straight_time(s).min())
    share = (tau[1] - bottom) / (tau[0] - bottom)
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(share.std()) == pytest.approx(12**-0.5, abs=0.02)
    both_t, both_s = map_levels(schedule, u, r, both_ways=True)
    assert float((both_s.t > both_t.t).double().mean()) == pytest.approx(0.375, abs=0.03)


# --- the divergence ---------------------------------------------------------------------------------------------------


@every_schedule
def test_the_log_determinant_on_gaussian_data(schedule):
    """½ Σ log(V_s/V_t) in both directions, where h is the mean of alpha² c/V over log(sigma/alpha)."""
    t, s = schedule(level_at(schedule, 4.0).t[0]), schedule(level_at(schedule, 0.1).t[0])
    V_t, V_s = (v.alpha**2 * GAUSSIAN.cov + v.sigma**2 for v in (t, s))
    x_t = torch.tensor([[0.3, 2.0], [1.0, -1.0]], dtype=f64)
    expected = 0.5 * torch.log(V_s / V_t).sum().expand(2)
    for start, end, sign in ((t, s, 1), (s, t, -1)):
        _, slope = predict_to_with_slope(ExactMap(GAUSSIAN, schedule), x_t, start, end)
        torch.testing.assert_close(map_log_det(slope, start, end), sign * expected, rtol=1e-7, atol=1e-7)
    ratios = torch.linspace(math.log(4.0), math.log(0.1), 20001, dtype=f64)
    slopes = GAUSSIAN.cov / (GAUSSIAN.cov + torch.exp(2 * ratios)[:, None])  # alpha² c/V by sigma/alpha
    mean = (slopes[1:-1].sum(0) + (slopes[0] + slopes[-1]) / 2) / (len(ratios) - 1)
    torch.testing.assert_close(slope[0], mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@every_schedule
def test_the_error_of_the_slope_is_zero_and_stationary_at_the_exact_one_alone(schedule, data):
    t, s = level_at(schedule, 6.0, 0.05, 0.5, 0.01), level_at(schedule, 0.05, 2.0, 0.5, 3.0)

    def flow(x_t, level):
        return batched_velocity(data, schedule)(x_t, level), exact_slope(data, x_t, level)

    def errors(change):
        denoise = ExactMap(data, schedule, slope_change=change)
        return lagrangian_with_slope(denoise, flow, states(data, t), t, s, width=1e-3)

    error, slope_error = errors(0.0)
    assert float(error.abs().max()) < 1e-5
    assert float(slope_error.abs().max()) < 1e-4
    torch.testing.assert_close(
        error,
        OBJECTIVES["lagrangian"](
            ExactMap(data, schedule), batched_velocity(data, schedule), states(data, t), t, s, width=1e-3
        ),
    )
    for wrong in (0.1, -0.1):  # of h everywhere, whose integral is off by (λ_s − λ_t) times that
        torch.testing.assert_close(errors(wrong)[1] - slope_error, torch.full_like(slope_error, wrong))


def test_probes_of_all_signs_give_the_slope():
    """Their mean is alpha ∂x̂_i/∂x_i, of a denoiser that mixes elements too."""
    matrix = torch.tensor([[0.3, -0.8], [0.5, 0.2]], dtype=f64)
    level, at = S.LinearLogSNR()(torch.tensor([0.3], dtype=f64)), torch.zeros(1, 2, dtype=f64, requires_grad=True)
    probes = [torch.tensor([[a, b]], dtype=f64) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    found = torch.cat([slope_estimate(at @ matrix.T, at, level, probe) for probe in probes])
    torch.testing.assert_close(found.mean(0), float(level.alpha) * matrix.diagonal())
    assert float(found.std(0).min()) > 0.1


@pytest.mark.parametrize("calls", [1, 3])
@every_schedule
def test_few_calls_give_the_exact_likelihood_of_gaussian_data(schedule, calls):
    """−log N(x; m, c + sigma_0²/alpha_0²) under the exact prior, for any number of calls."""
    levels = [schedule(level_at(schedule, ratio).t[0]) for ratio in (0.05, *(0.4, 1.5)[: calls - 1], 8.0)]
    bottom, top = levels[0], levels[-1]
    x = torch.tensor([[0.3, 2.0], [1.0, -1.0]], dtype=f64)
    at_top = Gaussian(
        (top.alpha * GAUSSIAN.m).expand(2, 2), torch.log(top.alpha**2 * GAUSSIAN.cov + top.sigma**2).expand(2, 2)
    )
    found = few_call_nll(ExactMap(GAUSSIAN, schedule), x, levels, prior=at_top)
    exact = Gaussian(GAUSSIAN.m.expand(2, 2), torch.log(GAUSSIAN.cov + (bottom.sigma / bottom.alpha) ** 2).expand(2, 2))
    torch.testing.assert_close(found.total, -exact.log_prob(x).sum(1), rtol=1e-7, atol=1e-7)
    assert found.calls == calls
    default = Gaussian(torch.zeros_like(x), torch.full_like(x, 2 * math.log(prior_scale(top))))
    by_default = few_call_nll(ExactMap(GAUSSIAN, schedule), x, levels)
    expected = few_call_nll(ExactMap(GAUSSIAN, schedule), x, levels, prior=default)
    torch.testing.assert_close(by_default.total, expected.total)
    seen, cond = [], Condition(label=torch.tensor([0, 1]))

    class Recorded(ExactMap):
        def predict_with_slope(self, x_t, level, cond=None):
            seen.append(cond.label.tolist())
            return super().predict_with_slope(x_t, level, cond)

    few_call_nll(Recorded(GAUSSIAN, schedule), x, levels, prior=at_top, cond=cond)
    assert seen == [[0, 1]] * calls


# --- networks ---------------------------------------------------------------------------------------------------------

NETWORKS = {
    "unet": lambda **more: UNet(1, widths=(8, 16), blocks=1, attention=(1,), heads=2, classes=3, **more),
    "dit": lambda **more: DiT(1, patch=2, width=8, depth=2, heads=2, classes=3, **more),
    "mlp": lambda **more: MLP(4, width=16, depth=2, classes=3, **more),
}


def randomize(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=f64) / math.sqrt(p[0].numel()))
    return network.eval()


def as_denoiser(network, schedule):
    return NetworkDenoiser(network, schedule, TARGETS["v"], Preconditioning())


@pytest.mark.parametrize("kind", NETWORKS)
@every_schedule
def test_a_network_with_two_times_starts_as_that_with_one(kind, schedule):
    """With the weights of another, u(x, t, s) is its velocity for every s, and always for s = t."""
    one, two = (NETWORKS[kind](**more).double() for more in ({}, {"two_times": True}))
    randomize(one)
    assert set(two.state_dict()) - set(one.state_dict()) == {
        f"embed.end.{n}" for n in ("fc1.weight", "fc1.bias", "fc2.weight")
    }
    two.eval().load_state_dict(two.state_dict() | one.state_dict())
    teacher, student = as_denoiser(one, schedule), as_denoiser(two, schedule)
    x = torch.randn(3, *((4,) if kind == "mlp" else (1, 4, 4)), generator=torch.Generator().manual_seed(1), dtype=f64)
    t, cond = level_at(schedule, 3.0, 1.0, 0.2), Condition(label=torch.tensor([0, 1, -1]))
    x_hat, eps, _ = teacher(x, t, cond)
    data = schedule(torch.tensor(schedule.t_min if schedule.t_min else 0.0, dtype=f64))
    for s in (t, level_at(schedule, 0.1, 2.0, 0.2), data):
        assert torch.equal(average_velocity(student, x, t, s, cond), eps - x_hat)
    randomize(two.embed.end, seed=2)
    assert torch.equal(average_velocity(student, x, t, t, cond), eps - x_hat)
    assert torch.equal(student(x, t, cond).x, x_hat)  # a denoiser like any other where no end is given
    other = average_velocity(student, x, t, level_at(schedule, 0.1, 2.0, 0.2), cond)
    changed = (other - (eps - x_hat)).detach().flatten(1).abs().amax(1)
    assert bool((changed[:2] > 1e-3).all())
    assert float(changed[2]) == 0


def test_differences_agree_with_forward_mode():
    """d y/d end of a U-Net with attention, by jvp under the plain attention kernel, the fused one has none."""
    network = randomize(NETWORKS["unet"](two_times=True).double())
    x, time = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=f64), torch.tensor([1.0, -2.0])

    def y(end):
        return network(x, time.double(), Condition(end_time=end))

    end = torch.tensor([3.0, 0.5], dtype=f64)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(y, (end,), (torch.ones_like(end),))[1]
    h = 1e-4
    torch.testing.assert_close((y(end + h) - y(end - h)) / (2 * h), exact, rtol=1e-5, atol=1e-7)


def test_the_end_time_passes_wrappers():
    """Conditions and guidance keep it: all calls of a guided map go to the same level."""
    schedule = S.LinearLogSNR()
    spy = Spy(ExactMap(GAUSSIAN, schedule))
    t, s = schedule(torch.tensor(0.9)), schedule(torch.tensor(0.2))
    label = Condition(label=torch.zeros(2, dtype=torch.int64))
    x = torch.ones(2, 2, dtype=f64)
    guided = ConditionedDenoiser(ClassifierFree(spy, 2.0), label)
    x_s = flow_map(guided, x, t, s)
    _, _, cond, _ = spy.seen.pop()
    assert torch.equal(cond.end_time, s.t.expand(4))
    assert cond.label.tolist() == [0, 0, -1, -1]
    torch.testing.assert_close(x_s, GAUSSIAN.flow(x, t, s))
    assert flow_map(ConditionedDenoiser(spy, None), x, t, s).shape == x.shape
    assert spy.seen[-1][2].label is None
    assert guided(x, t).x.shape == x.shape
    assert spy.seen[-1][2].end_time is None


def test_the_sampler_of_a_flow_map():
    schedule = S.LinearLogSNR()
    one, two = (few_call_sampler(schedule, calls, "flow_map") for calls in (1, 2))
    assert one == Sampler("flow_map", 1, times=(1.0, 0.0))
    assert two == replace(few_call_sampler(schedule, 2), solver="flow_map")

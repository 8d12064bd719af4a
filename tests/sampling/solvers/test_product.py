"""Products of Gaussians, and the chain of which every step is one, probed without randomness."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GaussianData, gaussian_log_prob
from scipy.integrate import solve_ivp
from test_affine import Affine, probe

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import Prediction
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.product import Product, inpainting_factor, observation_factor, unit_factor
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import rescale, trajectory

F64 = torch.float64
INF = math.inf


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


# --- the product of two Gaussians -------------------------------------------------------------------------------------

means, log_vars = st.floats(-5, 5), st.floats(-12, 12)


@given(means, log_vars, means, log_vars, st.floats(-5, 5))
def test_a_product_is_the_product_of_the_densities(m1, v1, m2, v2, x):
    one, two, at = Gaussian(tensor(m1), tensor(v1)), Gaussian(tensor(m2), tensor(v2)), tensor(x)
    for product, log_z in (one.times(two), two.times(one)):
        both = one.log_prob(at) + two.log_prob(at)
        scale = 1 + both.abs() + one.log_prob(tensor(m2)).abs() + two.log_prob(tensor(m1)).abs()
        assert float((product.log_prob(at) + log_z - both).abs() / scale) < 1e-9
        assert min(m1, m2) <= float(product.mean) <= max(m1, m2)
        assert float(product.log_var) <= min(v1, v2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("one", "two", "product", "log_z"),
    [
        ((2.0, 0.5), (7.0, INF), (2.0, 0.5), 0.0),  # the factor 1
        ((2.0, INF), (7.0, INF), (4.5, INF), 0.0),
        ((2.0, 0.0), (7.0, -INF), (7.0, -INF), float(gaussian_log_prob(tensor(7.0), 2.0, 1.0))),  # a known value
        ((2.0, INF), (7.1, -INF), (7.1, -INF), 0.0),
        ((2.0, -INF), (2.0, -INF), (2.0, -INF), INF),
        ((2.0, -INF), (7.0, -INF), (4.5, -INF), -INF),  # two that cannot both be
    ],
)
def test_products_with_infinite_log_variance(one, two, product, log_z, dtype):
    for a, b in ((one, two), (two, one)):
        a, b = (Gaussian(*(torch.tensor(v, dtype=dtype) for v in pair)) for pair in (a, b))
        (mean, log_var), found = a.times(b)
        assert (mean.dtype, log_var.dtype, found.dtype) == (dtype,) * 3
        expected = [torch.tensor(v, dtype=dtype) for v in (*product, log_z)]
        torch.testing.assert_close([mean, log_var, found], expected)
    if one[1] == -INF or two[1] == -INF:
        assert float(mean) == float(torch.tensor(product[0], dtype=dtype))  # to the last digit


def test_products_broadcast():
    (mean, log_var), log_z = Gaussian(torch.zeros(2, 1, 3), torch.zeros(())).times(
        Gaussian(torch.ones(4, 1), torch.tensor([0.0, INF, -INF]))
    )
    assert mean.shape == log_z.shape == (2, 4, 3)
    assert log_var.shape == (3,)
    torch.testing.assert_close(mean[0, 0], torch.tensor([0.5, 0.0, 1.0]))


# --- the factors ------------------------------------------------------------------------------------------------------


def test_factors_by_hand():
    """x_s = alpha x + sigma eps and y = x + n: given y alone, x is N(y, var n)."""
    y, log_var = tensor([[1.5, -2.0, math.nan]]), torch.log(tensor([[0.0, 0.25, INF]]))
    level = S.VarianceExploding()(0.4)._replace(alpha=tensor(0.6), sigma=tensor(0.5))
    mean, spread = observation_factor(y, log_var)(level)
    torch.testing.assert_close(mean, tensor([[0.9, -1.2, 0.0]]))
    torch.testing.assert_close(spread, torch.log(tensor([[0.25, 0.36 * 0.25 + 0.25, INF]])))
    end = level._replace(t=tensor(0.0))  # the data themselves, whatever is left of sigma
    torch.testing.assert_close(
        observation_factor(y, log_var)(end).log_var, torch.log(tensor([[0.0, 0.36 * 0.25, INF]]))
    )
    at_zero = level._replace(t=tensor(0.0), alpha=tensor(1.0), sigma=tensor(0.0))
    torch.testing.assert_close(observation_factor(y, log_var)(at_zero).log_var, log_var)

    two = S.LinearLogSNR()(tensor([0.0, 0.4]))  # a level for each item
    spread = observation_factor(y.expand(2, 3), log_var)(two).log_var
    for i in range(2):
        level_of_item = S.LinearLogSNR()(two.t[i : i + 1])
        torch.testing.assert_close(spread[i : i + 1], observation_factor(y, log_var)(level_of_item).log_var)

    mask = torch.tensor([True, True, False])
    for part, expected in zip(
        inpainting_factor(y, mask)(level), observation_factor(y, tensor([[-INF, -INF, INF]]))(level), strict=True
    ):
        torch.testing.assert_close(part, expected, equal_nan=False)
    assert inpainting_factor(torch.ones(2, 1), torch.tensor([[True], [False]]))(level).log_var.dtype == torch.float32
    assert [float(v) for v in unit_factor(level)] == [0.0, INF]
    batch = S.Flow()(tensor([0.2, 0.4]))
    torch.testing.assert_close(
        inpainting_factor(torch.ones(2, 3), torch.tensor(True))(batch).mean, tensor([[0.8], [0.6]]).expand(2, 3).float()
    )


# --- the chain --------------------------------------------------------------------------------------------------------

MEAN, VAR = tensor([0.5, -1.0, 0.2, 2.0]), tensor([0.04, 4.0, 1.0, 0.3])
DATA = GaussianData(MEAN, VAR)
SEEN = tensor([0.7, 1.0, -0.5, 5.0])  # y
NOISE = tensor([0.0, 0.5, 2.0, INF])  # the variance of y given x
CHAINS = {
    "linear": (DS.linear(), [1, 0.9, 0.5, 0.02, 0.001, 0]),
    "linear, one step": (DS.linear(), [1, 0]),
    "flow": (S.Flow(), [1, 0.75, 0.6, 0.2, 0]),
    "flow between": (S.Flow(), [0.95, 0.6, 0.2, 0.02]),
    "log-SNR": (S.LinearLogSNR(), [1, 0.9, 0.85, 0.4, 0.1, 0]),
    "exploding": (S.VarianceExploding(), [1, 0.8, 0.5, 0.3, 0.0]),
}


def moments(map_: Affine, mean, cov) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the samples where x_T has ``mean`` and ``cov``."""
    noise = np.einsum("kij,klj->il", map_.noise, map_.noise)
    return map_.matrix @ mean + map_.offset, map_.matrix @ cov @ map_.matrix.T + noise


def posterior_of(level=None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x given y, or of x_s given y."""
    share = torch.where(NOISE == INF, 0, VAR / (VAR + NOISE))
    mean, var = MEAN + share * (torch.where(NOISE == INF, 0, SEEN) - MEAN), VAR * (1 - share)
    if level is None:
        return mean.numpy(), var.numpy()
    return (level.alpha * mean).numpy(), (level.alpha**2 * var + level.sigma**2).numpy()


def whole_truth(level) -> Gaussian:
    """p(y given x_s) as a function of x_s: y is E[x given x_s] with the variance var(x given x_s) + that of y."""
    V_s = DATA.marginal_var(level)
    slope, left = level.alpha * VAR / V_s, VAR * level.sigma**2 / V_s
    return Gaussian(
        level.alpha * MEAN + (torch.where(NOISE == INF, 0, SEEN) - MEAN) / slope, torch.log((left + NOISE) / slope**2)
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_with_the_exact_likelihood_every_step_is_exact(chain):
    schedule, times = CHAINS[chain]
    levels = time_grid(schedule, times=times)
    result = probe(Product(whole_truth, DATA.reverse_log_var), DATA.denoiser(schedule), levels)
    start = posterior_of(levels[0]) if float(levels[0].alpha) > 0 else (np.zeros(4), np.ones(4))
    mean, cov = moments(result, start[0], np.diag(start[1]))
    expected = posterior_of(levels[-1])
    np.testing.assert_allclose(mean, expected[0], rtol=1e-9, atol=1e-9)
    if float(levels[-1].sigma) > 0:
        assert float(levels[-1].t) > 0 or chain in ("log-SNR", "exploding")
        np.testing.assert_allclose(cov, np.diag(expected[1]), rtol=1e-9, atol=1e-9)
    else:  # no noise is drawn in the step to data: what is missing is the variance that it leaves
        (_, log_var), _ = Gaussian(MEAN, DATA.reverse_log_var(levels[-2], levels[-1])).times(whole_truth(levels[-1]))
        np.testing.assert_allclose(cov + np.diag(torch.exp(log_var)), np.diag(expected[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chain", CHAINS)
def test_without_a_factor_it_is_ancestral_sampling(chain):
    schedule, times = CHAINS[chain]
    levels = time_grid(schedule, times=times)
    full = GaussianData(MEAN, torch.diag(VAR) + 0.01).denoiser(schedule, 0.3)
    for variance in ("small", "large", "learned"):
        maps = (probe(solver, full, levels) for solver in (Product(variance=variance), Ancestral(variance)))
        for left, right in zip(*maps, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("chain", CHAINS)
def test_inpainting_independent_elements_is_exact(chain):
    """Known elements keep their values, and the others are distributed as without them."""
    schedule, times = CHAINS[chain]
    levels = time_grid(schedule, times=times)
    mask = torch.tensor([True, False, True, False])
    free = probe(Ancestral(), DATA.denoiser(schedule), levels)
    held = probe(Product(inpainting_factor(SEEN, mask)), DATA.denoiser(schedule), levels)
    hidden = (~mask).numpy()
    for part in (lambda m: m.matrix[hidden], lambda m: m.offset[hidden], lambda m: m.noise[:, hidden]):
        np.testing.assert_allclose(part(held), part(free), rtol=1e-12, atol=1e-12)
    if times[-1] == 0:
        np.testing.assert_array_equal(held.offset[~hidden], (levels[-1].alpha * SEEN[mask]).numpy())
        assert (held.matrix[~hidden] == 0).all()
        assert (held.noise[:, ~hidden] == 0).all()
    else:  # x_s is still noisy
        assert (held.noise[-1][~hidden] > 0).any()


@pytest.mark.parametrize("variance", ["exact", "small"])
def test_repeats_converge_to_the_product(variance):
    """A step from any x_t, repeated, converges to q(x_s) r_s(x_s)/Z: geometrically, so to the last digits.

    It needs the reverse step's own variance: with the small one the limit is another.
    """
    schedule = S.Flow()
    t, s = time_grid(schedule, times=[0.8, 0.6])
    (mean, log_var), _ = Gaussian(s.alpha * MEAN, torch.log(DATA.marginal_var(s))).times(
        observation_factor(SEEN, torch.log(NOISE))(s)
    )
    misses = []
    for repeats in (1, 10, 150):
        solver = Product(
            observation_factor(SEEN, torch.log(NOISE)),
            DATA.reverse_log_var if variance == "exact" else variance,
            repeats,
        )
        assert (solver.calls, solver.noises_per_step) == (repeats, 2 * repeats - 1)
        found, cov = moments(probe(solver, DATA.denoiser(schedule), [t, s]), np.full(4, 3.0), np.zeros((4, 4)))
        misses.append([np.abs(found - mean.numpy()).max(), np.abs(cov - np.diag(log_var.exp())).max()])
    assert misses[0][0] > 0.3
    assert misses[1][0] < misses[0][0] / 2
    if variance == "exact":
        assert max(misses[2]) < 1e-9
    else:
        assert misses[2][1] > 0.01
    with pytest.raises(ConfigError, match="repeats = 0: it must be from 1 to 10,000"):
        Product(repeats=0)


# --- how wrong a single pass is ---------------------------------------------------------------------------------------

RHO = 0.9
TWIN = GaussianData(torch.zeros(2), torch.tensor([[1.0, RHO], [RHO, 1.0]]))
LIMIT = (0.4751, 0.4175)  # of many steps
INPAINT = inpainting_factor(tensor([1.0, 0.0]), torch.tensor([True, False]))
DENOISE = observation_factor(tensor([1.0, 0.0]), torch.log(tensor([0.25, INF])))


def twin_law(solver, T) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the sample, step by step."""
    schedule = DS.cosine(T)
    denoise, levels = TWIN.denoiser(schedule), time_grid(schedule)
    mean, cov = np.zeros(2), np.eye(2)
    for t, s in pairwise(levels):
        mean, cov = moments(probe(solver, denoise, [t, s], dims=2), mean, cov)
    return mean, cov


@pytest.mark.parametrize(
    ("T", "repeats", "mean", "var"),
    [
        (10, 1, 0.3665, 0.3421),
        (100, 1, 0.4622, 0.4055),
        pytest.param(1000, 1, 0.4738, 0.4161, marks=pytest.mark.release),
        (100, 4, 0.7684, 0.2176),
        (10, 10, 0.8238, 0.1109),
    ],
)
def test_inpainting_correlated_elements_is_biased(T, repeats, mean, var):
    """The second element, given that the first is 1, should be N(0.9, 0.19)."""
    found, cov = twin_law(Product(INPAINT, repeats=repeats), T)
    assert found[0] == 1
    assert (cov[0] == 0).all()
    assert (found[1], cov[1, 1]) == pytest.approx((mean, var), abs=6e-5)
    if T == 1000:
        assert (mean, var) == pytest.approx(LIMIT, abs=2e-3)


def test_denoising_is_biased_too():
    """The first element is observed as 1 with noise of variance ¼: they should be N(0.8, 0.2) and N(0.72, 0.352)."""
    mean, cov = twin_law(Product(DENOISE), 100)
    assert mean == pytest.approx([0.5990, 0.3671], abs=6e-5)
    assert np.diag(cov) == pytest.approx([0.2038, 0.5052], abs=6e-5)


def test_the_limit_of_many_steps_is_the_drift_of_the_factor():
    """While log ᾱ rises by du, x moves by (½ x + ∇log q(x_t) + ∇log r_t) du; exact would be ∇log p(y given x_t)."""

    def change(u, state):
        bar, variance = math.exp(u), -math.expm1(u)
        inverse = np.linalg.inv(np.array([[1, bar * RHO], [bar * RHO, 1]]))
        A = 0.5 * np.eye(2) - inverse - np.diag([1 / variance, 0])
        mean, cov = state[:2], state[2:].reshape(2, 2)
        push = np.array([math.sqrt(bar) / variance, 0])  # ∇log r_t = (alpha y − x_t)/sigma²
        return np.concatenate([A @ mean + push, (A @ cov + cov @ A.T + np.eye(2)).ravel()])

    end = solve_ivp(change, (math.log(1e-6), -1e-6), np.array([0, 0, 1, 0, 0, 1.0]), "Radau", rtol=1e-6, atol=1e-9)
    assert (end.y[1, -1], end.y[5, -1]) == pytest.approx(LIMIT, abs=1e-4)


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{"name": "cosine", "T": 10}, {"name": "linear_log_snr", "high": 10.0}])
def test_a_model_inpaints(schedule):
    """Known pixels keep their values for any network; the others come from the model."""
    torch.manual_seed(0)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    model = Diffusion(ModelConfig(network=network, schedule=schedule, chain_length=10), (1, 4, 4), IntegerLevels(256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    values = torch.randint(256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask = torch.arange(4) >= 2
    solver = Product(inpainting_factor(model.transform.to_model(values), mask), repeats=2)
    *_, last = model.trajectory(range(3), sampler=Sampler(solver, 10))
    found = model.transform.to_data(rescale(last.x, last.level))
    assert torch.equal(found[..., 2:], values[..., 2:])
    assert not torch.equal(found[..., :2], values[..., :2])
    *_, other = model.trajectory(range(3), seed=1, sampler=Sampler(solver, 10))
    assert not torch.equal(last.x[..., :2], other.x[..., :2])
    assert last.x.dtype == torch.float32


def test_the_denoiser_gets_both_levels_of_the_step():
    calls = []

    def denoise(x_t, level, cond=None, next_level=None):
        calls.append((level, cond, next_level))
        return Prediction(0 * x_t, x_t / level.broadcast_like(x_t).sigma)

    levels = time_grid(S.Flow(), 3)
    *_, last = trajectory(denoise, Product(repeats=2), levels, torch.ones(1, 4), lambda n: torch.ones(n, 1, 4))
    assert calls == [(t, None, s) for t, s in pairwise(levels) for _ in range(2)]
    assert Product().init(last.x, levels) == ()

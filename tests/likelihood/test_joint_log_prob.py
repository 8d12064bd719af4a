"""Densities of kept trajectories against joint Gaussians, and the bound before Bayes' rule, without randomness."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from oracles import GaussianData
from scipy import stats

from undiffuse.errors import ConfigError
from undiffuse.likelihood.joint_log_prob import forward_log_prob, reverse_log_prob
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian, forward, forward_marginal, posterior
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import forward_trajectory, trajectory

F64 = torch.float64
BETA = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
N = len(BETA)
DATA = GaussianData(torch.tensor([0.3], dtype=F64), torch.tensor([0.25], dtype=F64))
LEVELS = time_grid(DS.Tabulated(BETA))
CHAIN = ReverseChain(DATA.denoiser(DS.Tabulated(BETA)), LEVELS, "large")
X = torch.full((1, 1), 0.7, dtype=F64)


def forward_states(x: torch.Tensor, z: torch.Tensor) -> list:
    """The trajectories from ``x`` (1, 1) with the noises ``z`` (n, N)."""
    fresh = iter(z.T[:, None, :, None])
    return list(forward_trajectory(x.expand(len(z), 1), LEVELS, lambda n: next(fresh)))


def joint_forward() -> tuple[np.ndarray, np.ndarray]:
    """Mean (per unit of x_0) and covariance of x_1 … x_N given x_0."""
    decay = np.array(
        [[math.prod(np.sqrt(1 - BETA[j + 1 : i + 1])) if j <= i else 0 for j in range(N)] for i in range(N)]
    )
    return np.sqrt(np.cumprod(1 - BETA)), decay @ np.diag(BETA) @ decay.T


def test_forward_is_the_joint_gaussian():
    steps = forward_states(X, torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=F64))
    mean, cov = joint_forward()
    states = torch.cat([step.x for step in steps[1:]], 1).numpy()
    expected = stats.multivariate_normal(0.7 * mean, cov).logpdf(states)
    np.testing.assert_allclose(forward_log_prob(steps).numpy(), expected, rtol=1e-11)
    np.testing.assert_allclose(forward_log_prob(steps[::-1]).numpy(), expected, rtol=1e-11)


def test_reverse_is_the_joint_gaussian_of_the_sampler():
    """Of x_N … x_0 by the affine maps of the denoiser; the sampled x_0 is the mean of its density."""
    noise = torch.randn(N + 1, 1, 2, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    fresh = iter(noise)
    steps = list(trajectory(CHAIN.denoise, Ancestral("large"), LEVELS, next(fresh)[0], lambda n: next(fresh)))
    expected = stats.norm.logpdf(steps[0].x.flatten().numpy())
    bar = np.cumprod(1 - BETA)
    for k in range(N, 0, -1):
        x_t, x_s = (steps[N - j].x.flatten().numpy() for j in (k, k - 1))
        b, a = BETA[k - 1], bar[k - 1]
        eps = math.sqrt(1 - a) * (x_t - math.sqrt(a) * 0.3) / (a * 0.25 + 1 - a)
        expected += stats.norm.logpdf(x_s, (x_t - b / math.sqrt(1 - a) * eps) / math.sqrt(1 - b), math.sqrt(b))
    for kept in (steps, steps[::-1]):
        np.testing.assert_allclose(reverse_log_prob(CHAIN, kept).numpy(), expected, rtol=1e-11)
    prior = Gaussian(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))
    other = reverse_log_prob(CHAIN, steps, prior) - reverse_log_prob(CHAIN, steps)
    torch.testing.assert_close(other, (steps[0].x - 0.5).flatten())  # of −½ (x − 1)² + ½ x²


def test_with_the_exact_reverse_process_the_ratio_is_the_density_of_x():
    """p(x_0 … x_T)/q(x_1 … x_T given x_0) = p(x_0) for every trajectory."""
    steps = forward_states(X, torch.randn(4, N, generator=torch.Generator().manual_seed(2), dtype=F64))
    chain = ReverseChain(CHAIN.denoise, LEVELS, DATA.reverse_log_var)
    top = Gaussian(LEVELS[0].alpha * DATA.m, torch.log(DATA.marginal_var(LEVELS[0])))
    ratio = reverse_log_prob(chain, steps, top) - forward_log_prob(steps)
    torch.testing.assert_close(ratio, torch.full((4,), stats.norm.logpdf(0.7, 0.3, 0.5), dtype=F64))


def quadratic_moments(value, dims: int) -> tuple[float, float]:
    """Mean and variance of ``value`` (n, dims) ↦ (n,), a polynomial of degree two, over standard normal numbers."""
    eye = torch.eye(dims, dtype=F64)
    pairs = list(combinations(range(dims), 2))
    zero, plus, minus, both = value(
        torch.cat([0 * eye[:1], eye, -eye, torch.stack([eye[i] + eye[j] for i, j in pairs])])
    ).split([1, dims, dims, len(pairs)])
    slope, A = (plus - minus) / 2, torch.diag((plus + minus) / 2 - zero)
    for (i, j), at in zip(pairs, both, strict=True):
        A[i, j] = A[j, i] = (at - plus[i] - plus[j] + zero[0]) / 2
    return float(zero[0] + A.trace()), float(slope @ slope + 2 * (A @ A).trace())


def before(chain: ReverseChain, z: torch.Tensor) -> torch.Tensor:
    """log q(x_t given x_s) − log p(x_s given x_t) of each step of one trajectory, (n, N): the bound less the prior."""
    steps = forward_states(X, z)
    pairs = [(one, other, forward_log_prob([one, other])) for one, other in pairwise(steps)]
    return torch.stack([q - chain.step(t.x, t.level, s.level).log_prob(s.x)[:, 0] for s, t, q in pairs], 1)


def after(chain: ReverseChain, z: torch.Tensor) -> torch.Tensor:
    """The KL (28) of each step, and the decoder, (n, N)."""
    fresh = iter(z.T[:, None, :, None])
    return vlb(chain, X.expand(len(z), 1), lambda n: next(fresh)).per_step


def test_before_bayes_rule_the_bound_has_the_same_mean():
    """E[log q(x_1 … x_T given x_0) − log p(x_0 … x_T)], with the exact expectation over the trajectories."""

    def joint(z: torch.Tensor) -> torch.Tensor:
        steps = forward_states(X, z)
        return forward_log_prob(steps) - reverse_log_prob(CHAIN, steps)

    prior = float(vlb(CHAIN, X, lambda n: torch.zeros(n, 1, 1, dtype=F64)).prior)
    mean, _ = quadratic_moments(joint, N)
    same, _ = quadratic_moments(lambda z: after(CHAIN, z).sum(1) + prior, N)
    assert mean == pytest.approx(same, rel=1e-11)


def test_before_bayes_rule_every_step_has_more_variance():
    """The variances over the noise, nats², are exact. One step is what a training step draws; both sum to the bound.

    In the sum over a whole trajectory the steps' errors cancel in part: with the exact reverse process and the exact
    prior it is −log p(x) for every trajectory, and its variance is 0 before Bayes' rule, not after it.
    """
    steps = {
        form: [quadratic_moments(lambda z, k=k: form(CHAIN, z)[:, k], N)[1] for k in range(N)]  # noqa: B023
        for form in (before, after)
    }
    assert all(more > less for more, less in list(zip(steps[before], steps[after], strict=True))[1:])
    assert (sum(steps[before]), sum(steps[after])) == pytest.approx((1.9438, 0.2592), abs=1e-4)

    exact = ReverseChain(CHAIN.denoise, LEVELS, DATA.reverse_log_var)
    top = Gaussian(LEVELS[0].alpha * DATA.m, torch.log(DATA.marginal_var(LEVELS[0])))

    def whole(z: torch.Tensor) -> torch.Tensor:
        states = forward_states(X, z)
        return forward_log_prob(states) - reverse_log_prob(exact, states, top)

    mean, variance = quadratic_moments(whole, N)
    assert (mean, variance) == pytest.approx((-stats.norm.logpdf(0.7, 0.3, 0.5), 0.0), abs=1e-12)
    assert quadratic_moments(lambda z: after(exact, z).sum(1), N)[1] == pytest.approx(0.4382, abs=1e-4)


def test_the_marginal_is_sampled_scored_and_compared():
    level = LEVELS[2]
    alpha, sigma, x = float(level.alpha), float(level.sigma), torch.tensor([[0.7], [-2.0]], dtype=F64)
    q, z = forward_marginal(x, level), torch.tensor([[0.5], [1.5]], dtype=F64)
    torch.testing.assert_close(q.sample(z), alpha * x + sigma * z)
    expected = stats.norm(alpha * x.numpy(), sigma).logpdf(0.1)
    np.testing.assert_allclose(q.log_prob(torch.tensor(0.1, dtype=F64)).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(q.kl(forward_marginal(x + 1, level)), torch.full_like(x, alpha**2 / sigma**2 / 2))
    assert q.log_var.dtype == F64
    assert forward_marginal(x.bfloat16(), level).mean.dtype == torch.float32
    assert float(forward_marginal(x, LEVELS[-1]).log_var.max()) == -math.inf
    batch = forward_marginal(x, S.Flow()(torch.tensor([0.2, 0.4])))
    torch.testing.assert_close(batch.mean, x * torch.tensor([[0.8], [0.6]], dtype=F64))


@pytest.mark.parametrize("schedule", [DS.Tabulated(BETA), S.Flow(), S.VarianceExploding()])
def test_bayes_rule_of_one_step(schedule):
    """q(x_t given x_s) q(x_s given x) = q(x_s given x_t, x) q(x_t given x) for any two levels."""
    t, s = schedule(0.75), schedule(0.25)
    x, x_s, x_t = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=F64)
    left = forward(x_s, s, t).log_prob(x_t) + forward_marginal(x, s).log_prob(x_s)
    right = posterior(x_t, x, t, s).log_prob(x_s) + forward_marginal(x, t).log_prob(x_t)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_float32_states_are_measured_in_float64():
    steps = forward_states(X, torch.zeros(2, N, dtype=F64))
    single = [step._replace(x=step.x.float()) for step in steps]
    dtypes = []

    def denoise(x_t, *rest):
        dtypes.append(x_t.dtype)
        return CHAIN.denoise(x_t, *rest)

    found = reverse_log_prob(ReverseChain(denoise, LEVELS, "large"), single)
    assert (found.dtype, forward_log_prob(single).dtype, set(dtypes)) == (F64, F64, {torch.float32})
    torch.testing.assert_close(found, reverse_log_prob(CHAIN, steps), rtol=1e-5, atol=1e-5)


def test_states_that_are_no_trajectory_are_refused():
    steps = forward_states(X, torch.zeros(1, N, dtype=F64))
    for kept in (steps[:1], [steps[0], steps[2], steps[1]], [steps[1], steps[1]], []):
        with pytest.raises(ConfigError, match=r"TRAJECTORY\].*its levels neither rise nor fall"):
            forward_log_prob(kept)

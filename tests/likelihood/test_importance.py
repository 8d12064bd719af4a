"""Importance-weighted bounds on chains whose marginal is known, expectations taken by quadrature."""

import math
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from oracles import GaussianData, Spy, gaussian_log_prob
from scipy.stats import norm

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Prediction
from undiffuse.grids import grid
from undiffuse.likelihood import chain_nll, importance, importance_weighted, nll, tighten, vlb
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian

tensor = partial(torch.tensor, dtype=torch.float64)
DATA = GaussianData(tensor([0.4]), tensor([0.3]))
X = tensor([[0.4], [1.1], [-0.9]])


def wrong(x_t, level, cond=None, to=None):
    """A shifted denoiser, with a variance that is not the best one either."""
    x, eps, _ = DATA.predict(x_t, level)
    return Prediction(x + 0.1, eps, torch.full_like(x, 0.3))


def marginal(levels, variance):
    """Mean and variance of the chain's own p(x), by the recursion of a linear-Gaussian chain.

    Where the chain ends at sigma 0 its last step gives x; else p(x given z_0) = N(z_0/alpha_0, sigma_0²/alpha_0²).
    """
    mean, var = 0.0, 1.0
    for t, s in pairwise(levels):
        a_t, s_t, a_s, s_s = (float(v) for v in (t.alpha, t.sigma, s.alpha, s.sigma))
        left = 1 - (a_t * s_s / (a_s * s_t)) ** 2
        small = s_s**2 * left if s_s > 0 else math.exp(float(s.floor)) if s.floor is not None else s_t**2 * left
        large = s_t**2 * left
        step = {"small": small, "large": large, "learned": large**0.3 * small**0.7}[variance]
        gain = a_t * 0.3 / (a_t**2 * 0.3 + s_t**2)  # x̂ = m + gain (x_t − a_t m) + 0.1
        keep = (a_t / a_s) * (s_s / s_t) ** 2 + a_s * left * gain
        mean = keep * mean + a_s * left * (0.5 - gain * a_t * 0.4)
        var = keep**2 * var + step
    if s_s > 0:
        mean, var = mean / a_s, (var + s_s**2) / a_s**2
    return mean, var


CHAINS = {
    "one step to data": lambda: grid(S.linear(4), 1),
    "two steps to data": lambda: grid(S.linear(4), 2),
    "one step, stays finite": lambda: grid(S.LinearLogSNR(high=3.0, low=-1.0), 1),
    "flow between": lambda: grid(S.Flow(), times=[0.8, 0.3]),
}


def every(levels, nodes=40, draws=1, **settings):
    """Totals and weights over all the nodes of ``draws`` trajectories' numbers, (n, B) and (n,)."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    noises = draws * (len(levels) - 1 + int(levels[-1].sigma > 0))
    which = torch.tensor(list(product(range(nodes), repeat=noises)))
    fresh = iter(points[which].T)
    n, B = len(which), len(X)

    def noise(k):
        assert k == 1
        return next(fresh).repeat_interleave(B)[None, :, None]

    run = importance_weighted(wrong, X.repeat(n, 1), levels, noise, draws=draws, **settings)
    assert next(fresh, None) is None
    return run.total.reshape(n, B), (weights / weights.sum())[which].prod(1)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_weights_mean_is_the_chains_own_density(name, variance):
    levels = CHAINS[name]()
    mean, var = marginal(levels, variance)
    prior = Gaussian(tensor([0.0]), tensor([0.0]))
    totals, weights = every(levels, variance=variance, prior=prior)
    exact = gaussian_log_prob(X, mean, tensor(var))[:, 0]
    torch.testing.assert_close(torch.logsumexp(torch.log(weights)[:, None] - totals, 0), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_one_trajectory_has_the_bound_as_its_mean(name):
    levels = CHAINS[name]()
    totals, weights = every(levels, variance="learned")
    nodes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(X))  # its terms are quadratic
    both = vlb(wrong, torch.cat([X, X]), levels, lambda n: nodes[None, :, None].expand(n, -1, -1), variance="learned")
    torch.testing.assert_close(weights @ totals, both.total.reshape(2, -1).mean(0), rtol=1e-9, atol=1e-9)


def test_more_draws_never_loosen_the_bound_and_approach_the_density():
    """The gap of K draws falls as half the weights' relative variance over K, from below."""
    levels = grid(S.linear(4), 1)
    mean, var = marginal(levels, "large")
    exact = -gaussian_log_prob(X, mean, tensor(var))[:, 0]
    gaps = []
    for K in (1, 2, 3, 4, 5):
        totals, weights = every(levels, nodes=12, draws=K, variance="large")
        gaps.append(weights @ totals - exact)
        if K == 1:
            half = 0.5 * (weights @ torch.exp(2 * (exact - totals)) - 1)
    for K, (fewer, more) in enumerate(pairwise(gaps), start=1):
        assert bool((more > 0).all())
        assert bool((more < fewer).all())
        assert bool(((K + 1) * more > K * fewer).all())
    share = 5 * gaps[-1] / half
    assert bool((share < 1).all())
    assert float(share[1]) > 0.85  # whose weights vary least


def test_each_term_by_hand():
    """Three steps, N(0, I) and the small variance, in the letters of Ho."""
    beta = np.array([0.1, 0.2, 0.4])
    bar = np.cumprod(1 - beta)
    fresh = np.array([[0.3, -1.0], [0.7, 0.2], [-0.4, 1.5]])
    x = np.array([[0.5, -0.25]])
    numbers = iter(torch.from_numpy(fresh))
    data = GaussianData(tensor([0.4, 0.0]), tensor([0.3, 1.0]))
    spy = Spy(data.denoiser(S.Flow()))
    levels = grid(S.Tabulated(beta))
    cond = Condition(label=torch.zeros(1))
    run = chain_nll(spy, torch.from_numpy(x), levels, lambda n: next(numbers)[None, None], cond=cond)
    assert [(told, to) for _, _, told, to in spy.seen] == [(cond, level) for level in levels[1:]]

    x_t = math.sqrt(bar[2]) * x + math.sqrt(1 - bar[2]) * fresh[0]
    prior = norm.logpdf(x_t, math.sqrt(bar[2]) * x, math.sqrt(1 - bar[2])) - norm.logpdf(x_t)
    terms = []
    for t in (2, 1, 0):
        before = bar[t - 1] if t else 1.0
        gain = math.sqrt(bar[t]) * data.values[0].numpy() / (bar[t] * data.values[0].numpy() + 1 - bar[t])
        m = data.means[0].numpy()
        guess = m + gain * (x_t - math.sqrt(bar[t]) * m)
        on_x, on_x_t = math.sqrt(before) * beta[t] / (1 - bar[t]), math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t])
        var = beta[t] * (1 - before) / (1 - bar[t]) if t else beta[1] * (1 - bar[0]) / (1 - bar[1])
        model = on_x * guess + on_x_t * x_t
        if t == 0:
            terms.append(-norm.logpdf(x, model, math.sqrt(var)))
            break
        x_s = on_x * x + on_x_t * x_t + math.sqrt(var) * fresh[3 - t]
        q = norm.logpdf(x_s, on_x * x + on_x_t * x_t, math.sqrt(var))
        terms.append(q - norm.logpdf(x_s, model, math.sqrt(var)))
        x_t = x_s
    assert float(run.prior) == pytest.approx(prior.sum())
    assert run.per_step[0].tolist() == pytest.approx([term.sum() for term in terms[::-1]])
    assert float(run.decoder) == pytest.approx(terms[2].sum())
    assert float(run.steps) == pytest.approx(terms[0].sum() + terms[1].sum())
    assert run.calls == 3


@pytest.mark.parametrize("ending", [0.0, 0.2])
def test_bins(ending):
    """The decoder of discrete data, which is the bound's own at the same state."""
    levels = grid(S.Flow(), times=[0.9, ending])
    x = tensor([[-1.0], [0.0], [1.0]])
    edges = (torch.where(x <= -1, -math.inf, x - 0.5), torch.where(x >= 1, math.inf, x + 0.5))
    noise = lambda n: torch.full((n, 3, 1), 0.3, dtype=torch.float64)  # noqa: E731
    run = importance_weighted(wrong, x, levels, noise, draws=1, edges=edges, first_large="clipped", variance="large")
    state = float(levels[0].alpha) * x + float(levels[0].sigma) * 0.3
    if ending == 0:
        want = vlb(wrong, x, levels, noise, edges=edges, first_large="clipped", variance="large").decoder
    else:
        alpha, sigma = float(levels[1].alpha), float(levels[1].sigma)
        keep = (0.1 / alpha) * (sigma / 0.9) ** 2
        left = 1 - (0.1 * sigma / (alpha * 0.9)) ** 2
        z = keep * state + alpha * left * x + sigma * math.sqrt(left) * 0.3
        std = sigma / alpha
        low, high = (torch.special.ndtr((e - z / alpha) / std) for e in edges)
        want = -torch.log(high - low)[:, 0]
    torch.testing.assert_close(run.decoder, want, rtol=1e-9, atol=0)


def test_the_network_sees_its_dtype_and_the_sums_are_double():
    levels = grid(S.LinearLogSNR(), 3)
    spy = Spy(DATA.denoiser(S.LinearLogSNR()))
    noise = lambda n: torch.full((n, 3, 1), 0.3)  # noqa: E731
    run = importance_weighted(spy, X.float(), levels, noise, draws=2)
    assert {x_t.dtype for x_t, *_ in spy.seen} == {torch.float32}
    assert run.total.dtype == run.per_step.dtype == torch.float64
    assert (run.calls, len(spy.seen), run.per_step.shape) == (6, 6, (3, 3))


def test_importance_and_tighten_by_hand():
    log_weights = tensor([[-1.0, 800.0], [-2.0, 802.0], [0.5, -900.0]])
    got = importance(log_weights)
    assert float(got[0]) == pytest.approx(-math.log((math.exp(-1) + math.exp(-2) + math.exp(0.5)) / 3))
    assert float(got[1]) == pytest.approx(-(802 + math.log((1 + math.exp(-2)) / 3)))
    parts = [
        nll(tensor([1.0, 2.0]), tensor([0.5 * k, 3.0]), tensor([-1.0, k]), 5 + k, tensor([[k, 2.0], [3.0, 4.0]]))
        for k in (1, 2)
    ]
    run = tighten(parts)
    assert run.total.tolist() == pytest.approx(importance(-torch.stack([p.total for p in parts])).tolist())
    assert run.prior.tolist() == [1.0, 2.0]
    assert run.steps.tolist() == [0.75, 3.0]
    assert run.per_step.tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert run.calls == 13
    torch.testing.assert_close(tighten(parts[:1]).decoder, parts[0].decoder)
    assert float(run.stderr) == pytest.approx(float(run.total.std()) / math.sqrt(2))

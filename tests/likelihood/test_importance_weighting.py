"""Importance-weighted bounds on chains with a known marginal; expectations by quadrature."""

import math
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from oracles import GaussianData, Spy, gaussian_log_prob
from scipy.stats import norm

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import Prediction
from undiffuse.likelihood.decoder import ValueSoftmax
from undiffuse.likelihood.importance_weighting import chain_nll, iwae_bound, log_mean_exp_nll
from undiffuse.likelihood.nll import make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian
from undiffuse.sampling.time_grids import time_grid

tensor = partial(torch.tensor, dtype=torch.float64)
DATA = GaussianData(tensor([0.4]), tensor([0.3]))
X = tensor([[0.4], [1.1], [-0.9]])


def wrong(x_t, level, cond=None, next_level=None):
    """A shifted denoiser with a variance that is not the best one."""
    x, eps, _ = DATA.predict(x_t, level)
    return Prediction(x + 0.1, eps, torch.full_like(x, 0.3))


def marginal(levels, variance):
    """Mean and variance of the chain's own p(x), by the recursion of a linear-Gaussian chain.

    The last step of a chain that ends at sigma 0 gives x; otherwise p(x given z_0) = N(z_0/alpha_0, sigma_0²/alpha_0²).
    """
    mean, var = 0.0, 1.0
    for t, s in pairwise(levels):
        a_t, s_t, a_s, s_s = (float(v) for v in (t.alpha, t.sigma, s.alpha, s.sigma))
        left = 1 - (a_t * s_s / (a_s * s_t)) ** 2
        small = (
            s_s**2 * left
            if s_s > 0
            else math.exp(float(s.final_log_var))
            if s.final_log_var is not None
            else s_t**2 * left
        )
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
    "one step to data": lambda: time_grid(DS.linear(4), 1),
    "two steps to data": lambda: time_grid(DS.linear(4), 2),
    "one step, stays finite": lambda: time_grid(S.LinearLogSNR(high=3.0, low=-1.0), 1),
    "flow between": lambda: time_grid(S.Flow(), times=[0.8, 0.3]),
}


def quadrature(chain, nodes=40, iw_samples=1, **settings):
    """Totals (n, B) and weights (n,) over all nodes of the numbers of ``iw_samples`` trajectories."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    noises = iw_samples * (len(chain.noise_levels) - 1 + int(chain.noise_levels[-1].sigma > 0))
    which = torch.tensor(list(product(range(nodes), repeat=noises)))
    fresh = iter(points[which].T)
    n, B = len(which), len(X)

    def noise(k):
        assert k == 1
        return next(fresh).repeat_interleave(B)[None, :, None]

    run = iwae_bound([chain_nll(chain, X.repeat(n, 1), noise, **settings) for _ in range(iw_samples)])
    assert next(fresh, None) is None
    return run.total.reshape(n, B), (weights / weights.sum())[which].prod(1)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_mean_weight_is_the_density_of_the_chain(name, variance):
    levels = CHAINS[name]()
    mean, var = marginal(levels, variance)
    prior = Gaussian(tensor([0.0]), tensor([0.0]))
    totals, weights = quadrature(ReverseChain(wrong, levels, variance), prior=prior)
    exact = gaussian_log_prob(X, mean, tensor(var))[:, 0]
    torch.testing.assert_close(torch.logsumexp(torch.log(weights)[:, None] - totals, 0), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", CHAINS)
def test_the_mean_over_trajectories_is_the_bound(name):
    chain = ReverseChain(wrong, CHAINS[name](), "learned")
    totals, weights = quadrature(chain)
    nodes = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(X))  # the bound's terms are quadratic
    both = vlb(chain, torch.cat([X, X]), lambda n: nodes[None, :, None].expand(n, -1, -1))
    torch.testing.assert_close(weights @ totals, both.total.reshape(2, -1).mean(0), rtol=1e-9, atol=1e-9)


def test_more_samples_tighten_the_bound_and_approach_the_density():
    """The gap of K samples approaches half the weights' relative variance over K, from below."""
    levels = time_grid(DS.linear(4), 1)
    mean, var = marginal(levels, "large")
    exact = -gaussian_log_prob(X, mean, tensor(var))[:, 0]
    gaps = []
    for K in (1, 2, 3, 4, 5):
        totals, weights = quadrature(ReverseChain(wrong, levels, "large"), nodes=12, iw_samples=K)
        gaps.append(weights @ totals - exact)
        if K == 1:
            half = 0.5 * (weights @ torch.exp(2 * (exact - totals)) - 1)
    for K, (fewer, more) in enumerate(pairwise(gaps), start=1):
        assert bool((more > 0).all())
        assert bool((more < fewer).all())
        assert bool(((K + 1) * more > K * fewer).all())
    share = 5 * gaps[-1] / half
    assert bool((share < 1).all())
    assert float(share[1]) > 0.85  # the item with the least variance of the weights


def test_each_term_by_hand():
    """Three steps, the prior N(0, I) and the small variance, in Ho's notation."""
    beta = np.array([0.1, 0.2, 0.4])
    bar = np.cumprod(1 - beta)
    fresh = np.array([[0.3, -1.0], [0.7, 0.2], [-0.4, 1.5]])
    x = np.array([[0.5, -0.25]])
    numbers = iter(torch.from_numpy(fresh))
    data = GaussianData(tensor([0.4, 0.0]), tensor([0.3, 1.0]))
    spy = Spy(data.denoiser(S.Flow()))
    levels = time_grid(DS.Tabulated(beta))
    cond = Condition(label=torch.zeros(1, dtype=torch.int64))
    run = chain_nll(ReverseChain(spy, levels, cond=cond), torch.from_numpy(x), lambda n: next(numbers)[None, None])
    assert [call[2:] for call in spy.seen] == [(cond, level) for level in levels[1:]]

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
    assert float(run.diffusion_nats) == pytest.approx(terms[0].sum() + terms[1].sum())
    assert run.calls == 3


@pytest.mark.parametrize("ending", [0.0, 0.2])
def test_the_decoder_of_discrete_data_is_that_of_the_bound(ending):
    levels = time_grid(S.Flow(), times=[0.9, ending])
    x, values = tensor([[-1.0], [0.0], [1.0]]), IntegerLevels(3)
    edges, decode = values.edges(x), ValueSoftmax(values)
    noise = lambda n: torch.full((n, 3, 1), 0.3, dtype=torch.float64)  # noqa: E731
    chain = ReverseChain(wrong, levels, "large", first_large="clipped")
    run = chain_nll(chain, x, noise, edges=edges, decode=decode)
    state = float(levels[0].alpha) * x + float(levels[0].sigma) * 0.3
    if ending == 0:
        expected = vlb(chain, x, noise, edges=edges, decode=decode).decoder
    else:
        alpha, sigma = float(levels[1].alpha), float(levels[1].sigma)
        keep = (0.1 / alpha) * (sigma / 0.9) ** 2
        left = 1 - (0.1 * sigma / (alpha * 0.9)) ** 2
        z = keep * state + alpha * left * x + sigma * math.sqrt(left) * 0.3
        expected = -torch.log_softmax(-((z - alpha * x.T) ** 2) / (2 * sigma**2), 1).diagonal()
    torch.testing.assert_close(run.decoder, expected, rtol=1e-9, atol=0)


def test_the_network_gets_the_dtype_of_x_and_sums_are_float64():
    spy = Spy(DATA.denoiser(S.LinearLogSNR()))
    chain = ReverseChain(spy, time_grid(S.LinearLogSNR(), 3))
    noise = lambda n: torch.full((n, 3, 1), 0.3)  # noqa: E731
    run = iwae_bound([chain_nll(chain, X.float(), noise) for _ in range(2)])
    assert {x_t.dtype for x_t, *_ in spy.seen} == {torch.float32}
    assert run.total.dtype == run.per_step.dtype == torch.float64
    assert (run.calls, len(spy.seen), run.per_step.shape) == (6, 6, (3, 3))


def test_log_mean_exp_and_iwae_bound_by_hand():
    log_weights = tensor([[-1.0, 800.0], [-2.0, 802.0], [0.5, -900.0]])
    nll = log_mean_exp_nll(log_weights)
    assert float(nll[0]) == pytest.approx(-math.log((math.exp(-1) + math.exp(-2) + math.exp(0.5)) / 3))
    assert float(nll[1]) == pytest.approx(-(802 + math.log((1 + math.exp(-2)) / 3)))
    parts = [
        make_nll(tensor([1.0, 2.0]), tensor([0.5 * k, 3.0]), tensor([-1.0, k]), 5 + k, tensor([[k, 2.0], [3.0, 4.0]]))
        for k in (1, 2)
    ]
    run = iwae_bound(parts)
    assert run.total.tolist() == pytest.approx(log_mean_exp_nll(-torch.stack([p.total for p in parts])).tolist())
    assert run.prior.tolist() == [1.0, 2.0]
    assert run.diffusion_nats.tolist() == [0.75, 3.0]
    assert run.per_step.tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert run.calls == 13
    torch.testing.assert_close(iwae_bound(parts[:1]).decoder, parts[0].decoder)
    assert float(run.stderr) == pytest.approx(float(run.total.std()) / math.sqrt(2))

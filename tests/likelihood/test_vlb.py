"""The variational bound against closed forms and a recursion in Ho's notation."""

import math
from functools import partial

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracles import GaussianData, Spy, gaussian_kl, gaussian_log_prob
from strategies import chains, gaussians

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import Prediction
from undiffuse.likelihood.decoder import ValueSoftmax
from undiffuse.likelihood.nll import NLL, concatenate, make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import Visit, draw_steps, step_nll, vlb
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian, reverse
from undiffuse.process.prior import prior_kl
from undiffuse.sampling.time_grids import time_grid

tensor = partial(torch.tensor, dtype=torch.float64)
MEAN = tensor([[0.5, -1.0, 0.0], [2.0, -0.3, 0.1]])
VAR = tensor([[0.01, 4.0, 1.0], [0.25, 0.01, 0.6]])
DATA = GaussianData(MEAN, VAR)
X = torch.stack([MEAN + VAR.sqrt(), MEAN - VAR.sqrt(), MEAN + 3 * VAR.sqrt() * tensor([1.0, -1.0, 0.5])])


def analytic(chain, x, **settings) -> NLL:
    """The bound with the exact expectation over every eps: its terms are quadratic in each number."""
    sign = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat_interleave(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    both = vlb(chain, torch.cat([x, x]), lambda n: sign.expand(n, -1, *x.shape[1:]), **settings)
    prior, steps, decoder, per_step = (
        v.reshape(2, len(x), *v.shape[1:]).mean(0)
        for v in (both.prior, both.diffusion_nats, both.decoder, both.per_step)
    )
    return make_nll(prior, steps, decoder, both.calls, per_step)


def total(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(1)


def falling_log_snr(chain: ReverseChain) -> torch.Tensor:
    return torch.stack([level.log_snr for level in reversed(chain.noise_levels)])


def feed(numbers):
    """A noise function that returns each of ``numbers`` once, one per call."""
    fresh = iter(numbers)

    def noise(draws):
        assert draws == 1
        return next(fresh)[None]

    return noise


CHAINS = {  # the chain of T steps, and the standard deviation of the default prior
    "linear": (lambda T: time_grid(DS.linear(), T), 1.0),
    "linear, every step": (lambda T: time_grid(DS.linear(T), T), 1.0),
    "quadratic, sub-grid": (lambda T: time_grid(DS.quadratic(100), T), 1.0),
    "cosine": (lambda T: time_grid(DS.cosine(T)), 1.0),
    "zero terminal": (lambda T: time_grid(DS.Tabulated([*[0.1] * (T - 1), 1.0])), 1.0),
    "sigmoid": (lambda T: time_grid(S.Sigmoid(), T), 1.0),
    "flow": (lambda T: time_grid(S.Flow(), T), 1.0),
    "flow, from 0.9": (lambda T: time_grid(S.Flow(), times=np.linspace(0.9, 0, T + 1).tolist()), 0.9),
    "linear log-SNR": (lambda T: time_grid(S.LinearLogSNR(), T), 1.0),
    "exploding": (lambda T: time_grid(S.VarianceExploding(), T), 50.0),
    "flow between": (lambda T: time_grid(S.Flow(), times=np.linspace(0.9, 0.05, T + 1).tolist()), 0.9),
    "uneven": (lambda T: time_grid(S.LinearLogSNR(), times=np.linspace(1, 0.1, T + 1) ** 2), 1.0),
}


def closed_form(x, levels):
    """The bound of the exact reverse process: −log p(x) if the chain ends in data.

    The decoder of a chain that stays finite is N(z_0/alpha_0, sigma_0²/alpha_0²), which is not p(x|z_0). Its steps
    sum to KL(q(z_0|x) to q(z_0)) for any number of steps, and its decoder is ½ log(2πe sigma_0²/alpha_0²).
    """
    end = levels[-1]
    if end.sigma == 0:
        return -total(gaussian_log_prob(x, MEAN, VAR))
    path = gaussian_kl(end.alpha * x, end.sigma**2 + 0 * x, end.alpha * MEAN, DATA.marginal_var(end))
    return total(path + 0.5 * torch.log(2 * math.pi * math.e * end.sigma**2 / end.alpha**2))


@pytest.mark.parametrize("T", [1, 4, 33])
@pytest.mark.parametrize("name", CHAINS)
def test_the_bound_of_the_exact_reverse_process_is_exact(name, T):
    make, scale = CHAINS[name]
    levels = make(T)
    chain = ReverseChain(DATA.denoiser(S.Flow()), levels, DATA.reverse_log_var)
    top = levels[0]
    marginal = Gaussian((top.alpha * MEAN)[None], torch.log(DATA.marginal_var(top))[None])
    usual = analytic(chain, X)
    prior = total(prior_kl(X, top, marginal))
    exact = prior + usual.diffusion_nats + usual.decoder
    assert float((exact - closed_form(X, levels)).abs().max()) < 1e-8 * 6
    if T < 5:
        given_prior = analytic(chain, X, prior=marginal)
        torch.testing.assert_close(given_prior.total, exact, rtol=1e-12, atol=1e-12)

    at_one_std = X[:2]  # quadratic in x too, so the mean over ± one standard deviation is the mean over the data
    gap = gaussian_kl(top.alpha * MEAN, DATA.marginal_var(top), 0 * MEAN, torch.full_like(MEAN, scale**2)).sum()
    entropy = DATA.entropy() if levels[-1].sigma == 0 else closed_form(at_one_std, levels).mean()
    assert abs(float(usual.total[:2].mean() - entropy - gap)) < 1e-8 * 6


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@hypothesis_settings(max_examples=40)
@given(levels=chains(), data=gaussians(), shift=st.floats(-1, 1), var_interp=st.floats(-1, 2))
def test_the_bound_is_above_the_entropy(levels, data, shift, var_interp, variance):
    def wrong(x_t, level, cond=None, next_level=None):
        x, eps, _ = data.predict(x_t, level)
        return Prediction(x + shift, eps, torch.full_like(x, var_interp))

    x = torch.stack([data.m + data.cov.sqrt(), data.m - data.cov.sqrt()])
    bound = analytic(ReverseChain(wrong, levels, variance), x).total.mean()
    assert bound > data.entropy() - 1e-9


@pytest.mark.parametrize("name", ["linear log-SNR", "exploding", "flow between"])
def test_steps_fall_to_the_continuous_bound(name):
    x = X[:2]
    make, _ = CHAINS[name]
    runs = [analytic(ReverseChain(DATA.denoiser(S.Flow()), make(T)), x) for T in (20, 40, 80)]
    values = tensor([float(run.diffusion_nats.mean()) for run in runs])
    ends = make(1)
    noise, clean = (0.5 * torch.log(DATA.marginal_var(v) / v.sigma**2).sum() for v in ends)
    excess = values - (clean - noise)  # I(x; z_0) − I(x; z_1)
    assert bool((excess > 0).all())
    assert bool((values.diff() < 0).all())
    ratios = excess[:-1] / excess[1:]
    assert bool(((ratios > 1.6) & (ratios < 2.4)).all())


# --- each term by hand -------------------------------------------------------------------------------------------


class Affine:
    """A wrong denoiser in closed form: ε̂ = 0.6 x_t − 0.2, var_interp = 0.3."""

    schedule = S.Flow()

    def __call__(self, x_t, level, cond=None, next_level=None):
        at, eps = level.broadcast_like(x_t), 0.6 * x_t - 0.2
        return Prediction((x_t - at.sigma * eps) / at.alpha, eps, torch.full_like(x_t, 0.3))


def ho_terms(alpha_bar, x, noise, variance, first_large="beta"):
    """[L_0, .., L_{N−1}] per element [Ho20 eq. 5, 8]; ``alpha_bar`` and ``noise`` begin with step 1."""
    alpha_bar = np.concatenate([[1.0], alpha_bar])
    beta = np.concatenate([[np.nan], 1 - alpha_bar[1:] / alpha_bar[:-1]])
    small = [np.nan, *(beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) for t in range(1, len(beta)))]
    small[1] = small[2] if len(small) > 2 else beta[1]
    terms = []
    for t in range(1, len(beta)):
        x_t = np.sqrt(alpha_bar[t]) * x + np.sqrt(1 - alpha_bar[t]) * noise[t - 1]
        mean = (x_t - beta[t] / np.sqrt(1 - alpha_bar[t]) * (0.6 * x_t - 0.2)) / np.sqrt(1 - beta[t])
        big = small[1] if first_large == "clipped" and t == 1 else beta[t]
        var = {"small": small[t], "large": big, "learned": big**0.3 * small[t] ** 0.7}[variance]
        if t == 1:
            terms.append((mean, var))
            continue
        ahead = np.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) * x_t + np.sqrt(alpha_bar[t - 1]) * beta[t] * x
        gap = ahead / (1 - alpha_bar[t]) - mean
        terms.append(0.5 * (np.log(var / small[t]) - 1 + (small[t] + gap**2) / var))
    return terms


HAND = {
    "all": (np.linspace(0.01, 0.3, 7), range(8)),
    "sub-grid": (np.linspace(1e-4, 0.02, 1000), [0, 1, 40, 555, 990, 1000]),
    "one step": (np.array([0.7]), range(2)),
}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(
    ("variance", "first_large"),
    [("small", "beta"), ("large", "beta"), ("large", "clipped"), ("learned", "beta")],
)
@pytest.mark.parametrize("name", HAND)
def test_each_term_in_the_notation_of_ho(name, variance, first_large, discrete):
    beta, kept = HAND[name]
    kept = list(kept)
    schedule = DS.Tabulated(beta)
    levels = time_grid(schedule, times=[k / len(beta) for k in kept[::-1]])
    x = X.clamp(-1, 1)
    edges = (torch.where(x <= -1, -math.inf, x - 0.02), torch.where(x >= 1, math.inf, x + 0.02))
    noise = np.random.default_rng(0).normal(size=(len(kept) - 1, *x.shape))
    chain = ReverseChain(Affine(), levels, variance, first_large=first_large)
    result = vlb(chain, x, feed(torch.from_numpy(noise)), edges=edges if discrete else None)
    alpha_bar = np.cumprod(1 - beta)[[k - 1 for k in kept[1:]]]
    terms = ho_terms(alpha_bar, x.numpy(), noise, variance, first_large)
    mean, var = terms[0]
    if discrete:
        terms[0] = -bin_log_prob(mean, np.sqrt(var), *(e.numpy() for e in edges))
    else:
        terms[0] = 0.5 * (np.log(2 * np.pi * var) + (x.numpy() - mean) ** 2 / var)
    expected = np.stack([term.reshape(len(x), -1).sum(1) for term in terms], 1)
    np.testing.assert_allclose(result.per_step, expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(result.decoder, expected[:, 0], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(result.diffusion_nats, expected[:, 1:].sum(1), rtol=1e-9, atol=1e-300)
    top = alpha_bar[-1]
    prior = 0.5 * (-top - np.log(1 - top) + top * x.numpy() ** 2)
    np.testing.assert_allclose(result.prior, prior.reshape(len(x), -1).sum(1), rtol=1e-9)
    np.testing.assert_allclose(result.total, result.prior + result.diffusion_nats + result.decoder, rtol=0, atol=0)
    assert result.calls == len(kept) - 1


def bin_log_prob(mean, std, low, high):
    def one(m, a, b):
        with mpmath.workdps(60):
            below, above = (mpmath.ncdf((mpmath.mpf(float(e)) - m) / std) for e in (a, b))
            return float(mpmath.log(above - below))

    return np.vectorize(one)(mean, low, high)


def test_decoder_of_a_chain_that_stays_finite():
    levels = time_grid(S.Flow(), times=[0.9, 0.5, 0.2])
    transform = IntegerLevels(101)
    k = transform.to_data(X.clamp(-1, 1)).long()
    x, v = transform.to_model(k, torch.float64), transform.to_model(torch.arange(101), torch.float64)
    eps = torch.randn(3, *X.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    decode = ValueSoftmax(transform)
    result = vlb(ReverseChain(Affine(), levels), x, feed(eps), edges=transform.edges(x), decode=decode)
    log_q = -(((x + 0.25 * eps[2])[..., None] - v) ** 2) / (2 * 0.25**2)  # alpha 0.8, sigma 0.2
    expected = -torch.log_softmax(log_q, -1).gather(-1, k[..., None])
    np.testing.assert_allclose(result.decoder, expected.reshape(3, -1).sum(1), rtol=1e-9)
    assert result.per_step.shape == (3, 2)
    assert not result.per_step.isnan().any()
    torch.testing.assert_close(result.per_step.sum(1), result.diffusion_nats)


# --- a part of the steps -------------------------------------------------------------------------------------------


def every_draw(log_snr: torch.Tensor, m: int) -> list[tuple[Visit, torch.Tensor]]:
    """The visits of `draw_steps` for a grid of uniform numbers, one item for each, and their steps' frequencies."""
    u = ((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000).expand(m, -1)
    drawn = draw_steps(log_snr, u)
    return [(visit, torch.bincount(visit.steps, minlength=len(log_snr)) / u.shape[1]) for visit in drawn]


@pytest.mark.parametrize(
    "make",
    [
        lambda: time_grid(DS.cosine(7)),
        lambda: time_grid(DS.linear(7)),
        lambda: time_grid(S.LinearLogSNR(), 7),
    ],
)
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_a_part_of_the_steps_is_unbiased(make, m):
    chain, eps = ReverseChain(Affine(), make()), 0.3 * torch.ones(1, dtype=torch.float64)
    noise = lambda n: eps.expand(n, *X.shape)  # noqa: E731
    exact = vlb(chain, X, noise)
    log_snr, mean = falling_log_snr(chain), torch.zeros(2, len(X), dtype=torch.float64)
    for visit, frequencies in every_draw(log_snr, m):
        for k in frequencies.nonzero().flatten().tolist():
            weight = visit.weights[visit.steps == k][0].expand(len(X))
            part = vlb(chain, X, noise, visits=[Visit(torch.full((len(X),), k), weight)])
            assert part.calls == 1
            assert torch.equal(part.per_step.isfinite().any(0).nonzero().flatten(), torch.tensor([k - 1]))
            torch.testing.assert_close(part.per_step[:, k - 1], exact.per_step[:, k - 1], rtol=1e-13, atol=0)
            torch.testing.assert_close(part.prior, exact.prior)
            mean += frequencies[k] * torch.stack([part.diffusion_nats, part.decoder])
    if log_snr[0].isfinite():  # the decoder at a finite end is not a step: each part above has it
        mean[1] = exact.decoder
    expected = torch.stack([exact.diffusion_nats, exact.decoder])
    torch.testing.assert_close(mean, expected, rtol=3e-3, atol=0)  # the grid's 40,000 numbers; a step is 1/7 or so
    assert len(every_draw(log_snr, m)) == m + int(log_snr.isinf().sum())


def test_items_may_be_on_different_steps():
    chain, eps = ReverseChain(Affine(), time_grid(DS.linear(5))), tensor([0.3])
    edges = (X - 0.1, X + 0.1)
    noise = lambda n: eps.expand(n, *X.shape)  # noqa: E731
    exact = vlb(chain, X, noise, edges=edges)
    visits = [Visit(torch.tensor([1, 4, 2]), tensor([5.0, 6.0, 7.0]))]
    mixed = vlb(chain, X, noise, edges=edges, visits=visits)
    assert torch.equal(mixed.per_step.isfinite().nonzero(), torch.tensor([[0, 0], [1, 3], [2, 1]]))
    assert torch.equal(mixed.decoder, 5 * torch.stack([exact.per_step[0, 0], *torch.zeros(2, dtype=torch.float64)]))
    expected = torch.stack([5 * exact.per_step[0, 0], 6 * exact.per_step[1, 3], 7 * exact.per_step[2, 1]])
    torch.testing.assert_close(mixed.diffusion_nats + mixed.decoder, expected, rtol=1e-14, atol=0)


def test_steps_are_drawn_by_their_range_of_log_snr():
    even = torch.linspace(6.0, -6.0, 9)
    for j, (visit, frequencies) in enumerate(every_draw(even, 4)):
        torch.testing.assert_close(visit.weights, torch.full_like(visit.weights, 2.0))
        torch.testing.assert_close(frequencies.nonzero().flatten(), torch.tensor([2 * j + 1, 2 * j + 2]))
    (_, frequencies), *_ = every_draw(tensor([8.0, 6.0, 5.0, 0.0]), 1)
    expected = 0.9 * tensor([2.0, 1.0, 5.0]) / 8 + 0.1 / 3
    torch.testing.assert_close(frequencies[1:].double(), expected, rtol=1e-3, atol=0)
    # below log-SNR −20 every step has the tenth that is spread evenly
    (_, frequencies), *_ = every_draw(tensor([-16.0, -19.0, -21.0, -40.0]), 1)
    expected = 0.9 * tensor([3.0, 1.0, 0.0]) / 4 + 0.1 / 3
    torch.testing.assert_close(frequencies[1:].double(), expected, rtol=1e-3, atol=0)
    # steps of infinite range are visited by every item, and the others share the draws
    clean = tensor([math.inf, 8.0, 4.0, 0.0, -math.inf])
    decoder, noisy, *rest = every_draw(clean, 2)
    assert [int(decoder[0].steps[0]), int(noisy[0].steps[0])] == [1, 4]
    assert torch.equal(decoder[0].weights, torch.ones(40_000))
    assert [v.steps.unique().tolist() for v, _ in rest] == [[2], [3]]
    assert len(draw_steps(tensor([math.inf, 0.0, -math.inf]), torch.rand(1, 3))) == 2


def test_numbers_at_the_ends_of_the_interval_draw_the_first_and_the_last_step():
    log_snr = torch.linspace(5.0, -5.0, 1001)
    first, last = draw_steps(log_snr, torch.tensor([[0.0], [1.0]]))  # float32 numbers just below 1 may round to 1
    assert (int(first.steps), int(last.steps)) == (1, 1000)
    assert int(draw_steps(tensor([2.0, 1.0, -math.inf]), torch.ones(1, 1))[1].steps) == 1


@pytest.mark.parametrize("make", [DS.linear, DS.cosine])
def test_few_steps_of_a_table_have_less_variance_than_uniform_ones(make):
    # the exact denoiser and fixed noise: the variance of one draw of each range is that of weight · term in it
    chain, eps = ReverseChain(DATA.denoiser(S.Flow()), time_grid(make(1000))), tensor([0.3])
    terms = vlb(chain, X, lambda n: eps.expand(n, *X.shape), edges=(X - 1 / 255, X + 1 / 255)).per_step

    def variance(draws):
        return sum((visit.weights * terms[:, visit.steps - 1]).var(1, correction=0) for visit, _ in draws)

    for m in (2, 16):
        uniform = every_draw(torch.arange(1000.0, -1.0, -1.0), m)
        assert (variance(every_draw(falling_log_snr(chain), m)) < variance(uniform) / 50).all()


# --- calls of the denoiser, and the result -------------------------------------------------------------------------


def test_the_denoiser_gets_level_condition_next_level_and_dtype():
    spy, levels = Spy(DATA.denoiser(S.Flow())), time_grid(DS.linear(3))
    cond = Condition(label=torch.arange(3))
    noise = torch.full((1, *X.shape), 0.5)
    single = vlb(ReverseChain(spy, levels, cond=cond), X.float(), lambda n: noise[:n])
    for k, (x_t, level, call_cond, next_level) in enumerate(spy.seen, start=1):
        t, s = levels[3 - k], levels[4 - k]
        assert (x_t.dtype, call_cond) == (torch.float32, cond)
        assert torch.equal(level.alpha, t.alpha.expand(3))
        assert torch.equal(level.log_snr, t.log_snr.expand(3))
        assert torch.equal(next_level.sigma, s.sigma.expand(3))
        torch.testing.assert_close(x_t, (t.alpha * X + t.sigma * 0.5).float())
    assert len(spy.seen) == 3
    double = vlb(ReverseChain(DATA.denoiser(S.Flow()), levels), X, lambda n: noise[:n].double())
    for field in ("prior", "diffusion_nats", "decoder", "per_step", "stderr"):
        assert getattr(single, field).dtype == torch.float64
        torch.testing.assert_close(getattr(single, field), getattr(double, field), rtol=1e-4, atol=1e-6)


def test_prior_kl_defaults():
    vp, ve = S.LinearLogSNR()(1.0), S.VarianceExploding(0.01, 50.0)(1.0)
    for level, scale in ((vp, 1.0), (ve, 50.0), (S.Flow()(0.25), 0.25)):
        expected = gaussian_kl(level.alpha * X, level.sigma**2 + 0 * X, 0 * X, scale**2 + 0 * X)
        torch.testing.assert_close(prior_kl(X, level), expected, rtol=1e-9, atol=1e-13)
    batch = S.LinearLogSNR()(tensor([0.2, 0.6, 1.0]))
    own = Gaussian(X + 1, torch.zeros_like(X) + 0.4)
    for i in range(3):
        alone = prior_kl(X[i : i + 1], batch.take(i), Gaussian(own.mean[i], own.log_var[i]))
        torch.testing.assert_close(prior_kl(X, batch, own)[i : i + 1], alone, rtol=1e-14, atol=0)


def test_gradients_are_finite_in_a_batch_that_mixes_decoder_and_steps():
    t, s = (DS.linear()(tensor(k) / 1000) for k in ([3, 2, 1], [2, 1, 0]))
    x = X.clamp(-1, 1)
    edges = (torch.where(x <= -1, -math.inf, x - 1 / 255), torch.where(x >= 1, math.inf, x + 1 / 255))
    var_interp = torch.full_like(x, 0.5, requires_grad=True)
    mean = (x + 3).requires_grad_()  # so far off that a bin's probability is a subnormal number
    terms = step_nll(reverse(Prediction(mean, x, var_interp), x, t, s, "learned"), x, x, t, s, edges)
    terms.sum().backward()
    assert all(bool(v.isfinite().all()) for v in (terms, mean.grad, var_interp.grad))


def test_result():
    chain, eps = ReverseChain(Affine(), time_grid(DS.cosine(4))), 0.2 * torch.ones(1, dtype=torch.float64)
    run = lambda x: vlb(chain, x, lambda n: eps.expand(n, *x.shape))  # noqa: E731
    whole, parts = run(X), concatenate([run(X[:1]), run(X[1:])])
    torch.testing.assert_close(concatenate([whole]).total, whole.total)
    for field in (name for name in NLL._fields if name != "extra"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-14, atol=0)
        assert getattr(whole.cpu(), field) is getattr(whole, field)  # no copy on the CPU
    assert whole.extra == parts.extra == {}
    assert float(whole.stderr) == pytest.approx(np.std(whole.total.numpy(), ddof=1) / math.sqrt(3))
    assert run(X[:1]).stderr.isnan()
    assert run(X[:2]).stderr.isfinite()
    torch.testing.assert_close(whole.bits_per_dim(6), whole.total / 6 / math.log(2))


def test_calls_of_several_batches_are_their_mean_rounded_up():
    some, none = torch.zeros(3, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64)
    parts = [
        make_nll(part, part, part, calls, none.expand(len(part), 0)) for part, calls in ((some, 10), (some[:1], 15))
    ]
    assert concatenate(parts).calls == 12  # (3·10 + 15)/4

"""The losses: one number in every frame, Ho's relations between them, and their minimum."""

import math

import pytest
import torch
from oracles import GaussianData
from torch import Tensor

from undiffuse import loss
from undiffuse.conditioning import Condition
from undiffuse.denoiser import Prediction
from undiffuse.grids import grid
from undiffuse.likelihood import vlb
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process import weighting
from undiffuse.process.gaussian import diffuse
from undiffuse.process.level import log_var_large, log_var_small

f64 = torch.float64
DATA = GaussianData(torch.tensor([[0.5, -1.0], [0.2, 2.0]]), torch.tensor([[0.04, 2.0], [1.0, 0.01]]))
SCHEDULE = S.linear(40)
K = torch.tensor([2.0, 17.0, 40.0], dtype=f64)
T_LEVEL, S_LEVEL = SCHEDULE(K / 40), SCHEDULE((K - 1) / 40)
BETA = SCHEDULE.beta[K.long() - 1]
BAR = torch.cumprod(1 - SCHEDULE.beta, 0)[K.long() - 1]


def randn(seed: int) -> Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)


X, EPS, Y_HAT = randn(0), randn(1), randn(2)
X_T = diffuse(X, T_LEVEL, EPS)
WRONG = Prediction((X_T - T_LEVEL.like(X).sigma * Y_HAT) / T_LEVEL.like(X).alpha, Y_HAT, torch.full_like(X, 0.3))
W = torch.tensor([0.5, 2.0, 3.0], dtype=f64)


def by_item(values: Tensor) -> Tensor:
    """The mean over an item's numbers, one at a time."""
    return torch.stack([torch.stack([v for row in item for v in row]).sum() / 4 for item in values])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_matching_is_the_noise_loss_in_any_frame(name):
    target = targets.build(name)
    y_hat = target.encode(*WRONG[:2], T_LEVEL, S_LEVEL)  # what a network that predicts WRONG would say
    a, b, c = target.frame(T_LEVEL, S_LEVEL)
    expected = W * by_item((EPS - Y_HAT) ** 2)
    torch.testing.assert_close(loss.weighted(WRONG, EPS, W), expected, rtol=1e-12, atol=0)
    if name == "previous":  # in expectation over z = ±1, up to the constant w_y c²
        losses = [loss.matching(y_hat, target, X, EPS, W, T_LEVEL, S_LEVEL, z * torch.ones_like(X)) for z in (1, -1)]
        expected = expected + W * (T_LEVEL.alpha / (T_LEVEL.alpha * b - T_LEVEL.sigma * a)) ** 2 * c**2
        assert bool((c > 0).all())
        torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-10, atol=0)
    else:
        s = S_LEVEL if target.pair else None
        torch.testing.assert_close(loss.matching(y_hat, target, X, EPS, W, T_LEVEL, s), expected, rtol=1e-10, atol=0)
        scalar = loss.matching(y_hat, target, X, EPS, torch.tensor(2.0), T_LEVEL, s)
        torch.testing.assert_close(scalar, 2 * expected / W, rtol=1e-10, atol=0)


def test_simple_loss():
    torch.testing.assert_close(loss.simple(WRONG, EPS), by_item((EPS - Y_HAT) ** 2), rtol=1e-12, atol=0)
    assert torch.equal(loss.weighted(WRONG, EPS, torch.tensor(1.0)), loss.simple(WRONG, EPS))
    single = Prediction(*(v.float() for v in WRONG[:2]))
    assert loss.weighted(single, EPS.float(), W).dtype == torch.float32
    assert loss.matching(Y_HAT.float(), targets.build("x"), X.float(), EPS.float(), W, T_LEVEL).dtype == torch.float32


def test_mean_matching_and_the_bound_in_the_notation_of_ho():
    """‖μ̃ − μ‖² = β²/((1−β)(1−ᾱ)) ‖ε − ε̂‖² [Ho20 eq. 8, 10]; divided by 2σ² it is the bound's term [eq. 12]."""
    simple = loss.simple(WRONG, EPS)
    means = loss.mean_matching(WRONG, X, X_T, T_LEVEL, S_LEVEL)
    torch.testing.assert_close(means, BETA**2 / ((1 - BETA) * (1 - BAR)) * simple, rtol=1e-9, atol=0)
    before = torch.cumprod(1 - SCHEDULE.beta, 0)[K.long() - 2]
    small = BETA * (1 - before) / (1 - BAR)
    term = loss.bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL)
    torch.testing.assert_close(term, means / (2 * small), rtol=1e-9, atol=0)
    w = weighting.build("bound")(T_LEVEL, S_LEVEL)
    torch.testing.assert_close(loss.weighted(WRONG, EPS, w), term, rtol=1e-9, atol=0)
    large = loss.bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL, "large")
    constant = 0.5 * (torch.log(BETA / small) - 1 + small / BETA)
    torch.testing.assert_close(large, constant + means / (2 * BETA), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("discrete", [False, True])
def test_bound_terms_are_those_of_the_likelihood(variance, discrete):
    levels = grid(SCHEDULE, 8)
    edges = (X - 0.1, X + 0.1) if discrete else None
    denoise = DATA.denoiser(SCHEDULE, nu=0.7)
    bound = vlb(denoise, X, levels, lambda n: EPS.expand(n, *X.shape), variance=variance, edges=edges)
    for k in range(1, 9):
        t, s = levels[8 - k], levels[9 - k]
        x_t = diffuse(X, t, EPS)
        term = loss.bound_term(denoise(x_t, t), X, x_t, t, s, variance, edges)
        torch.testing.assert_close(4 * term, bound.per_step[:, k - 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"share": 0.25, "edges": (X - 0.1, X + 0.1)}])
def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_noise(settings):
    s = SCHEDULE((K - 1) / 40 * torch.tensor([0.0, 1.0, 1.0]))  # the first item's step ends in data

    def leaves():
        return [v.clone().requires_grad_() for v in WRONG]

    x_hat, eps_hat, nu = leaves()
    result = loss.hybrid(Prediction(x_hat, eps_hat, nu), EPS, X, X_T, T_LEVEL, s, 40, **settings)
    term = loss.bound_term(WRONG, X, X_T, T_LEVEL, s, "learned", settings.get("edges"))
    share = settings.get("share", 0.001)
    torch.testing.assert_close(result, loss.simple(WRONG, EPS) + share * 40 * term, rtol=1e-12, atol=0)
    result.sum().backward()
    assert x_hat.grad is None
    torch.testing.assert_close(eps_hat.grad, (eps_hat - EPS).detach() / 2)
    only = leaves()[2]
    (
        share * 40 * loss.bound_term(WRONG._replace(nu=only), X, X_T, T_LEVEL, s, "learned", settings.get("edges"))
    ).sum().backward()
    torch.testing.assert_close(nu.grad, only.grad, rtol=1e-12, atol=0)
    assert bool((nu.grad != 0).all())


def test_the_hybrid_loss_of_improved_diffusion_is_in_bits():
    """There vb is one step's KL or decoder in bits per dimension, times T/1000 (`rescale_learned_sigmas`)."""
    term = loss.bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL, "learned")
    theirs = loss.simple(WRONG, EPS) + term / math.log(2) * 40 / 1000
    ours = loss.hybrid(WRONG, EPS, X, X_T, T_LEVEL, S_LEVEL, 40, share=0.001 / math.log(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


# --- a learned variance by the bound alone, and the whole bound in one loss -------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_the_bound_alone_has_its_gradient_in_mean_and_variance(discrete):
    """By finite differences; the step of the first item ends in data."""
    s = SCHEDULE((K - 1) / 40 * torch.tensor([0.0, 1.0, 1.0]))
    edges = (X - 0.1, X + 0.1) if discrete else None

    def term(x_hat, nu):
        return loss.bound_term(Prediction(x_hat, EPS, nu), X, X_T, T_LEVEL, s, "learned", edges)

    near = X + 0.02 * randn(5)
    assert torch.autograd.gradcheck(term, (near.requires_grad_(), torch.full_like(X, 0.3).requires_grad_()))
    by_mean, by_nu = torch.autograd.grad(term(near, WRONG.nu.requires_grad_()).sum(), (near, WRONG.nu))
    assert bool((by_mean != 0).all())
    assert bool((by_nu != 0).all())
    WRONG.nu.requires_grad_(False)


@pytest.mark.parametrize("ends", [(1.0, 0.5), (0.5, 0.45), (0.075, 0.05), (0.025, 0.0)])
def test_the_bound_is_least_at_the_variance_of_the_reverse_step(ends):
    """On Gaussian data with the exact mean, averaged over x and ε exactly: its terms are quadratic in both."""
    t, s = grid(SCHEDULE, times=[*sorted({1.0, *ends}, reverse=True)])[-2:]
    s = s._replace(floor=SCHEDULE(0.0).floor) if ends[1] == 0 else s
    std, one = DATA.cov.sqrt()[None], torch.ones(1, 2, 2, dtype=f64)
    x = DATA.m + torch.cat([std, std, -std, -std])
    eps = torch.cat([one, -one, one, -one])
    x_t = diffuse(x, t, eps)
    exact = DATA.predict(x_t, t)

    def average(nu):
        return loss.bound_term(exact._replace(nu=nu.expand(x.shape)), x, x_t, t, s, "learned").mean()

    small, large = log_var_small(t, s), log_var_large(t, s)
    best = (DATA.reverse_log_var(t, s) - small) / (large - small)
    for off in (0.0, -0.1, 0.1):
        nu = (best + off)[None].requires_grad_()
        value = average(nu)
        (gradient,) = torch.autograd.grad(value, nu)
        if off:
            assert bool((gradient.sign() == math.copysign(1, off)).all())
            assert float(value.detach()) > float(average(best[None]))
        else:
            assert float(gradient.abs().max()) < 1e-12
    if ends[1] > 0:  # the large one is that of data of variance 1, and the small one that of a point [Ho20 §3.2]
        assert bool((best > 0).all())
        assert torch.equal((best - 1).abs().gt(1e-9) * (best - 1).sign(), (DATA.cov - 1).sign())


@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("schedule", [S.linear(8), S.LinearLogSNR(6.0, -5.0)])
def test_the_full_bound_is_the_sum_of_its_steps_with_its_gradient(schedule, variance):
    """Value and gradient are those of T times the term of a uniform step, averaged over the steps."""
    levels = grid(schedule, 8)
    weights = [torch.tensor(v, dtype=f64, requires_grad=True) for v in (0.7, -0.2, 0.4)]

    def denoise(x_t, level, cond=None, to=None):
        seen.append(cond)
        a, b, nu = weights
        x = a * x_t + b
        return Prediction(x, (x_t - level.like(x_t).alpha * x) / level.like(x_t).sigma, nu.expand(x_t.shape))

    fresh = [torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(k), dtype=f64) for k in range(9)]
    numbers, seen, told = iter(fresh), [], Condition()
    whole = loss.full_bound(denoise, X, levels, lambda n: next(numbers)[None], variance, cond=told)
    assert whole.shape == (3,)
    assert seen == [told] * 8
    parts = torch.zeros(3, dtype=f64)
    for t, s, eps in zip(levels[::-1][1:], levels[::-1], fresh, strict=False):
        x_t = diffuse(X, t, eps)
        parts = parts + 8 * loss.bound_term(denoise(x_t, t), X, x_t, t, s, variance) / 8
    rest = whole.detach() - parts.detach()  # the prior and, where the chain stays finite, its decoder
    again = iter(fresh)
    bound = vlb(denoise, X, levels, lambda n: next(again)[None], variance=variance)
    ends = bound.prior if levels[-1].sigma == 0 else bound.prior + bound.decoder
    torch.testing.assert_close(rest, ends.detach() / 4, rtol=1e-10, atol=1e-12)
    used = weights[: 3 if variance == "learned" else 2]
    for one, other in zip(*(torch.autograd.grad(v.sum(), used) for v in (whole, parts)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
        assert float(one) != 0
    edges = (X - 0.1, X + 0.1)
    binned, total = (
        f(denoise, X, levels, lambda n: EPS[None], variance=variance, edges=edges) for f in (loss.full_bound, vlb)
    )
    torch.testing.assert_close(binned, total.total / 4)


def test_the_exact_denoiser_has_the_least_loss_there_is():
    """E‖ε − E[ε|x_t]‖² in closed form: the error is linear in the independent (x, ε) of each dimension."""
    for level in (S.Flow()(0.3), S.LinearLogSNR()(0.5), S.VarianceExploding()(0.6)):
        std, one = DATA.cov.sqrt()[None], torch.ones(1, 2, 2, dtype=f64)
        total, worse = torch.zeros(1, dtype=f64), torch.zeros(1, dtype=f64)
        for x, eps in ((DATA.m + std, 0 * one), (DATA.m + 0 * std, one)):
            exact = DATA.predict(diffuse(x, level, eps), level)
            total += loss.simple(exact, eps)
        for sign in (1, -1):
            for x, eps in ((DATA.m + sign * std, 0 * one), (DATA.m + 0 * std, sign * one)):
                off = DATA.predict(diffuse(x, level, eps), level)
                worse += loss.simple(off._replace(eps=1.01 * off.eps), eps) / 2
        torch.testing.assert_close(total, DATA.loss_minimum(level)[None], rtol=1e-12, atol=0)
        assert float(worse) > float(total) * (1 + 1e-6)
        x, eps = DATA.m + std, 0 * one
        in_v = targets.build("v")
        exact = DATA.predict(diffuse(x, level, eps), level)
        y_hat = in_v.encode(*exact[:2], level)
        both = loss.matching(y_hat, in_v, x, eps, torch.tensor(1.0), level), loss.simple(exact, eps)
        torch.testing.assert_close(*both, rtol=1e-9, atol=0)

"""The losses: one number in every frame, Ho's relations between them, and their minimum."""

import pytest
import torch
from oracles import GaussianData
from torch import Tensor

from undiffuse import loss
from undiffuse.denoiser import Prediction
from undiffuse.likelihood import vlb
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process import weighting
from undiffuse.process.gaussian import diffuse
from undiffuse.sample import grid

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

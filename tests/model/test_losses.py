"""The losses: the same number in every frame, Ho's relations between them, and their minimum."""

import math

import pytest
import torch
from oracles import GaussianData
from torch import Tensor

from undiffuse.denoising.denoiser import Prediction
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.model import losses as loss
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process import weighting
from undiffuse.process.gaussian import diffuse, reverse
from undiffuse.process.noise_level import log_var_large, log_var_small
from undiffuse.sampling.time_grids import time_grid

f64 = torch.float64
DATA = GaussianData(torch.tensor([[0.5, -1.0], [0.2, 2.0]]), torch.tensor([[0.04, 2.0], [1.0, 0.01]]))
SCHEDULE = DS.linear(40)
K = torch.tensor([2.0, 17.0, 40.0], dtype=f64)
T_LEVEL, S_LEVEL = SCHEDULE(K / 40), SCHEDULE((K - 1) / 40)
BETA = SCHEDULE.beta[K.long() - 1]
BAR = torch.cumprod(1 - SCHEDULE.beta, 0)[K.long() - 1]


def randn(seed: int) -> Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)


X, EPS, Y_HAT = randn(0), randn(1), randn(2)
X_T = diffuse(X, T_LEVEL, EPS)
WRONG = Prediction(
    (X_T - T_LEVEL.broadcast_like(X).sigma * Y_HAT) / T_LEVEL.broadcast_like(X).alpha, Y_HAT, torch.full_like(X, 0.3)
)
W = torch.tensor([0.5, 2.0, 3.0], dtype=f64)


def bound_term(prediction, x, x_t, t, s, variance="small", edges=None) -> Tensor:
    """`losses.bound_term` of a prediction."""
    return loss.bound_term(reverse(prediction, x_t, t, s, variance), x, x_t, t, s, edges)


def by_item(values: Tensor) -> Tensor:
    """The mean over an item's dimensions, summed one by one."""
    return torch.stack([torch.stack([v for row in item for v in row]).sum() / 4 for item in values])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_weighted_mse_is_the_noise_loss_in_any_frame(name):
    target = targets.build(name)
    y_hat = target.combine(*WRONG[:2], T_LEVEL, S_LEVEL)  # the output of a network that predicts WRONG
    a, b, c = target.frame(T_LEVEL, S_LEVEL)
    expected = W * by_item((EPS - Y_HAT) ** 2)
    torch.testing.assert_close(W * loss.eps_mse(WRONG, EPS), expected, rtol=1e-12, atol=0)
    if name == "previous":  # in expectation over z = ±1, up to the constant w_y c²
        losses = [
            loss.weighted_mse(y_hat, target, X, EPS, W, T_LEVEL, S_LEVEL, z * torch.ones_like(X)) for z in (1, -1)
        ]
        expected = expected + W * (T_LEVEL.alpha / (T_LEVEL.alpha * b - T_LEVEL.sigma * a)) ** 2 * c**2
        assert bool((c > 0).all())
        torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-10, atol=0)
    else:
        s = S_LEVEL if target.needs_next_level else None
        torch.testing.assert_close(
            loss.weighted_mse(y_hat, target, X, EPS, W, T_LEVEL, s), expected, rtol=1e-10, atol=0
        )
        scalar = loss.weighted_mse(y_hat, target, X, EPS, torch.tensor(2.0), T_LEVEL, s)
        torch.testing.assert_close(scalar, 2 * expected / W, rtol=1e-10, atol=0)


def test_simple_loss():
    torch.testing.assert_close(loss.eps_mse(WRONG, EPS), by_item((EPS - Y_HAT) ** 2), rtol=1e-12, atol=0)
    single = Prediction(*(v.float() for v in WRONG[:2]))
    assert loss.eps_mse(single, EPS.float()).dtype == torch.float32
    assert (
        loss.weighted_mse(Y_HAT.float(), targets.build("x"), X.float(), EPS.float(), W, T_LEVEL).dtype == torch.float32
    )


def test_mean_matching_and_the_bound_in_the_notation_of_ho():
    """‖μ̃ − μ‖² = β²/((1−β)(1−ᾱ)) ‖ε − ε̂‖² [Ho20 eq. 8, 10]; divided by 2σ² it is the bound's term [eq. 12]."""
    simple = loss.eps_mse(WRONG, EPS)
    means = loss.mean_matching(WRONG, X, X_T, T_LEVEL, S_LEVEL)
    torch.testing.assert_close(means, BETA**2 / ((1 - BETA) * (1 - BAR)) * simple, rtol=1e-9, atol=0)
    before = torch.cumprod(1 - SCHEDULE.beta, 0)[K.long() - 2]
    small = BETA * (1 - before) / (1 - BAR)
    term = bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL)
    torch.testing.assert_close(term, means / (2 * small), rtol=1e-9, atol=0)
    w = weighting.build("bound")(T_LEVEL, S_LEVEL)
    torch.testing.assert_close(w * loss.eps_mse(WRONG, EPS), term, rtol=1e-9, atol=0)
    large = bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL, "large")
    constant = 0.5 * (torch.log(BETA / small) - 1 + small / BETA)
    torch.testing.assert_close(large, constant + means / (2 * BETA), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("discrete", [False, True])
def test_bound_terms_are_those_of_the_likelihood(variance, discrete):
    levels = time_grid(SCHEDULE, 8)
    edges = (X - 0.1, X + 0.1) if discrete else None
    denoise = DATA.denoiser(SCHEDULE, var_interp=0.7)
    bound = vlb(ReverseChain(denoise, levels, variance), X, lambda n: EPS.expand(n, *X.shape), edges=edges)
    for k in range(1, 9):
        t, s = levels[8 - k], levels[9 - k]
        x_t = diffuse(X, t, EPS)
        term = bound_term(denoise(x_t, t), X, x_t, t, s, variance, edges)
        torch.testing.assert_close(4 * term, bound.per_step[:, k - 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"vlb_weight": 0.25, "edges": (X - 0.1, X + 0.1)}])
def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_noise(settings):
    s = SCHEDULE((K - 1) / 40 * torch.tensor([0.0, 1.0, 1.0]))  # the first item's step ends in data

    def leaves():
        return [v.clone().requires_grad_() for v in WRONG]

    x_hat, eps_hat, var_interp = leaves()
    result = loss.hybrid(Prediction(x_hat, eps_hat, var_interp), EPS, X, X_T, T_LEVEL, s, 40, **settings)
    term = bound_term(WRONG, X, X_T, T_LEVEL, s, "learned", settings.get("edges"))
    weight = settings.get("vlb_weight", 0.001)
    torch.testing.assert_close(result, loss.eps_mse(WRONG, EPS) + weight * 40 * term, rtol=1e-12, atol=0)
    result.sum().backward()
    assert x_hat.grad is None
    torch.testing.assert_close(eps_hat.grad, (eps_hat - EPS).detach() / 2)
    only = leaves()[2]
    term = bound_term(WRONG._replace(var_interp=only), X, X_T, T_LEVEL, s, "learned", settings.get("edges"))
    (weight * 40 * term).sum().backward()
    torch.testing.assert_close(var_interp.grad, only.grad, rtol=1e-12, atol=0)
    assert bool((var_interp.grad != 0).all())


def test_the_hybrid_loss_of_improved_diffusion_is_in_bits():
    """Its vb is one step's KL or decoder in bits per dimension, times T/1000 (`rescale_learned_sigmas`)."""
    term = bound_term(WRONG, X, X_T, T_LEVEL, S_LEVEL, "learned")
    theirs = loss.eps_mse(WRONG, EPS) + term / math.log(2) * 40 / 1000
    ours = loss.hybrid(WRONG, EPS, X, X_T, T_LEVEL, S_LEVEL, 40, vlb_weight=0.001 / math.log(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


# --- a learned variance trained by the bound only, and the full bound as a loss ---------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_the_bound_has_gradients_to_mean_and_variance(discrete):
    """By finite differences; the step of the first item ends in data."""
    s = SCHEDULE((K - 1) / 40 * torch.tensor([0.0, 1.0, 1.0]))
    edges = (X - 0.1, X + 0.1) if discrete else None

    def term(x_hat, var_interp):
        return bound_term(Prediction(x_hat, EPS, var_interp), X, X_T, T_LEVEL, s, "learned", edges)

    near = X + 0.02 * randn(5)
    assert torch.autograd.gradcheck(term, (near.requires_grad_(), torch.full_like(X, 0.3).requires_grad_()))
    var_interp = WRONG.var_interp.clone().requires_grad_()
    for gradient in torch.autograd.grad(term(near, var_interp).sum(), (near, var_interp)):
        assert bool((gradient != 0).all())


@pytest.mark.parametrize("ends", [(1.0, 0.5), (0.5, 0.45), (0.075, 0.05), (0.025, 0.0)])
def test_the_bound_is_least_at_the_variance_of_the_reverse_step(ends):
    """Gaussian data, the exact mean, and the exact average over x and ε: the terms are quadratic in both."""
    t, s = time_grid(SCHEDULE, times=[*sorted({1.0, *ends}, reverse=True)])[-2:]
    s = s._replace(final_log_var=SCHEDULE(0.0).final_log_var) if ends[1] == 0 else s
    std, one = DATA.cov.sqrt()[None], torch.ones(1, 2, 2, dtype=f64)
    x = DATA.m + torch.cat([std, std, -std, -std])
    eps = torch.cat([one, -one, one, -one])
    x_t = diffuse(x, t, eps)
    exact = DATA.predict(x_t, t)

    def average(var_interp):
        return bound_term(exact._replace(var_interp=var_interp.expand(x.shape)), x, x_t, t, s, "learned").mean()

    small, large = log_var_small(t, s), log_var_large(t, s)
    best = (DATA.reverse_log_var(t, s) - small) / (large - small)
    for off in (0.0, -0.1, 0.1):
        var_interp = (best + off)[None].requires_grad_()
        value = average(var_interp)
        (gradient,) = torch.autograd.grad(value, var_interp)
        if off:
            assert bool((gradient.sign() == math.copysign(1, off)).all())
            assert float(value.detach()) > float(average(best[None]))
        else:
            assert float(gradient.abs().max()) < 1e-12
    if ends[1] > 0:  # the large variance is best for data of variance 1, the small one for a point [Ho20 §3.2]
        assert bool((best > 0).all())
        assert torch.equal((best - 1).abs().gt(1e-9) * (best - 1).sign(), (DATA.cov - 1).sign())


@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("schedule", [DS.linear(8), S.LinearLogSNR(6.0, -5.0)])
def test_the_full_bound_is_the_sum_of_its_steps_with_its_gradient(schedule, variance):
    """Value and gradient are those of T times the term of a uniform step, averaged over the steps."""
    levels = time_grid(schedule, 8)
    weights = [torch.tensor(v, dtype=f64, requires_grad=True) for v in (0.7, -0.2, 0.4)]

    def denoise(x_t, level, cond=None, next_level=None):
        conds.append(cond)
        a, b, var_interp = weights
        x, at = a * x_t + b, level.broadcast_like(x_t)
        return Prediction(x, (x_t - at.alpha * x) / at.sigma, var_interp.expand(x_t.shape))

    fresh = [torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(k), dtype=f64) for k in range(9)]
    numbers, conds, cond = iter(fresh), [], Condition()
    chain = ReverseChain(denoise, levels, variance, cond)
    whole = loss.full_bound(chain, X, lambda n: next(numbers)[None])
    assert whole.shape == (3,)
    assert conds == [cond] * 8
    parts = torch.zeros(3, dtype=f64)
    for t, s, eps in zip(levels[::-1][1:], levels[::-1], fresh, strict=False):
        x_t = diffuse(X, t, eps)
        parts = parts + 8 * bound_term(denoise(x_t, t), X, x_t, t, s, variance) / 8
    rest = whole.detach() - parts.detach()  # the prior and, if the chain stays finite, its decoder
    again = iter(fresh)
    bound = vlb(chain, X, lambda n: next(again)[None])
    ends = bound.prior if levels[-1].sigma == 0 else bound.prior + bound.decoder
    torch.testing.assert_close(rest, ends.detach() / 4, rtol=1e-10, atol=1e-12)
    used = weights[: 3 if variance == "learned" else 2]
    for one, other in zip(*(torch.autograd.grad(v.sum(), used) for v in (whole, parts)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
        assert float(one) != 0
    given = {"edges": (X - 0.1, X + 0.1), "decode": lambda x, z, level: x * z}
    given["decode"].calls = 1
    binned, total = (f(chain, X, lambda n: EPS[None], **given) for f in (loss.full_bound, vlb))
    torch.testing.assert_close(binned, total.total / 4)


def test_the_exact_denoiser_has_the_least_possible_loss():
    """E‖ε − E[ε|x_t]‖² in closed form: the error is linear in the independent (x, ε) of each dimension."""
    for level in (S.Flow()(0.3), S.LinearLogSNR()(0.5), S.VarianceExploding()(0.6)):
        std, one = DATA.cov.sqrt()[None], torch.ones(1, 2, 2, dtype=f64)
        total, worse = torch.zeros(1, dtype=f64), torch.zeros(1, dtype=f64)
        for x, eps in ((DATA.m + std, 0 * one), (DATA.m + 0 * std, one)):
            exact = DATA.predict(diffuse(x, level, eps), level)
            total += loss.eps_mse(exact, eps)
        for sign in (1, -1):
            for x, eps in ((DATA.m + sign * std, 0 * one), (DATA.m + 0 * std, sign * one)):
                off = DATA.predict(diffuse(x, level, eps), level)
                worse += loss.eps_mse(off._replace(eps=1.01 * off.eps), eps) / 2
        torch.testing.assert_close(total, DATA.loss_minimum(level)[None], rtol=1e-12, atol=0)
        assert float(worse) > float(total) * (1 + 1e-6)
        x, eps = DATA.m + std, 0 * one
        in_v = targets.build("v")
        exact = DATA.predict(diffuse(x, level, eps), level)
        y_hat = in_v.combine(*exact[:2], level)
        both = loss.weighted_mse(y_hat, in_v, x, eps, torch.tensor(1.0), level), loss.eps_mse(exact, eps)
        torch.testing.assert_close(*both, rtol=1e-9, atol=0)

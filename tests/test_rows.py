"""The formulas of introductory texts: each row of the table compares a function with an independent computation.

The independent one is in the notation of Ho et al. 2020 (beta, bar), an integral or a matrix, without the package.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData
from scipy import integrate, stats
from test_docs import resolve

from undiffuse.data.transform import Identity
from undiffuse.denoising.denoiser import Prediction
from undiffuse.denoising.score_matching import (
    conditional_score,
    denoising,
    explicit,
    noise_form,
    score_from_prediction,
    stein,
    tweedie,
)
from undiffuse.likelihood.joint_log_prob import forward_log_prob, reverse_log_prob
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.likelihood.vlb_continuous import vlb_continuous
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.losses import eps_mse, full_bound, hybrid, mean_matching
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.discrete_schedule import linear
from undiffuse.process.gaussian import (
    Gaussian,
    diffuse,
    forward,
    forward_marginal,
    posterior,
    reverse,
    step_log_var,
)
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import prior_kl
from undiffuse.process.target import TARGETS
from undiffuse.process.weighting import bound
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.langevin import AnnealedLangevin
from undiffuse.sampling.solvers.one_step_inversion import OneStepInversion
from undiffuse.sampling.solvers.product import Product, observation_factor
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import Step, forward_trajectory, trajectory

DOCS = Path(__file__).parent.parent / "docs"
BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])  # BAR[t]
SMALL = np.concatenate([[np.nan, np.nan], BETA[1:] * (1 - BAR[1:-1]) / (1 - BAR[2:])])  # SMALL[t], t ≥ 2
CHAIN = time_grid(DS.linear())[::-1]  # CHAIN[t]
T, X, EPS = 700, 0.7, -1.3
X_T = math.sqrt(BAR[T]) * X + math.sqrt(1 - BAR[T]) * EPS
ONE = torch.ones(1, 1, dtype=torch.float64)
LINE = np.linspace(-12, 12, 40_001)
NOISES = np.random.default_rng(0).normal(size=1000)
DATA = GaussianData(torch.zeros(1, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64))
MIXTURE = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.04], [0.25]]))


class Row(NamedTuple):
    topic: str
    function: str  # below undiffuse
    call: Callable[[], Any]
    oracle: Callable[[], Any]
    tolerance: float = 1e-9


def fed(numbers: np.ndarray) -> Callable[[int], torch.Tensor]:
    """A noise function that returns one of ``numbers`` per step."""
    fresh = iter(numbers)
    return lambda n: next(fresh) * ONE[None]


def prediction(eps: float, x_t: float = X_T, t: int = T, var_interp: float | None = None) -> Prediction:
    x = (x_t - math.sqrt(1 - BAR[t]) * eps) / math.sqrt(BAR[t])
    return Prediction(x * ONE, eps * ONE, None if var_interp is None else var_interp * ONE)


def moments(density: np.ndarray) -> list[float]:
    """Mean and variance of the density proportional to ``density`` on LINE."""
    weights = density / density.sum()
    mean = float(weights @ LINE)
    return [mean, float(weights @ (LINE - mean) ** 2)]


def exact_slope(t: int, v: float = 0.25) -> float:
    """ε̂/x_t of data of N(0, v)."""
    return math.sqrt(1 - BAR[t]) / (BAR[t] * v + 1 - BAR[t])


def mean_of(x_t: float, eps: float, t: int) -> float:
    """[Ho20 eq. 11]."""
    return (x_t - BETA[t - 1] / math.sqrt(1 - BAR[t]) * eps) / math.sqrt(1 - BETA[t - 1])


# --- forward ---------------------------------------------------------------------------------------------------------


def f1():
    step = forward(X * ONE, CHAIN[T - 1], CHAIN[T])
    return [step.mean, step.log_var.exp()]


def f2():
    return [step.x for step in forward_trajectory(X * ONE, CHAIN[::-1], fed(NOISES))]


def f2_oracle():
    states = [X]
    for b, z in zip(BETA, NOISES, strict=True):
        states.append(math.sqrt(1 - b) * states[-1] + math.sqrt(b) * z)
    return states


def f3_oracle():
    with mpmath.workdps(40):
        bar, states = mpmath.mpf(1), []
        for b in BETA:
            bar *= 1 - mpmath.mpf(b)
            states.append(float(mpmath.sqrt(bar) * X + mpmath.sqrt(1 - bar) * EPS))
    return states


def f5_oracle():
    q, p = stats.norm(math.sqrt(BAR[-1]) * X, math.sqrt(1 - BAR[-1])), stats.norm()
    nats, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -12, 12, epsabs=1e-14)
    return nats / math.log(2)


NORMAL = np.array([0.4, -1.1, 0.6, 1.2, -0.3, 0.2])


def six_levels() -> list[NoiseLevel]:
    return time_grid(DS.Tabulated(SIX))


def six_states(numbers: np.ndarray = NORMAL) -> list[Step]:
    """A trajectory of six steps from X with these ``numbers``, of the chain SIX."""
    return list(forward_trajectory(X * ONE, six_levels(), fed(numbers)))


def f6():
    """Sampled, scored and compared."""
    q = forward_marginal(X * ONE, CHAIN[T])
    return [q.sample(EPS * ONE), q.log_prob(0.3 * ONE), q.kl(forward_marginal(-X * ONE, CHAIN[300]))]


def f6_oracle():
    q, p = (stats.norm(m * math.sqrt(BAR[t]) * X, math.sqrt(1 - BAR[t])) for m, t in ((1, T), (-1, 300)))
    kl, _ = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -12, 12, epsabs=1e-13)
    return [X_T, q.logpdf(0.3), kl]


def f7():
    return forward_log_prob(six_states())


def f7_oracle():
    """The joint Gaussian of the six states given X, by its covariance √(ᾱ_t/ᾱ_s) (1 − ᾱ_s), s ≤ t."""
    bar = np.cumprod(1 - SIX)
    low, high = np.maximum.outer(bar, bar), np.minimum.outer(bar, bar)
    states = [float(step.x) for step in six_states()[1:]]
    return stats.multivariate_normal(np.sqrt(bar) * X, np.sqrt(high / low) * (1 - low)).logpdf(states)


X_S = 0.2  # a state at T − 1


def f8():
    """The logarithm of q(x_t given x_{t−1}, x_0) = q(x_{t−1} given x_t, x_0) q(x_t given x_0)/q(x_{t−1} given x_0)."""
    at_t, at_s = (forward_marginal(X * ONE, CHAIN[t]) for t in (T, T - 1))
    back = posterior(X_T * ONE, X * ONE, CHAIN[T], CHAIN[T - 1])
    return back.log_prob(X_S * ONE) + at_t.log_prob(X_T * ONE) - at_s.log_prob(X_S * ONE)


def f8_oracle():
    return stats.norm.logpdf(X_T, math.sqrt(1 - BETA[T - 1]) * X_S, math.sqrt(BETA[T - 1]))


# --- reverse ---------------------------------------------------------------------------------------------------------


def r1():
    start = 0.4 * ONE
    return [step.x for step in trajectory(DATA.denoiser(DS.linear()), Ancestral(), CHAIN[::-1], start, fed(NOISES))]


def r1_oracle():
    states = [0.4]
    for t, z in zip(range(1000, 0, -1), NOISES, strict=True):
        fresh = math.sqrt(SMALL[t]) * z if t > 1 else 0.0
        states.append(mean_of(states[-1], exact_slope(t) * states[-1], t) + fresh)
    return states


def r2():
    models = [
        reverse(prediction(0.2, X_T, t, var_interp=0.3), X_T * ONE, CHAIN[t], CHAIN[t - 1], "learned") for t in (2, T)
    ]
    return [value for model in models for value in (model.mean, model.log_var.exp())]


def r2_oracle():
    return [v for t in (2, T) for v in (mean_of(X_T, 0.2, t), BETA[t - 1] ** 0.3 * SMALL[t] ** 0.7)]


def r3():
    gaussian = posterior(X_T * ONE, X * ONE, CHAIN[T], CHAIN[T - 1])
    return [gaussian.mean, gaussian.log_var.exp()]


def r3_oracle():
    step = stats.norm.pdf(X_T, math.sqrt(1 - BETA[T - 1]) * LINE, math.sqrt(BETA[T - 1]))
    return moments(step * stats.norm.pdf(LINE, math.sqrt(BAR[T - 1]) * X, math.sqrt(1 - BAR[T - 1])))


def r3_bayes():
    """The logarithm of q(x_{t−1} given x_t, x_0) = q(x_t given x_{t−1}, x_0) q(x_{t−1} given x_0)/q(x_t given x_0)."""
    at_t, at_s = (forward_marginal(X * ONE, CHAIN[t]) for t in (T, T - 1))
    step = forward(X_S * ONE, CHAIN[T - 1], CHAIN[T])
    return step.log_prob(X_T * ONE) + at_s.log_prob(X_S * ONE) - at_t.log_prob(X_T * ONE)


def r3_bayes_oracle():
    """Ho et al.'s equation 7."""
    b, bar, before = BETA[T - 1], BAR[T], BAR[T - 1]
    mean = (math.sqrt(1 - b) * (1 - before) * X_T + math.sqrt(before) * b * X) / (1 - bar)
    return stats.norm.logpdf(X_S, mean, math.sqrt(b * (1 - before) / (1 - bar)))


def r5():
    pairs = [(CHAIN[t], CHAIN[t - 1]) for t in range(2, 1001)]
    return [step_log_var(ONE, t, s, kind).exp() for kind in ("large", "small") for t, s in pairs]


def r6():
    def step(t: int, variance: str) -> torch.Tensor:
        t_, s_ = CHAIN[t], CHAIN[t - 1]
        return Ancestral(variance).step(lambda *_, **__: prediction(0.2, X_T, t), X_T * ONE, t_, s_, (), ONE[None])[0]

    return [step(t, variance) for t in (T, 1) for variance in ("small", "large")]


def r6_oracle():
    with_noise = [mean_of(X_T, 0.2, T) + math.sqrt(v) for v in (SMALL[T], BETA[T - 1])]
    return [*with_noise, *[mean_of(X_T, 0.2, 1)] * 2]


def r7():
    ends = []
    for form in ("scaled", "printed"):
        *_, last = trajectory(DATA.denoiser(DS.linear()), OneStepInversion(form), CHAIN[::-1], ONE, lambda n: ONE[:n])
        ends.append(last.x)
    return ends


def r7_oracle():
    """The mean of x_0 given x_T, and the product of the printed slopes."""
    printed = 1.0
    for t in range(1000, 0, -1):
        printed *= (1 - math.sqrt(BETA[t - 1]) * exact_slope(t)) / math.sqrt(1 - BETA[t - 1])
    return [math.sqrt(BAR[-1]) * 0.25 / (BAR[-1] * 0.25 + 1 - BAR[-1]), printed]


def r8():
    """Of a kept trajectory of the sampler's chain, p(x_T) Π p(x_{t−1} given x_t)."""
    return reverse_log_prob(six_steps(), six_states())


def r8_oracle():
    """Step by step in the notation of Ho et al., with ε̂ = 0.6 x_t − 0.2 and the variance β."""
    states, bar = [float(step.x) for step in six_states()], np.cumprod(1 - SIX)
    total = stats.norm.logpdf(states[-1])
    for t, b in enumerate(SIX, start=1):
        eps = 0.6 * states[t] - 0.2
        mean = (states[t] - b / math.sqrt(1 - bar[t - 1]) * eps) / math.sqrt(1 - b)
        total += stats.norm.logpdf(states[t - 1], mean, math.sqrt(b))
    return total


# --- training --------------------------------------------------------------------------------------------------------
SIX = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5])


class Affine:
    """ε̂ = 0.6 x_t − 0.2."""

    schedule = S.Flow()

    def __call__(self, x_t, level, cond=None, next_level=None):
        eps = 0.6 * x_t - 0.2
        return Prediction((x_t - level.broadcast_like(x_t).sigma * eps) / level.broadcast_like(x_t).alpha, eps)


def six_steps() -> ReverseChain:
    return ReverseChain(Affine(), time_grid(DS.Tabulated(SIX)), "large")


def t1():
    """The total with the exact expectation of each step, which is quadratic in the step's number."""
    x, noise = torch.full((2, 1), X, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return vlb(six_steps(), x, lambda n: noise[None]).total.mean()


def n1_training():
    """The same as a loss, for items of one dimension."""
    x, noise = torch.full((2, 1), X, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return full_bound(six_steps(), x, lambda n: noise[None]).mean()


def t1_oracle():
    """E log q(x_1 … x_T given x_0)/p(x_0 … x_T) of the two joint Gaussians, by their matrices."""
    n, bar = len(SIX), np.cumprod(1 - SIX)
    maps, offset = np.zeros((n, n)), np.zeros(n)  # x_{1:T} = offset + maps z under q
    row, mean = np.zeros(n), X
    for t, b in enumerate(SIX):
        row, mean = math.sqrt(1 - b) * row, math.sqrt(1 - b) * mean
        row[t] = math.sqrt(b)
        maps[t], offset[t] = row, mean

    def expected(on: np.ndarray, constant: float, variance: float) -> float:
        """E log N(constant + on · x_{1:T}; 0, variance) under q."""
        square = (constant + on @ offset) ** 2 + np.sum((on @ maps) ** 2)
        return -0.5 * (math.log(2 * math.pi * variance) + square / variance)

    log_q = -0.5 * (n * math.log(2 * math.pi * math.e) + np.linalg.slogdet(maps @ maps.T)[1])
    log_p = expected(np.eye(n)[-1], 0.0, 1.0)
    for t, b in enumerate(SIX):  # from x_{t+1}, the state of index t
        slope = (1 - 0.6 * b / math.sqrt(1 - bar[t])) / math.sqrt(1 - b)
        shift = 0.2 * b / math.sqrt(1 - bar[t]) / math.sqrt(1 - b)
        on = -slope * np.eye(n)[t] + (np.eye(n)[t - 1] if t else 0)
        log_p += expected(on, (0 if t else X) - shift, b)
    return log_q - log_p


def t9():
    """log q(x_{1:T} given x_0) − log p(x_{0:T}), the bound before Bayes' rule, in its exact expectation.

    It is quadratic in the six numbers of the forward chain, so the mean over ± √6 times each of them is exact.
    """
    values = []
    for point in math.sqrt(6) * np.concatenate([np.eye(6), -np.eye(6)]):
        states = six_states(point)
        values.append(forward_log_prob(states) - reverse_log_prob(six_steps(), states))
    return torch.stack(values).mean()


def t2():
    v = torch.tensor(math.log(0.5))
    return Gaussian(0 * ONE, v).kl(Gaussian(0.3 * ONE, v))


def t2_oracle():
    p, q = stats.norm(0, math.sqrt(0.5)), stats.norm(0.3, math.sqrt(0.5))
    return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10)[0]


def t3():
    return [bound(CHAIN[t], CHAIN[t - 1], kind) for kind in ("small", "large") for t in (2, T, 1000)]


def t3_oracle():
    return [
        (mean_of(X_T, 1.0, t) - mean_of(X_T, 0.0, t)) ** 2 / (2 * v[t])
        for v in (SMALL, np.concatenate([[0], BETA]))
        for t in (2, T, 1000)
    ]


def t4():
    signs = torch.tensor(list(product([0.5, -0.5], [1.0, -1.0])), dtype=torch.float64)
    x, eps = signs[:, :1], signs[:, 1:]
    denoise = DATA.denoiser(DS.linear())
    return [eps_mse(denoise(diffuse(x, level, eps), level), eps).mean() for level in CHAIN[1:]]


def t6():
    """x_{t−1} from x, the noise of x_t and the rest of x_{t−1}, which is independent of the two."""
    x_s = -0.4
    x_t = math.sqrt(1 - BETA[T - 1]) * x_s + math.sqrt(BETA[T - 1]) * 0.9
    eps = (x_t - math.sqrt(BAR[T]) * X) / math.sqrt(1 - BAR[T])
    z = (x_s - mean_of(x_t, eps, T)) / math.sqrt(SMALL[T])
    return TARGETS["previous"].combine(X * ONE, eps * ONE, CHAIN[T], CHAIN[T - 1], z * ONE)


def t7():
    """The gradients of the loss by the network's variance and by its noise."""
    var_interp, eps_hat = (torch.full((1, 1), v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.2))
    x_t, t, s = X_T * ONE, CHAIN[T], CHAIN[T - 1]
    x_hat = (x_t - t.sigma * eps_hat) / t.alpha
    hybrid(Prediction(x_hat, eps_hat, var_interp), EPS * ONE, X * ONE, x_t, t, s, 1000).sum().backward()
    return [var_interp.grad, eps_hat.grad]


def t7_oracle():
    large, small = BETA[T - 1], SMALL[T]
    gap = mean_of(X_T, EPS, T) - mean_of(X_T, 0.2, T)

    def term(nu):
        variance = mpmath.mpf(large) ** nu * mpmath.mpf(small) ** (1 - nu)
        return 0.001 * 1000 * (mpmath.log(variance / small) + (small + gap**2) / variance - 1) / 2

    return [mpmath.diff(term, 0.3), 2 * (0.2 - EPS)]


class Line(torch.nn.Module):
    """ε̂ = weight x_t + 0.001 k."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x_t, time, cond=None):
        return self.weight * x_t + 0.001 * time[:, None]


U = (np.array([0, 1, 499, 999]) + 0.5) / 1000
ITEMS = np.array([[0.1, -0.4], [2.0, 0.3], [-1.0, 0.6], [0.5, 0.5]])
FRESH = NOISES[:8].reshape(4, 2)


def t8():
    """Algorithm 1: its loss at these times and noises, and the gradient of its step."""
    torch.manual_seed(0)
    config = ModelConfig(
        network={"kind": "mlp", "width": 8, "depth": 1},
        schedule={"name": "linear"},
        target={"name": "eps"},
        weight={"name": "simple"},
        times={"name": "steps"},
        preconditioning={"scale": "none", "time": "step"},
    )
    network, model = Line(), Diffusion(config, (2,), Identity())
    values, u, eps = (torch.from_numpy(v) for v in (ITEMS, U, FRESH))
    loss = model.loss(values, u, eps, network=network)
    loss.mean().backward()
    return [*loss.detach(), network.weight.grad]


def t8_oracle():
    t = np.array([1, 2, 500, 1000])[:, None]
    x_t = np.sqrt(BAR[t]) * ITEMS + np.sqrt(1 - BAR[t]) * FRESH
    off = 0.3 * x_t + 0.001 * (t - 1) - FRESH
    return [*(off**2).mean(1), (2 * off * x_t).mean()]


# --- scores ----------------------------------------------------------------------------------------------------------


def log_density(x_t, t: int = T):
    """log q(x_t) of MIXTURE, in mpmath."""
    parts = ((0.3, -1.0, 0.04), (0.7, 1.0, 0.25))
    terms = [(w, math.sqrt(BAR[t]) * m, BAR[t] * v + 1 - BAR[t]) for w, m, v in parts]
    return mpmath.log(
        sum(w * mpmath.exp(-((x_t - m) ** 2) / (2 * v)) / mpmath.sqrt(2 * mpmath.pi * v) for w, m, v in terms)
    )


def s3():
    """The difference of the two losses for two scores, over x and ε by quadrature: the same number."""
    nodes, share = np.polynomial.hermite_e.hermegauss(60)
    share = torch.from_numpy(np.outer(share, share).ravel() / (2 * np.pi))
    z, eps = (torch.from_numpy(v.reshape(-1, 1)) for v in np.meshgrid(nodes, nodes))
    level, gaps = CHAIN[T], []
    for score in (lambda x: -x, torch.sin):
        gap = 0.0
        for w, m, v in ((0.3, -1.0, 0.04), (0.7, 1.0, 0.25)):
            x = m + math.sqrt(v) * z
            x_t = diffuse(x, level, eps)
            gap += w * share @ (denoising(score, x, eps, level) - explicit(score, x_t, MIXTURE.score(x_t, level)))
        gaps.append(gap)
    return gaps


def s3_oracle():
    """½ (1/σ² − ∫ (q′)²/q): half of the conditional Fisher information less the marginal one."""

    def fisher(x):
        return float(mpmath.diff(log_density, x) ** 2 * mpmath.exp(log_density(x)))

    information, _ = integrate.quad(fisher, -9, 9, epsabs=1e-12)
    return [0.5 * (1 / (1 - BAR[T]) - information)] * 2


def langevin_variance(solver: AnnealedLangevin, t: NoiseLevel, s: NoiseLevel, v: float) -> float:
    """The variance of x_s for x_t of variance ``v`` and data of N(0, 1/4), from the slopes on x_t and on each noise."""
    start = torch.zeros(solver.noises_per_step + 1, 1, dtype=torch.float64)
    start[0] = 1
    fresh = torch.cat([torch.zeros(solver.noises_per_step, 1), torch.eye(solver.noises_per_step)], 1).double()[
        ..., None
    ]
    x, _ = solver.step(DATA.denoiser(DS.linear()), start, t, s, (), fresh)
    return float(v * x[0] ** 2 + (x[1:] ** 2).sum())


def s4():
    return langevin_variance(AnnealedLangevin(0.3, 80), CHAIN[901], CHAIN[900], 5.0)


def s4_oracle():
    """x ← x + g s + √(2g) z on N(0, V) has the stationary variance V/(1 − g/(2V)), reached after 80 updates."""
    V, g = BAR[900] * 0.25 + 1 - BAR[900], 0.3 * (1 - BAR[900])
    return V / (1 - g / (2 * V))


def s5_oracle():
    log_q = lambda x: -((x - math.sqrt(BAR[T]) * X) ** 2) / (2 * (1 - BAR[T]))  # noqa: E731
    return (mpmath.diff(log_q, X_T) + 0.2 / math.sqrt(1 - BAR[T])) ** 2 / 2


def s6_oracle():
    prior = sum(w * stats.norm.pdf(LINE, m, math.sqrt(v)) for w, m, v in ((0.3, -1, 0.04), (0.7, 1, 0.25)))
    return moments(prior * stats.norm.pdf(X_T, math.sqrt(BAR[T]) * LINE, math.sqrt(1 - BAR[T])))[0]


def s6():
    score = torch.full((1, 1), float(mpmath.diff(log_density, X_T)), dtype=torch.float64)
    return tweedie(X_T * ONE, score, CHAIN[T])


def v1():
    levels = time_grid(DS.Tabulated(SIX))
    top = levels[0]
    prior = Gaussian(0 * ONE[0], torch.log(DATA.marginal_var(top)))
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    chain = ReverseChain(DATA.denoiser(S.Flow()), levels, DATA.reverse_log_var)
    result = vlb(chain, X * signs.abs(), lambda n: signs[None], prior=prior)
    return result.bits_per_dim(1).mean()


def v2():
    """The bound between two log-SNRs for three schedules, the integral by the midpoint rule with 300 intervals."""
    signs, totals = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), []
    for schedule in (S.LinearLogSNR(8.0, -5.0), S.Sigmoid(), DS.cosine(100)):
        top, clean = (schedule(schedule.inverse(log_snr)) for log_snr in (-5.0, 8.0))
        half = torch.full((2,), 0.5, dtype=torch.float64)
        result = vlb_continuous(
            DATA.denoiser(schedule), X * signs.abs(), top, clean, lambda n: signs[None], half, points=300
        )
        totals.append(result.total.mean())
    return totals


def v2_oracle():
    """With the exact denoiser the integral is KL(q(z given x) to q(z)) at the clean end less that at the noisy end."""

    def kl(log_snr: float, variance: float | None = None) -> float:
        bar = 1 / (1 + math.exp(-log_snr))
        V = bar * 0.25 + 1 - bar if variance is None else variance
        return 0.5 * (math.log(V / (1 - bar)) - 1 + (1 - bar + bar * X**2) / V)

    decoder = 0.5 * (math.log(2 * math.pi) + 1 - 8.0)  # of N(z_0/α_0, exp(−log_snr))
    return [kl(8.0) - kl(-5.0) + kl(-5.0, 1.0) + decoder] * 3


# --- systems ---------------------------------------------------------------------------------------------------------


def n1():
    """Mean and variance of a reverse step times the factor of an observation."""
    factor = observation_factor(
        torch.full((1, 1), 0.9, dtype=torch.float64), torch.tensor(math.log(0.2), dtype=torch.float64)
    )
    step = [
        Product(factor, "large").step(
            lambda *_, **__: prediction(0.2), X_T * ONE, CHAIN[T], CHAIN[T - 1], (), z * ONE[None]
        )[0]
        for z in (0.0, 1.0)
    ]
    return [step[0], (step[1] - step[0]) ** 2]


def n1_oracle():
    observed = stats.norm.pdf(LINE, math.sqrt(BAR[T - 1]) * 0.9, math.sqrt(BAR[T - 1] * 0.2 + 1 - BAR[T - 1]))
    return moments(observed * stats.norm.pdf(LINE, mean_of(X_T, 0.2, T), math.sqrt(BETA[T - 1])))


def n4():
    """The slope fitted by denoising score matching, and the variance of annealed Langevin samples."""
    signs = torch.tensor(list(product([0.5, -0.5], [1.0, -1.0])), dtype=torch.float64)
    x, eps = signs[:, :1], signs[:, 1:]
    down, flat, up = (float(denoising(lambda x_t: w * x_t, x, eps, CHAIN[T]).mean()) for w in (-1, 0, 1))  # noqa: B023
    v, levels = 1.0, CHAIN[::-20]
    for t, s in pairwise(levels):
        v = langevin_variance(AnnealedLangevin(0.1, 5), t, s, v)
    return [(down - up) / (2 * (down - 2 * flat + up)), v]


def n4_oracle():
    def V(t):
        return BAR[t] * 0.25 + 1 - BAR[t]

    v, times = 1.0, list(range(1000, -1, -20))
    for t, s in pairwise(times):
        at, to_data = (s, False) if s else (t, True)
        v *= BAR[at] / BAR[t]
        g = 0.1 * (1 - BAR[at])
        for _ in range(4 if to_data else 5):
            v = (1 - g / V(at)) ** 2 * v + 2 * g
        if to_data:
            v *= (math.sqrt(BAR[at]) * 0.25 / V(at)) ** 2
    return [-1 / V(T), v]


ROWS = {
    "F1": Row("one step", "process.gaussian.forward", f1,
              lambda: [math.sqrt(1 - BETA[T - 1]) * X, BETA[T - 1]]),
    "F2": Row("the whole chain", "sampling.trajectory.forward_trajectory", f2, f2_oracle),
    "F3": Row("the jump to t", "process.gaussian.diffuse",
              lambda: [diffuse(X * ONE, level, EPS * ONE) for level in CHAIN[1:]], f3_oracle, 1e-12),
    "F4": Row("the schedule", "process.discrete_schedule.linear",
              lambda: linear().beta, lambda: [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)], 1e-14),
    "F5": Row("the last level is close to the prior, bits", "process.prior.prior_kl",
              lambda: prior_kl(X * ONE, CHAIN[1000]) / math.log(2), f5_oracle, 1e-10),
    "F6": Row("q(x_t given x_0) as a distribution", "process.gaussian.forward_marginal", f6, f6_oracle),
    "F7": Row("log q of a kept trajectory", "likelihood.joint_log_prob.forward_log_prob", f7, f7_oracle),
    "F8": Row("Bayes' rule of a forward step", "process.gaussian.posterior", f8, f8_oracle),
    "R1": Row("the reverse chain as a trajectory", "sampling.trajectory.trajectory", r1, r1_oracle),
    "R2": Row("mean and variance from the network", "process.gaussian.reverse", r2, r2_oracle),
    "R3": Row("the posterior", "process.gaussian.posterior", r3, r3_oracle),
    "R3, Bayes": Row("Bayes' rule of the posterior", "process.gaussian.forward", r3_bayes, r3_bayes_oracle),
    "R4": Row("its mean from the noise", "process.gaussian.reverse",
              lambda: reverse(prediction(EPS), X_T * ONE, CHAIN[T], CHAIN[T - 1]).mean, lambda: r3_oracle()[0]),
    "R5": Row("fixed variances", "process.gaussian.step_log_var", r5, lambda: [*BETA[1:], *SMALL[2:]]),
    "R6": Row("ancestral sampling", "sampling.solvers.ancestral.Ancestral", r6, r6_oracle),
    "R7": Row("one-step inversion", "sampling.solvers.one_step_inversion.OneStepInversion", r7, r7_oracle),
    "R8": Row("log p of a kept trajectory", "likelihood.joint_log_prob.reverse_log_prob", r8, r8_oracle),
    "T1": Row("the bound", "likelihood.vlb.vlb", t1, t1_oracle),
    "T2": Row("KL of equal variances", "process.gaussian.Gaussian.kl", t2, t2_oracle),
    "T3": Row("weighted noise loss", "process.weighting.bound", t3, t3_oracle),
    "T4": Row("L_simple", "model.losses.eps_mse", t4, lambda: BAR[1:] * 0.25 / (BAR[1:] * 0.25 + 1 - BAR[1:])),
    "T5": Row("mean matching", "model.losses.mean_matching",
              lambda: mean_matching(prediction(0.2), X * ONE, X_T * ONE, CHAIN[T], CHAIN[T - 1]),
              lambda: (r3_oracle()[0] - mean_of(X_T, 0.2, T)) ** 2),
    "T6": Row("predicting x_{t-1}", "process.target.TARGETS", t6, lambda: -0.4),
    "T7": Row("the variance trained by the bound", "model.losses.hybrid", t7, t7_oracle),
    "T8": Row("algorithm 1", "Diffusion.loss", t8, t8_oracle, 1e-6),
    "T9": Row("the bound before Bayes' rule", "likelihood.joint_log_prob.reverse_log_prob", t9, t1_oracle),
    "S1": Row("conditional score", "denoising.score_matching.conditional_score",
              lambda: conditional_score(EPS * ONE, CHAIN[T]),
              lambda: -(X_T - math.sqrt(BAR[T]) * X) / (1 - BAR[T])),
    "S2": Row("the network as score", "denoising.score_matching.score_from_prediction",
              lambda: score_from_prediction(MIXTURE.predict(X_T * ONE, CHAIN[T]), CHAIN[T]),
              lambda: mpmath.diff(log_density, X_T)),
    "S3": Row("denoising and explicit matching", "denoising.score_matching.denoising", s3, s3_oracle),
    "S4": Row("Langevin dynamics", "sampling.solvers.langevin.AnnealedLangevin", s4, s4_oracle),
    "S5": Row("the score's loss in noise form", "denoising.score_matching.noise_form",
              lambda: noise_form(prediction(0.2), EPS * ONE, CHAIN[T]), s5_oracle),
    "S6": Row("Tweedie", "denoising.score_matching.tweedie", s6, s6_oracle),
    "S7": Row("Stein, both sides for sin", "denoising.score_matching.stein", lambda: stein(torch.sin, 0.4, 1.5),
              lambda: [1.5**2 * math.exp(-(1.5**2) / 2) * math.cos(0.4)] * 2),
    "V1": Row("bits per dimension", "likelihood.nll.NLL.bits_per_dim", v1,
              lambda: -stats.norm.logpdf(X, 0, 0.5) / math.log(2)),
    "V2": Row("the bound in continuous time", "likelihood.vlb_continuous.vlb_continuous", v2, v2_oracle, 2e-6),
    "N1": Row("inpainting by multiplying distributions", "sampling.solvers.product.Product", n1, n1_oracle),
    "N1, training": Row("the full bound as a loss", "model.losses.full_bound", n1_training, t1_oracle),
    "N4": Row("denoising matching, then Langevin", "sampling.solvers.langevin.AnnealedLangevin", n4, n4_oracle),
}  # fmt: skip


def numbers(values: Any) -> np.ndarray:
    """The values of a number, a tensor or a list of either as one array."""
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.flatten().tolist()
    return np.array([float(v) for v in values] if isinstance(values, list | tuple) else [float(values)])


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    row = ROWS[name]
    result, expected = numbers(row.call()), numbers(row.oracle())
    assert result.shape == expected.shape
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(result, expected, rtol=row.tolerance, atol=row.tolerance)


def test_every_row_exists_and_is_documented() -> None:
    counts = {"F": 8, "R": 8, "T": 9, "S": 7, "V": 2}
    ids = {f"{letter}{n}" for letter, count in counts.items() for n in range(1, count + 1)}
    assert set(ROWS) == ids | {"R3, Bayes", "N1", "N1, training", "N4"}
    pages = "".join((DOCS / page).read_text() for page in ("maths.md", "errata.md"))
    for name, row in ROWS.items():
        resolve(f"undiffuse.{row.function}")
        assert f"`undiffuse.{row.function}`" in pages, f"{name}: {row.function}"
        source = inspect.getsource(row.call)
        assert row.function.rpartition(".")[2] in source, f"{name} does not call {row.function}"

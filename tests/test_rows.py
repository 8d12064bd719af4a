"""The table of what the texts describe, as code: each row calls a function and computes the same another way.

The other way is in the letters of Ho et al. 2020 (beta, bar), an integral or a matrix, and uses nothing of the package.
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

from undiffuse.codec import Identity
from undiffuse.config import ModelConfig
from undiffuse.denoiser import Prediction
from undiffuse.diffusion import Diffusion
from undiffuse.grids import grid
from undiffuse.likelihood import prior_kl, vlb, vlb_continuous
from undiffuse.loss import full_bound, hybrid, mean_matching, simple
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian, diffuse, forward, posterior, reverse, step_log_var
from undiffuse.process.level import NoiseLevel
from undiffuse.process.table import linear
from undiffuse.process.target import TARGETS
from undiffuse.process.weighting import bound
from undiffuse.sample import forward_trajectory, trajectory
from undiffuse.score import conditional, denoising, explicit, noise_form, predicted, stein, tweedie
from undiffuse.solvers import Ancestral
from undiffuse.solvers.inversion import Inversion
from undiffuse.solvers.langevin import AnnealedLangevin
from undiffuse.solvers.product import Product, observed

DOCS = Path(__file__).parent.parent / "docs"
BETA = np.linspace(1e-4, 0.02, 1000)
BAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])  # BAR[t]
SMALL = np.concatenate([[np.nan, np.nan], BETA[1:] * (1 - BAR[1:-1]) / (1 - BAR[2:])])  # SMALL[t], t ≥ 2
CHAIN = grid(S.linear())[::-1]  # CHAIN[t]
T, X, EPS = 700, 0.7, -1.3
X_T = math.sqrt(BAR[T]) * X + math.sqrt(1 - BAR[T]) * EPS
ONE = torch.ones(1, 1, dtype=torch.float64)
LINE = np.linspace(-12, 12, 40_001)
NOISES = np.random.default_rng(0).normal(size=1000)
DATA = GaussianData(torch.zeros(1, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64))
MIXTURE = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.04], [0.25]]))


class Row(NamedTuple):
    what: str
    function: str
    call: Callable[[], Any]
    oracle: Callable[[], Any]
    tolerance: float = 1e-9


def fed(numbers: np.ndarray) -> Callable[[int], torch.Tensor]:
    """Noise that gives one of ``numbers`` a step."""
    fresh = iter(numbers)
    return lambda n: next(fresh) * ONE[None]


def said(eps: float, x_t: float = X_T, t: int = T, nu: float | None = None) -> Prediction:
    x = (x_t - math.sqrt(1 - BAR[t]) * eps) / math.sqrt(BAR[t])
    return Prediction(x * ONE, eps * ONE, None if nu is None else nu * ONE)


def moments(density: np.ndarray) -> list[float]:
    """Mean and variance of what is proportional to ``density`` on LINE."""
    share = density / density.sum()
    mean = float(share @ LINE)
    return [mean, float(share @ (LINE - mean) ** 2)]


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


# --- reverse ---------------------------------------------------------------------------------------------------------


def r1():
    start = 0.4 * ONE
    return [step.x for step in trajectory(DATA.denoiser(S.linear()), Ancestral(), CHAIN[::-1], start, fed(NOISES))]


def r1_oracle():
    states = [0.4]
    for t, z in zip(range(1000, 0, -1), NOISES, strict=True):
        fresh = math.sqrt(SMALL[t]) * z if t > 1 else 0.0
        states.append(mean_of(states[-1], exact_slope(t) * states[-1], t) + fresh)
    return states


def r2():
    models = [reverse(said(0.2, X_T, t, nu=0.3), X_T * ONE, CHAIN[t], CHAIN[t - 1], "learned") for t in (2, T)]
    return [value for model in models for value in (model.mean, model.log_var.exp())]


def r2_oracle():
    return [v for t in (2, T) for v in (mean_of(X_T, 0.2, t), BETA[t - 1] ** 0.3 * SMALL[t] ** 0.7)]


def r3():
    law = posterior(X_T * ONE, X * ONE, CHAIN[T], CHAIN[T - 1])
    return [law.mean, law.log_var.exp()]


def r3_oracle():
    step = stats.norm.pdf(X_T, math.sqrt(1 - BETA[T - 1]) * LINE, math.sqrt(BETA[T - 1]))
    return moments(step * stats.norm.pdf(LINE, math.sqrt(BAR[T - 1]) * X, math.sqrt(1 - BAR[T - 1])))


def r5():
    pairs = [(CHAIN[t], CHAIN[t - 1]) for t in range(2, 1001)]
    return [step_log_var(ONE, t, s, kind).exp() for kind in ("large", "small") for t, s in pairs]


def r6():
    def step(t: int, variance: str) -> torch.Tensor:
        t_, s_ = CHAIN[t], CHAIN[t - 1]
        return Ancestral(variance).step(lambda *_, **__: said(0.2, X_T, t), X_T * ONE, t_, s_, (), ONE[None])[0]

    return [step(t, variance) for t in (T, 1) for variance in ("small", "large")]


def r6_oracle():
    drawn = [mean_of(X_T, 0.2, T) + math.sqrt(v) for v in (SMALL[T], BETA[T - 1])]
    return [*drawn, *[mean_of(X_T, 0.2, 1)] * 2]


def r7():
    ends = []
    for form in ("scaled", "printed"):
        *_, last = trajectory(DATA.denoiser(S.linear()), Inversion(form), CHAIN[::-1], ONE, lambda n: ONE[:n])
        ends.append(last.x)
    return ends


def r7_oracle():
    """The mean of x_0 given x_T, and the product of the printed slopes."""
    printed = 1.0
    for t in range(1000, 0, -1):
        printed *= (1 - math.sqrt(BETA[t - 1]) * exact_slope(t)) / math.sqrt(1 - BETA[t - 1])
    return [math.sqrt(BAR[-1]) * 0.25 / (BAR[-1] * 0.25 + 1 - BAR[-1]), printed]


# --- training --------------------------------------------------------------------------------------------------------
SIX = np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5])


class Affine:
    """ε̂ = 0.6 x_t − 0.2."""

    schedule = S.Flow()

    def __call__(self, x_t, level, cond=None, to=None):
        eps = 0.6 * x_t - 0.2
        return Prediction((x_t - level.like(x_t).sigma * eps) / level.like(x_t).alpha, eps)


def t1():
    """The total, with each step's expectation exact: it is quadratic in that step's number."""
    x, noise = torch.full((2, 1), X, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    total = vlb(Affine(), x, grid(S.Tabulated(SIX)), lambda n: noise[None], variance="large").total
    return total.mean()


def n1_training():
    """The same as one loss: items of one number."""
    x, noise = torch.full((2, 1), X, dtype=torch.float64), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    return full_bound(Affine(), x, grid(S.Tabulated(SIX)), lambda n: noise[None], variance="large").mean()


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
    denoise = DATA.denoiser(S.linear())
    return [simple(denoise(diffuse(x, level, eps), level), eps).mean() for level in CHAIN[1:]]


def t6():
    """x_{t−1} itself, from x, the noise of x_t and what of x_{t−1} the two do not tell."""
    x_s = -0.4
    x_t = math.sqrt(1 - BETA[T - 1]) * x_s + math.sqrt(BETA[T - 1]) * 0.9
    eps = (x_t - math.sqrt(BAR[T]) * X) / math.sqrt(1 - BAR[T])
    z = (x_s - mean_of(x_t, eps, T)) / math.sqrt(SMALL[T])
    return TARGETS["previous"].encode(X * ONE, eps * ONE, CHAIN[T], CHAIN[T - 1], z * ONE)


def t7():
    """The loss's gradients by what the network says of the variance, and of the noise."""
    nu, eps_hat = torch.full((1, 1), 0.3, dtype=torch.float64), torch.full((1, 1), 0.2, dtype=torch.float64)
    nu.requires_grad_()
    eps_hat.requires_grad_()
    x_t, t, s = X_T * ONE, CHAIN[T], CHAIN[T - 1]
    x_hat = (x_t - t.sigma * eps_hat) / t.alpha
    hybrid(Prediction(x_hat, eps_hat, nu), EPS * ONE, X * ONE, x_t, t, s, 1000).sum().backward()
    return [nu.grad, eps_hat.grad]


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
    """Algorithm 1: its loss at these times and noises, and the direction of its step."""
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
    """The difference of the two losses for two scores, over all x and ε by quadrature: the same number."""
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
    """½ (1/σ² − ∫ (q′)²/q): half of what is lost by not knowing x."""

    def fisher(x):
        return float(mpmath.diff(log_density, x) ** 2 * mpmath.exp(log_density(x)))

    information, _ = integrate.quad(fisher, -9, 9, epsabs=1e-12)
    return [0.5 * (1 / (1 - BAR[T]) - information)] * 2


def langevin_variance(solver: AnnealedLangevin, t: NoiseLevel, s: NoiseLevel, v: float) -> float:
    """Of x_s for x_t of variance ``v`` and data of N(0, 1/4), by the slope and on each noise."""
    start = torch.zeros(solver.draws + 1, 1, dtype=torch.float64)
    start[0] = 1
    fresh = torch.cat([torch.zeros(solver.draws, 1), torch.eye(solver.draws)], 1).double()[..., None]
    x, _ = solver.step(DATA.denoiser(S.linear()), start, t, s, (), fresh)
    return float(v * x[0] ** 2 + (x[1:] ** 2).sum())


def s4():
    return langevin_variance(AnnealedLangevin(0.3, 80), CHAIN[901], CHAIN[900], 5.0)


def s4_oracle():
    """x ← x + g s + √(2g) z on N(0, V) keeps V/(1 − g/(2V)), and 80 updates forget where they began."""
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
    levels = grid(S.Tabulated(SIX))
    top = levels[0]
    prior = Gaussian(0 * ONE[0], torch.log(DATA.marginal_var(top)))
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    result = vlb(
        DATA.denoiser(S.Flow()), X * signs.abs(), levels, lambda n: signs[None],
        variance=DATA.reverse_log_var, prior=prior,
    )  # fmt: skip
    return result.bits_per_dim(1).mean()


def v2():
    """The bound between two log-SNRs along three schedules, the integral by the middles of 300 intervals."""
    signs, totals = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), []
    for schedule in (S.LinearLogSNR(8.0, -5.0), S.Sigmoid(), S.cosine(100)):
        top, clean = (schedule(schedule.inverse(log_snr)) for log_snr in (-5.0, 8.0))
        half = torch.full((2,), 0.5, dtype=torch.float64)
        result = vlb_continuous(
            DATA.denoiser(schedule), X * signs.abs(), top, clean, lambda n: signs[None], half, points=300
        )
        totals.append(result.total.mean())
    return totals


def v2_oracle():
    """With the exact denoiser the integral is the fall of KL(q(z given x) to q(z)) from the clean end to the noisy."""

    def kl(log_snr: float, variance: float | None = None) -> float:
        bar = 1 / (1 + math.exp(-log_snr))
        V = bar * 0.25 + 1 - bar if variance is None else variance
        return 0.5 * (math.log(V / (1 - bar)) - 1 + (1 - bar + bar * X**2) / V)

    decoder = 0.5 * (math.log(2 * math.pi) + 1 - 8.0)  # of N(z_0/α_0, exp(−log_snr))
    return [kl(8.0) - kl(-5.0) + kl(-5.0, 1.0) + decoder] * 3


# --- systems ---------------------------------------------------------------------------------------------------------


def n1():
    """Mean and variance of a reverse step times what is seen of x."""
    factor = observed(torch.full((1, 1), 0.9, dtype=torch.float64), torch.tensor(math.log(0.2), dtype=torch.float64))
    step = [
        Product(factor, "large").step(lambda *_, **__: said(0.2), X_T * ONE, CHAIN[T], CHAIN[T - 1], (), z * ONE[None])[
            0
        ]
        for z in (0.0, 1.0)
    ]
    return [step[0], (step[1] - step[0]) ** 2]


def n1_oracle():
    seen = stats.norm.pdf(LINE, math.sqrt(BAR[T - 1]) * 0.9, math.sqrt(BAR[T - 1] * 0.2 + 1 - BAR[T - 1]))
    return moments(seen * stats.norm.pdf(LINE, mean_of(X_T, 0.2, T), math.sqrt(BETA[T - 1])))


def n4():
    """The slope that denoising score matching finds, and the variance of annealed Langevin samples."""
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
    "F1": Row("one step", "undiffuse.process.gaussian.forward", f1,
              lambda: [math.sqrt(1 - BETA[T - 1]) * X, BETA[T - 1]]),
    "F2": Row("the whole chain", "undiffuse.sample.forward_trajectory", f2, f2_oracle),
    "F3": Row("the jump to t", "undiffuse.process.gaussian.diffuse",
              lambda: [diffuse(X * ONE, level, EPS * ONE) for level in CHAIN[1:]], f3_oracle, 1e-12),
    "F4": Row("the schedule", "undiffuse.process.table.linear",
              lambda: linear().beta, lambda: [1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)], 1e-14),
    "F5": Row("the end is the prior, bits", "undiffuse.likelihood.prior_kl",
              lambda: prior_kl(X * ONE, CHAIN[1000]) / math.log(2), f5_oracle, 1e-10),
    "R1": Row("the reverse chain, kept", "undiffuse.sample.trajectory", r1, r1_oracle),
    "R2": Row("mean and variance from the network", "undiffuse.process.gaussian.reverse", r2, r2_oracle),
    "R3": Row("the posterior", "undiffuse.process.gaussian.posterior", r3, r3_oracle),
    "R4": Row("its mean from the noise", "undiffuse.process.gaussian.reverse",
              lambda: reverse(said(EPS), X_T * ONE, CHAIN[T], CHAIN[T - 1]).mean, lambda: r3_oracle()[0]),
    "R5": Row("fixed variances", "undiffuse.process.gaussian.step_log_var", r5, lambda: [*BETA[1:], *SMALL[2:]]),
    "R6": Row("ancestral sampling", "undiffuse.solvers.Ancestral", r6, r6_oracle),
    "R7": Row("one-step inversion", "undiffuse.solvers.inversion.Inversion", r7, r7_oracle),
    "T1": Row("the bound", "undiffuse.likelihood.vlb", t1, t1_oracle),
    "T2": Row("KL of equal variances", "undiffuse.process.gaussian.Gaussian.kl", t2, t2_oracle),
    "T3": Row("weighted noise loss", "undiffuse.process.weighting.bound", t3, t3_oracle),
    "T4": Row("L_simple", "undiffuse.loss.simple", t4, lambda: BAR[1:] * 0.25 / (BAR[1:] * 0.25 + 1 - BAR[1:])),
    "T5": Row("mean matching", "undiffuse.loss.mean_matching",
              lambda: mean_matching(said(0.2), X * ONE, X_T * ONE, CHAIN[T], CHAIN[T - 1]),
              lambda: (r3_oracle()[0] - mean_of(X_T, 0.2, T)) ** 2),
    "T6": Row("predicting x_{t-1}", "undiffuse.process.target.TARGETS", t6, lambda: -0.4),
    "T7": Row("the variance by the bound", "undiffuse.loss.hybrid", t7, t7_oracle),
    "T8": Row("algorithm 1", "undiffuse.Diffusion.loss", t8, t8_oracle, 1e-6),
    "S1": Row("conditional score", "undiffuse.score.conditional", lambda: conditional(EPS * ONE, CHAIN[T]),
              lambda: -(X_T - math.sqrt(BAR[T]) * X) / (1 - BAR[T])),
    "S2": Row("the network as score", "undiffuse.score.predicted",
              lambda: predicted(MIXTURE.predict(X_T * ONE, CHAIN[T]), CHAIN[T]), lambda: mpmath.diff(log_density, X_T)),
    "S3": Row("denoising and explicit matching", "undiffuse.score.denoising", s3, s3_oracle),
    "S4": Row("Langevin dynamics", "undiffuse.solvers.langevin.AnnealedLangevin", s4, s4_oracle),
    "S5": Row("the score's loss on the noise", "undiffuse.score.noise_form",
              lambda: noise_form(said(0.2), EPS * ONE, CHAIN[T]), s5_oracle),
    "S6": Row("Tweedie", "undiffuse.score.tweedie", s6, s6_oracle),
    "S7": Row("Stein, both sides for sin", "undiffuse.score.stein", lambda: stein(torch.sin, 0.4, 1.5),
              lambda: [1.5**2 * math.exp(-(1.5**2) / 2) * math.cos(0.4)] * 2),
    "V1": Row("bits per dimension", "undiffuse.likelihood.NLL.bits_per_dim", v1,
              lambda: -stats.norm.logpdf(X, 0, 0.5) / math.log(2)),
    "V2": Row("the bound in continuous time", "undiffuse.likelihood.vlb_continuous", v2, v2_oracle, 2e-6),
    "N1": Row("inpainting by products", "undiffuse.solvers.product.Product", n1, n1_oracle),
    "N1, training": Row("the full bound as a loss", "undiffuse.loss.full_bound", n1_training, t1_oracle),
    "N4": Row("denoising matching, then Langevin", "undiffuse.solvers.langevin.AnnealedLangevin", n4, n4_oracle),
}  # fmt: skip


def numbers(values: Any) -> np.ndarray:
    """Of a number, a tensor or a list of such."""
    if isinstance(values, torch.Tensor | np.ndarray):
        values = values.flatten().tolist()
    return np.array([float(v) for v in values] if isinstance(values, list | tuple) else [float(values)])


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    row = ROWS[name]
    got, wanted = numbers(row.call()), numbers(row.oracle())
    assert got.shape == wanted.shape
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(got, wanted, rtol=row.tolerance, atol=row.tolerance)


def test_every_row_is_there_and_told() -> None:
    wanted = {"F": 5, "R": 7, "T": 8, "S": 7, "V": 2}
    ids = {f"{letter}{n}" for letter, count in wanted.items() for n in range(1, count + 1)}
    assert set(ROWS) == ids | {"N1", "N1, training", "N4"}
    told = "".join((DOCS / page).read_text() for page in ("maths.md", "errata.md"))
    for name, row in ROWS.items():
        resolve(row.function)
        assert f"`{row.function}`" in told, f"{name}: {row.function}"
        used = inspect.getsource(row.call)
        assert row.function.rpartition(".")[2] in used, f"{name} does not call {row.function}"

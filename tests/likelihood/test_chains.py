"""The bound against a recursion in the notation of Ho et al. 2020, and against −log p of linear-Gaussian chains.

Of the package only `vlb` and its arguments (chain, noise levels, prior) are used.
"""

from __future__ import annotations

import math
from itertools import product

import mpmath
import numpy as np
import pytest
import torch

from undiffuse.denoising.denoiser import Prediction
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian
from undiffuse.sampling.time_grids import time_grid

DIMS = 5


def cosine(T: int) -> np.ndarray:
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


TABLES = {  # the schedule, and its beta by the paper's formula
    "linear 1000": (DS.linear(), np.linspace(1e-4, 0.02, 1000)),
    "cosine 50": (DS.cosine(50), cosine(50)),
    "quadratic 40": (DS.quadratic(40, 1e-3, 0.4), np.linspace(math.sqrt(1e-3), math.sqrt(0.4), 40) ** 2),
    "one step": (DS.Tabulated([0.3]), np.array([0.3])),
}
DECODERS = [None, 2, 17, 256]  # a density, or the number of values
VARIANCES = ["small", "large", "learned"]
EVERY = list(product(["cosine 50", "quadratic 40", "one step"], VARIANCES, DECODERS))
EVERY += [("linear 1000", "learned", 256), ("linear 1000", "small", None)]


class Matrix:
    """ε̂ = matrix x_t + offset, and var_interp = (1 + sin x_t)/2."""

    schedule = S.Flow()

    def __init__(self, matrix: np.ndarray, offset: np.ndarray) -> None:
        self.matrix, self.offset = torch.from_numpy(matrix), torch.from_numpy(offset)

    def __call__(self, x_t, level, cond=None, next_level=None):
        at, eps = level.broadcast_like(x_t), x_t @ self.matrix.T + self.offset
        return Prediction((x_t - at.sigma * eps) / at.alpha, eps, (1 + torch.sin(x_t)) / 2)


def log_bin(mean: float, variance: float, low: float, high: float) -> float:
    with mpmath.workdps(60):
        below, above = (mpmath.ncdf((mpmath.mpf(edge) - mean) / mpmath.sqrt(variance)) for edge in (low, high))
        return float(mpmath.log(above - below))


def by_hand(beta, matrix, offset, x, noise, kind, L):
    """(L_T, Σ_{t≥2} L_{t−1}, L_0) of each item [Ho20 eq. 5, 7, 8, 13]; noise[t − 1] is that of x_t."""
    T, bar = len(beta), np.concatenate([[1.0], np.cumprod(1 - beta)])
    beta = np.concatenate([[np.nan], beta])
    tilde = np.full(T + 1, np.nan)
    for t in range(2, T + 1):
        tilde[t] = beta[t] * (1 - bar[t - 1]) / (1 - bar[t])
    tilde[1] = tilde[2] if T > 1 else beta[1]
    middle = np.zeros(len(x))
    for t in range(T, 0, -1):
        x_t = np.sqrt(bar[t]) * x + np.sqrt(1 - bar[t]) * noise[t - 1]
        mean = (x_t - beta[t] / np.sqrt(1 - bar[t]) * (x_t @ matrix.T + offset)) / np.sqrt(1 - beta[t])
        nu = {"small": 0 * x, "large": 0 * x + 1, "learned": (1 + np.sin(x_t)) / 2}[kind]
        variance = np.exp(nu * np.log(beta[t]) + (1 - nu) * np.log(tilde[t]))
        if t > 1:
            on_x_t, on_x = np.sqrt(1 - beta[t]) * (1 - bar[t - 1]), np.sqrt(bar[t - 1]) * beta[t]
            gap = (on_x_t * x_t + on_x * x) / (1 - bar[t]) - mean
            middle += 0.5 * (np.log(variance / tilde[t]) - 1 + (tilde[t] + gap**2) / variance).sum(1)
        elif L is None:
            last = 0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance).sum(1)
        else:
            half, (low, high) = 1 / (L - 1), (-1 + 1e-9, 1 - 1e-9)
            cells = [
                log_bin(m, v, -math.inf if value < low else value - half, math.inf if value > high else value + half)
                for m, v, value in zip(mean.ravel(), variance.ravel(), x.ravel(), strict=True)
            ]
            last = -np.reshape(cells, x.shape).sum(1)
    return 0.5 * (bar[-1] * x**2 - bar[-1] - np.log1p(-bar[-1])).sum(1), middle, last


@pytest.mark.parametrize(("table", "kind", "L"), EVERY)
def test_a_recursion_by_hand_gives_the_same_bound(table, kind, L):
    """To 1e-9 nats per dimension, for a denoiser that mixes the dimensions, with values at the ends of the range."""
    schedule, beta = TABLES[table]
    rng = np.random.default_rng(len(beta) + len(kind))
    matrix, offset = 0.3 * rng.normal(size=(DIMS, DIMS)), 0.1 * rng.normal(size=DIMS)
    values = rng.integers(0, L or 9, size=(3, DIMS))
    values[0, :2] = 0, (L or 9) - 1
    x = 2 * values / ((L or 9) - 1) - 1
    edges = None
    if L is not None:
        low, high = (torch.from_numpy(x + side / (L - 1)) for side in (-1, 1))
        low[values == 0], high[values == L - 1] = -math.inf, math.inf
        edges = (low, high)
    noise = rng.normal(size=(len(beta), 3, DIMS))
    fresh = iter(torch.from_numpy(noise))
    chain = ReverseChain(Matrix(matrix, offset), time_grid(schedule), kind)
    result = vlb(chain, torch.from_numpy(x), lambda n: next(fresh)[None], edges=edges)
    wanted = by_hand(beta, matrix, offset, x, noise, kind, L)
    for part, name in zip(wanted, ("prior", "diffusion_nats", "decoder"), strict=True):
        scale = max(1.0, float(np.abs(part).max()) / 100)  # the last digits of thousands of nats are rounding errors
        np.testing.assert_allclose(getattr(result, name), part, rtol=0, atol=1e-9 * DIMS * scale)
    np.testing.assert_allclose(result.total, sum(wanted), rtol=1e-11, atol=1e-9 * DIMS)


# --- chains with a known likelihood ----------------------------------------------------------------------------------
# p(x_T) = N(m, diag), p(x_{t−1} given x_t) = N(M_t x_t + c_t, diag v_t): then p(x_0) is Gaussian by recursion.
# The prior, a mean and a variance of each number, need not be that of the exact process.

STEPS, CHAINS = 5, 1000


class Chains:
    """One random linear chain per item, with matrices that mix the dimensions.

    The denoiser predicts the x̂ that makes the mean of the reverse step M x_t + c; the variance is v.
    """

    schedule = S.Flow()

    def __init__(self, dims: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.beta = rng.uniform(0.02, 0.6, STEPS)
        self.bar = np.concatenate([[1.0], np.cumprod(1 - self.beta)])
        wild = rng.uniform(0, 1, (CHAINS, 1)) ** 2  # 0 is the exact reverse of data of N(0, 1)
        mixed = wild[..., None] * rng.normal(0, 0.5, (STEPS, CHAINS, dims, dims))
        self.M = np.sqrt(1 - self.beta)[:, None, None, None] * np.eye(dims) + mixed
        self.c = wild * rng.normal(size=(STEPS, CHAINS, dims))
        self.v = self.beta[:, None, None] * np.exp(wild * rng.normal(size=(STEPS, CHAINS, dims)))
        self.prior = wild * rng.normal(size=(CHAINS, dims)), np.exp(wild * rng.normal(size=(CHAINS, dims)))
        self.x = rng.normal(size=(CHAINS, dims))
        self.signs = np.array(list(product([1.0, -1.0], repeat=dims)))

    def _each(self, values: np.ndarray) -> torch.Tensor:
        """``values`` (CHAINS, ...) repeated for each of the signs of an item."""
        return torch.from_numpy(np.repeat(values, len(self.signs), axis=0))

    def _step(self, level) -> int:
        return round(float(level.t.flatten()[0]) * STEPS)

    def __call__(self, x_t, level, cond=None, next_level=None):
        t = self._step(level)
        mean = torch.einsum("nij,nj->ni", self._each(self.M[t - 1]), x_t) + self._each(self.c[t - 1])
        b, before, after = self.beta[t - 1], self.bar[t - 1], self.bar[t]
        x = ((1 - after) * mean - math.sqrt(1 - b) * (1 - before) * x_t) / (math.sqrt(before) * b)
        return Prediction(x, x_t)

    def log_var(self, t, s):
        return torch.log(self._each(self.v[self._step(t) - 1]))

    def bound(self) -> np.ndarray:
        """`vlb` of each chain at its x, averaged over all signs of every noise: exact, as each term is quadratic."""
        noise = torch.from_numpy(np.tile(self.signs, (CHAINS, 1)))
        mean, variance = (self._each(v) for v in self.prior)
        chain = ReverseChain(self, time_grid(DS.Tabulated(self.beta)), self.log_var)
        prior = Gaussian(mean, torch.log(variance))
        result = vlb(chain, self._each(self.x), lambda n: noise[None], prior=prior)
        return result.total.reshape(CHAINS, -1).mean(1).numpy()

    def log_prob(self) -> np.ndarray:
        """log p(x_0) of the Gaussian x_0."""
        mean, cov = self.prior[0], np.einsum("ni,ij->nij", self.prior[1], np.eye(self.x.shape[1]))
        for M, c, v in zip(self.M[::-1], self.c[::-1], self.v[::-1], strict=True):
            mean = np.einsum("nij,nj->ni", M, mean) + c
            cov = M @ cov @ M.transpose(0, 2, 1) + np.einsum("ni,ij->nij", v, np.eye(len(v[0])))
        off = self.x - mean
        square = np.einsum("ni,ni->n", off, np.linalg.solve(cov, off[..., None])[..., 0])
        return -0.5 * (np.linalg.slogdet(2 * np.pi * cov)[1] + square)

    def gap(self) -> np.ndarray:
        """KL(q(x_1 … x_T given x_0) to p(x_1 … x_T given x_0)) by the joint precision matrices of all states."""
        d, n = self.x.shape[1], STEPS * self.x.shape[1]
        at = [slice(t * d, (t + 1) * d) for t in range(STEPS + 1)]
        P, h = np.zeros((CHAINS, n + d, n + d)), np.zeros((CHAINS, n + d))  # log p = −½ xᵀ P x + hᵀ x + …
        P[:, at[-1], at[-1]] += np.eye(d) / self.prior[1][:, None]
        h[:, at[-1]] += self.prior[0] / self.prior[1]
        for t in range(STEPS):
            M, c, W = self.M[t], self.c[t], np.eye(d) / self.v[t][:, None]
            MW = M.transpose(0, 2, 1) @ W
            P[:, at[t], at[t]] += W
            P[:, at[t + 1], at[t + 1]] += MW @ M
            P[:, at[t + 1], at[t]] -= MW
            P[:, at[t], at[t + 1]] -= MW.transpose(0, 2, 1)
            h[:, at[t]] += c / self.v[t]
            h[:, at[t + 1]] -= np.einsum("nij,nj->ni", MW, c)
        rest, first = slice(d, None), slice(d)
        pull = h[:, rest] - np.einsum("nij,nj->ni", P[:, rest, first], self.x)
        mean_p, P = np.linalg.solve(P[:, rest, rest], pull[..., None])[..., 0], P[:, rest, rest]
        keep = np.sqrt(np.tril(self.bar[1:, None] / self.bar[None, 1:]))  # x_t in x_{t+k}
        cov_q = np.kron((keep * np.sqrt(self.beta)) @ (keep * np.sqrt(self.beta)).T, np.eye(d))
        mean_q = np.concatenate([math.sqrt(b) * self.x for b in self.bar[1:]], axis=1)
        off = mean_q - mean_p
        square = np.einsum("ni,nij,nj->n", off, P, off)
        logs = np.linalg.slogdet(P)[1] + np.linalg.slogdet(cov_q)[1]
        return 0.5 * (np.einsum("nij,ji->n", P, cov_q) - n - logs + square)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_bound_is_the_likelihood_plus_the_gap(dims):
    chains = Chains(dims, seed=dims)
    bound, exact, gap = chains.bound(), -chains.log_prob(), chains.gap()
    assert bool((bound > exact - 1e-9).all())
    assert np.median(gap) > 0.1  # most chains are wrong enough to make a difference
    assert gap.min() < 1e-4  # and some are nearly right
    np.testing.assert_allclose(bound, exact + gap, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_bound_is_the_likelihood_of_the_exact_reverse_chain(dims):
    chains = Chains(dims, seed=10 + dims)
    rng = np.random.default_rng(dims)
    mean, var = rng.normal(size=(CHAINS, dims)), np.exp(rng.normal(size=(CHAINS, dims)))  # of the data
    V = [bar * var + 1 - bar for bar in chains.bar]
    for t, b in enumerate(chains.beta):  # from x_{t+1} to x_t
        slope = math.sqrt(1 - b) * V[t] / V[t + 1]
        chains.M[t] = np.einsum("ni,ij->nij", slope, np.eye(dims))
        chains.c[t] = math.sqrt(chains.bar[t]) * mean - slope * math.sqrt(chains.bar[t + 1]) * mean
        chains.v[t] = b * V[t] / V[t + 1]
    chains.prior = math.sqrt(chains.bar[-1]) * mean, V[-1]
    exact = 0.5 * (np.log(2 * np.pi * var) + (chains.x - mean) ** 2 / var).sum(1)
    np.testing.assert_allclose(-chains.log_prob(), exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(chains.bound(), exact, rtol=1e-9, atol=1e-9)

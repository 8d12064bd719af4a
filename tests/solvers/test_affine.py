"""Every solver is an affine map on Gaussian data. It is probed with basis vectors for x_T and for each noise,
without randomness, and compared with a recursion in the notation of Ho and of Song."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import GaussianData, Spy

from undiffuse import solvers
from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.sample import grid, trajectory
from undiffuse.solvers import DDIM, Ancestral, Product

D = 4
ROOT = np.linalg.qr(np.array([[1.0, 2, 0, 1], [0, 1, -1, 1], [2, 0, 1, -1], [1, 1, 1, 3]]))[0]
MEAN = np.array([0.5, -1.0, 0.2, 2.0])
COVS = {"diagonal": np.diag([0.04, 4.0, 1.0, 0.3]), "full": ROOT @ np.diag([0.04, 4.0, 1.0, 0.3]) @ ROOT.T}
NU = 0.3


class Affine(NamedTuple):
    """x_out = matrix x_in + offset + Σ_k noise[k] z_k."""

    matrix: np.ndarray
    offset: np.ndarray
    noise: np.ndarray


def probe(solver, denoise, levels, dims=D) -> Affine:
    """The solver's map from x_T and all its noises, by basis vectors."""
    steps, draws = len(levels) - 1, solver.draws
    inputs = torch.eye(1 + dims + steps * draws * dims, dtype=torch.float64)[1:]  # row 0 is the origin
    origin = torch.zeros(1, dims, dtype=torch.float64)
    start = torch.cat(
        [origin, torch.cat([torch.eye(dims, dtype=torch.float64), torch.zeros(len(inputs) - dims, dims)])]
    )
    fresh = torch.zeros(steps, draws, len(start), dims, dtype=torch.float64)
    for k in range(steps):
        for j in range(draws):
            first = 1 + dims + (k * draws + j) * dims
            fresh[k, j, first : first + dims] = torch.eye(dims, dtype=torch.float64)
    numbers = iter(fresh)

    def noise(n):
        assert n == draws
        return next(numbers)

    *_, last = trajectory(denoise, solver, levels, start, noise)
    assert next(numbers, None) is None
    out = last.x.numpy()
    columns = (out[1:] - out[0]).T
    return Affine(columns[:, :dims], out[0], columns[:, dims:].reshape(dims, steps * draws, dims).transpose(1, 0, 2))


# --- by hand -------------------------------------------------------------------------------------------------------
# A level is (alpha, sigma). In units of r = √(alpha² + sigma²) every chain preserves variance, ᾱ = alpha²/r².


def by_formula(name: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if name == "flow":
        return 1 - t, t
    if name == "exploding":
        return np.ones_like(t), 0.01 * 5000**t
    if name == "log-SNR":
        odds = np.exp(13.3 - 18.3 * t)
        return np.sqrt(odds / (1 + odds)), np.sqrt(1 / (1 + odds))
    beta = {"linear": np.linspace(1e-4, 0.02, 1000), "zero terminal": np.array([0.1, 0.2, 0.3, 0.5, 1.0])}[name]
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])[np.rint(t * len(beta)).astype(int)]
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def predictor(cov, alpha, sigma) -> tuple[np.ndarray, np.ndarray]:
    """(W, w) of x̂ = W x_t + w."""
    W = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(D))
    return W, MEAN - W @ (alpha * MEAN)


def ancestral(variance):
    def step(bar_t, bar_s, r_t, r_s):
        """Ho 2020 eq. 7 and §3.2: (weight of x_t, weight of x̂, weight of ε̂, std), all at r = 1."""
        beta = 1 - bar_t / bar_s
        small, large = beta * (1 - bar_s) / (1 - bar_t), beta * (r_t / r_s) ** 2
        with np.errstate(divide="ignore"):
            std = {
                "small": math.sqrt(small),
                "large": math.sqrt(large),
                "learned": math.exp(0.5 * (NU * np.log(large) + (1 - NU) * np.log(small))),
            }[variance]
        keep = math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t)
        return keep, math.sqrt(bar_s) * beta / (1 - bar_t), 0.0, 0.0 if bar_s == 1 else std

    return step


def ddim(eta):
    def step(bar_t, bar_s, r_t, r_s):
        """Song 2021 (DDIM) eq. 12 and 16."""
        fresh = eta**2 * (1 - bar_t / bar_s) / (1 - bar_t)  # their std² over 1 − ᾱ_s
        return 0.0, math.sqrt(bar_s), math.sqrt((1 - bar_s) * (1 - min(fresh, 1.0))), math.sqrt((1 - bar_s) * fresh)

    return step


def by_hand(rule, cov, alphas, sigmas) -> Affine:
    matrix, offset, noises = np.eye(D), np.zeros(D), []
    for k in range(len(alphas) - 1):
        (a_t, s_t), (a_s, s_s) = ((alphas[i], sigmas[i]) for i in (k, k + 1))
        r_t, r_s = math.hypot(a_t, s_t), math.hypot(a_s, s_s)
        bar_t, bar_s = (a_t / r_t) ** 2, (a_s / r_s) ** 2
        W, w = predictor(cov, a_t, s_t)
        on_x_t, on_x, on_eps, std = rule(bar_t, bar_s, r_t, r_s)
        # ε̂ = (x_t/r_t − √ᾱ x̂)/√(1 − ᾱ)
        on_x_t += on_eps / math.sqrt(1 - bar_t)
        on_x -= on_eps * math.sqrt(bar_t / (1 - bar_t))
        M = r_s * (on_x_t / r_t * np.eye(D) + on_x * W)
        matrix, offset = M @ matrix, M @ offset + r_s * on_x * w
        noises = [M @ z for z in noises] + [r_s * std * np.eye(D)]
    return Affine(matrix, offset, np.array(noises))


class Row(NamedTuple):
    solver: object
    rule: Callable
    draws: int
    nu: float | None = None


SOLVERS = {
    "ancestral small": Row(Ancestral(), ancestral("small"), 1),
    "ancestral large": Row(Ancestral("large"), ancestral("large"), 1),
    "ancestral learned": Row(Ancestral("learned"), ancestral("learned"), 1, NU),
    "ddim 0": Row(DDIM(), ddim(0.0), 0),
    "ddim 0.3": Row(DDIM(0.3), ddim(0.3), 1),
    "ddim 1": Row(DDIM(eta=1.0), ddim(1.0), 1),
    "product": Row(Product(), ancestral("small"), 1),  # with a factor: test_product.py
}
CHAINS = {
    "linear, ten steps": ("linear", S.linear(), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
    "linear, uneven": ("linear", S.linear(), [1, 0.993, 0.5, 0.02, 0.003, 0.001, 0]),
    "linear, one step": ("linear", S.linear(), [1, 0]),
    "zero terminal": ("zero terminal", S.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0]), [1, 0.8, 0.4, 0.2, 0]),
    "log-SNR": ("log-SNR", S.LinearLogSNR(), [1, 0.9, 0.85, 0.4, 0.1, 0]),
    "flow": ("flow", S.Flow(), [1, 0.75, 0.6, 0.2, 0]),
    "flow between": ("flow", S.Flow(), [0.95, 0.6, 0.2, 0.02]),
    "exploding": ("exploding", S.VarianceExploding(), [1, 0.8, 0.5, 0.3, 0.0]),
}


@pytest.mark.parametrize("cov", COVS.values(), ids=COVS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", SOLVERS)
def test_affine_map(name, chain, cov):
    row, (formula, schedule, times) = SOLVERS[name], CHAINS[chain]
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(cov))
    spy = Spy(data.denoiser(schedule, row.nu))
    levels = grid(schedule, times=times)
    result = probe(row.solver, spy, levels)
    expected = by_hand(row.rule, cov, *by_formula(formula, np.array(times)))
    assert row.solver.draws == row.draws
    assert len(spy.seen) == row.solver.calls * (len(times) - 1)
    for (_, level, _, to), t, s in zip(spy.seen, levels[:-1], levels[1:], strict=True):
        assert (level, to) == (t, s)
    close = {"rtol": 1e-10, "atol": 1e-11 * float(levels[0].sigma)}
    np.testing.assert_allclose(result.matrix, expected.matrix, **close)
    np.testing.assert_allclose(result.offset, expected.offset, **close)
    if row.draws:
        np.testing.assert_allclose(result.noise, expected.noise, **close)
        assert bool((result.noise[-1] == 0).all()) == (times[-1] == 0 and chain != "log-SNR" and chain != "exploding")


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_step_of_a_long_table_is_finite(eta):
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x = torch.ones(1000, D, dtype=torch.float64)
    for schedule in (S.linear(), S.cosine(), S.Sigmoid()):
        # whose frac is 1, and 1 + 2e-16 if it is not kept below
        x_0, _ = DDIM(eta).step(data.denoiser(schedule), x, schedule(t), schedule(0 * t), (), 5 * x[None])
        torch.testing.assert_close(x_0, data.predict(x, schedule(t)).x)


# --- identities ----------------------------------------------------------------------------------------------------


def test_ancestral_step_in_the_formula_of_ho():
    """x_{t−1} = (x_t − β ε̂/√(1−ᾱ))/√(1−β) + σ z [Ho20 eq. 11 and algorithm 2]."""
    schedule = S.linear(20)
    levels, beta = grid(schedule)[::-1], np.linspace(1e-4, 0.02, 20)
    alpha_bar = np.cumprod(1 - beta)
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    x, z = torch.from_numpy(np.array([[0.3, 1.0, -2.0, 0.1]])), torch.from_numpy(np.array([[1.0, 0.2, -0.5, 2.0]]))
    for t in range(1, 21):
        to, level = levels[t - 1 : t + 1]
        eps = data.predict(x, level).eps.numpy()
        b, bar = beta[t - 1], alpha_bar[t - 1]
        mean = (x.numpy() - b / np.sqrt(1 - bar) * eps) / np.sqrt(1 - b)
        before = alpha_bar[t - 2] if t > 1 else 1.0
        for variance, square in (("small", b * (1 - before) / (1 - bar)), ("large", b)):
            step = Ancestral(variance).step(data.denoiser(schedule), x, level, to, (), z[None])[0].numpy()
            np.testing.assert_allclose(step, mean + (t > 1) * np.sqrt(square) * z.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chain", CHAINS)
def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(chain):
    _, schedule, times = CHAINS[chain]
    denoise = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"])).denoiser(schedule)
    a, b = (probe(solver, denoise, grid(schedule, times=times)) for solver in (DDIM(1.0), Ancestral("small")))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


def test_ddim_with_eta_0_is_euler_in_sigma_over_alpha_and_in_t_for_the_flow():
    """d(x/alpha)/d(sigma/alpha) = ε̂ for every schedule; dx/dt = ε̂ − x̂ for the flow only."""
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    x = torch.from_numpy(np.array([[0.3, 1.0, -2.0, 0.1]]))
    for schedule in (S.Flow(), S.LinearLogSNR(), S.VarianceExploding(), S.cosine(20)):
        t, s = (schedule(torch.tensor(v, dtype=torch.float64)) for v in (0.8, 0.35))
        x_hat, eps, _ = data.predict(x, t)
        euler = s.alpha * (x / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * eps)
        step, state = DDIM().step(data.denoiser(schedule), x, t, s, (), x[:0])
        torch.testing.assert_close(step, euler, rtol=1e-12, atol=1e-12)
        assert state == DDIM().init(x, []) == Ancestral().init(x, []) == ()
        in_t = x + (0.35 - 0.8) * (eps - x_hat)
        assert torch.allclose(step, in_t, rtol=1e-12, atol=1e-12) == isinstance(schedule, S.Flow)


# --- order ---------------------------------------------------------------------------------------------------------

ORDERED = {"ddim 0": DDIM()}
ENDS = {
    "log-SNR": (S.LinearLogSNR(), 1.0, 0.0),
    "flow": (S.Flow(), 0.95, 0.05),
    "exploding": (S.VarianceExploding(), 1.0, 0.0),
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", ORDERED)
def test_order(name, ends):
    """The error of the probability flow falls as N^−order."""
    solver, (schedule, first, last) = ORDERED[name], ENDS[ends]
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    start, end = grid(schedule, times=[first, last])
    x = torch.from_numpy(np.array([[0.3, 1.0, -2.0, 0.1]])) * float(start.sigma)
    exact = data.flow(x, start, end)
    steps, errors = 2 ** np.arange(6, 10), []
    for n in steps:
        levels = grid(schedule, times=np.linspace(first, last, n + 1).tolist())
        *_, done = trajectory(data.denoiser(schedule), solver, levels, x, lambda draws: x[:0])
        errors.append(float((done.x - exact).norm()))
    usable = np.array(errors) > 1e-11
    logs = np.log2(steps[usable][-4:]), np.log2(np.array(errors)[usable][-4:])
    slope = np.polyfit(*logs, 1)[0]
    assert abs(-slope - solver.order) < 0.15
    assert np.corrcoef(*logs)[0, 1] ** 2 >= 0.995


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("name", [name for name, row in SOLVERS.items() if row.draws and row.solver.order is not None])
def test_weak_order(name, ends):
    """The error of the samples' covariance, which the probed map gives, falls as N^−order."""
    (solver, _, _, nu), (schedule, first, last) = SOLVERS[name], ENDS[ends]
    data = GaussianData(torch.zeros(1), torch.tensor([0.3]))
    start, end = grid(schedule, times=[first, last])
    goal, given = (float(data.marginal_var(level)) for level in (end, start))
    steps, errors = 2 ** np.arange(5, 9), []
    for n in steps:
        levels = grid(schedule, times=np.linspace(first, last, n + 1).tolist())
        map_ = probe(solver, data.denoiser(schedule, nu), levels, dims=1)
        errors.append(abs(given * float(map_.matrix[0, 0]) ** 2 + float((map_.noise**2).sum()) - goal))
    logs = np.log2(steps), np.log2(errors)
    assert abs(-np.polyfit(*logs, 1)[0] - solver.order) < 0.2
    assert np.corrcoef(*logs)[0, 1] ** 2 >= 0.995


# --- the table of names --------------------------------------------------------------------------------------------


def test_build():
    assert set(solvers.SOLVERS) >= {row.solver.__class__.__name__.lower() for row in SOLVERS.values()}
    assert solvers.build("ddim", eta=0.5) == DDIM(0.5)
    assert solvers.build("ancestral", variance="large") == Ancestral("large")
    with pytest.raises(ConfigError) as error:
        solvers.build("magic")
    assert (error.value.code, error.value.where) == ("SOLVER", "'magic'")
    with pytest.raises(ConfigError, match="no such setting among eta, speed"):
        solvers.build("ancestral", eta=0.3, speed=3)

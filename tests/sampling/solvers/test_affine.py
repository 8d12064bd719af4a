"""Every solver is an affine map on Gaussian data, probed with basis vectors for x_T and for each noise,
without randomness, and compared with the reference of the table: some 600 cases at 1e-10."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import GaussianData, Spy
from solver_table import PROCESSES, ROWS, WITHOUT_REFERENCE, Hand

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

D = 4
ROOT = np.linalg.qr(np.array([[1.0, 2, 0, 1], [0, 1, -1, 1], [2, 0, 1, -1], [1, 1, 1, 3]]))[0]
MEAN = np.array([0.5, -1.0, 0.2, 2.0])
VALUES = [0.04, 4.0, 1.0, 0.3]  # a condition number of 100
COVS = {"diagonal": np.diag(VALUES), "full": ROOT @ np.diag(VALUES) @ ROOT.T}
NU = 0.3
f64 = torch.float64


class Affine(NamedTuple):
    """x_out = matrix x_in + offset + Σ_k noise[k] z_k."""

    matrix: np.ndarray
    offset: np.ndarray
    noise: np.ndarray


def basis(dims: int, steps: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The origin, then basis vectors of x_T and of each noise: (n, dims), and (steps, draws, n, dims)."""
    n = 1 + dims + steps * draws * dims
    start, fresh = torch.zeros(n, dims, dtype=f64), torch.zeros(steps, draws, n, dims, dtype=f64)
    start[1 : 1 + dims] = torch.eye(dims)
    for k in range(steps):
        for j in range(draws):
            first = 1 + dims + (k * draws + j) * dims
            fresh[k, j, first : first + dims] = torch.eye(dims)
    return start, fresh


def columns(out: np.ndarray, dims: int, steps: int, draws: int) -> Affine:
    changes = (out[1:] - out[0]).T
    noise = changes[:, dims:].reshape(dims, steps * draws, dims).transpose(1, 0, 2)
    return Affine(changes[:, :dims], out[0], noise)


def probe(solver, denoise, levels, dims=D) -> Affine:
    """The solver's map from x_T and all its noises."""
    steps, draws = len(levels) - 1, solver.noises_per_step
    start, fresh = basis(dims, steps, draws)
    noises = iter(fresh)

    def noise(n):
        assert n == draws
        return next(noises)

    *_, last = trajectory(denoise, solver, levels, start, noise)
    assert next(noises, None) is None
    return columns(last.x.numpy(), dims, steps, draws)


CHAINS = {
    "linear, ten steps": ("linear", [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
    "linear, uneven": ("linear", [1, 0.993, 0.5, 0.02, 0.003, 0.001, 0]),
    "linear, one step": ("linear", [1, 0]),
    "linear, two steps": ("linear", [1, 0.25, 0]),
    "linear, between": ("linear", [0.97, 0.7005, 0.4, 0.2, 0.05]),
    "zero terminal": ("zero terminal", [1, 0.8, 0.4, 0.2, 0]),
    "log-SNR": ("log-SNR", [1, 0.9, 0.85, 0.4, 0.1, 0]),
    "log-SNR, two steps": ("log-SNR", [0.7, 0.5, 0.2]),
    "flow": ("flow", [1, 0.75, 0.6, 0.2, 0]),
    "flow, between": ("flow", [0.95, 0.6, 0.2, 0.02]),
    "exploding": ("exploding", [1, 0.8, 0.5, 0.3, 0.0]),
    "exploding, even": ("exploding", [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
}


def by_hand(row, process, times, cov) -> Affine:
    """The reference's map, from the same basis vectors."""
    inverse: dict = {}

    def predict(x, alpha, sigma):
        if (alpha, sigma) not in inverse:
            inverse[alpha, sigma] = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(D))
        W = inverse[alpha, sigma]
        return x @ W.T + (MEAN - W @ (alpha * MEAN))

    steps = len(times) - 1
    start, fresh = basis(D, steps, row.noises_per_step)
    return columns(
        row.reference(Hand(start.numpy(), fresh.numpy(), times, process, predict, NU)), D, steps, row.noises_per_step
    )


@pytest.mark.parametrize("cov", COVS.values(), ids=COVS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ROWS)
def test_affine_map(name, chain, cov):
    row, (formula, times) = ROWS[name], CHAINS[chain]
    process = PROCESSES[formula]
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(cov))
    levels = time_grid(process.schedule, times=times)
    denoise = data.denoiser(process.schedule, NU)
    assert row.solver.noises_per_step == row.noises_per_step
    if row.signal and float(levels[0].alpha) == 0:
        with pytest.raises(ConfigError):
            probe(row.solver, denoise, levels)
        return
    result, expected = probe(row.solver, denoise, levels), by_hand(row, process, times, cov)
    close = {"rtol": 1e-10, "atol": 1e-11 * max(1.0, float(levels[0].sigma))}
    np.testing.assert_allclose(result.matrix, expected.matrix, **close)
    np.testing.assert_allclose(result.offset, expected.offset, **close)
    np.testing.assert_allclose(result.noise, expected.noise, **close)


@pytest.mark.parametrize("name", ROWS)
def test_calls(name):
    """A chain with finite ends takes the number of calls in the table, none beyond its ends."""
    row, process = ROWS[name], PROCESSES["log-SNR"]
    for steps in (1, 2, 3, 8):
        spy = Spy(GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"])).denoiser(process.schedule, NU))
        levels = time_grid(process.schedule, steps)
        probe(row.solver, spy, levels)
        assert len(spy.seen) == row.calls(steps)
        assert all(0 <= float(level.t) <= 1 for _, level, _, _ in spy.seen)
        assert {levels[0].t.item()} <= {level.t.item() for _, level, _, _ in spy.seen}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_step_of_a_long_table_is_finite(eta):
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x = torch.ones(1000, D, dtype=torch.float64)
    for schedule in (DS.linear(), DS.cosine(), S.Sigmoid()):
        # whose frac is 1, and 1 + 2e-16 if it is not kept below
        x_0, _ = DDIM(eta).step(data.denoiser(schedule), x, schedule(t), schedule(0 * t), (), 5 * x[None])
        torch.testing.assert_close(x_0, data.predict(x, schedule(t)).x)


# --- identities ----------------------------------------------------------------------------------------------------


def test_ancestral_step_in_the_formula_of_ho():
    """x_{t−1} = (x_t − β ε̂/√(1−ᾱ))/√(1−β) + σ z [Ho20 eq. 11 and algorithm 2]."""
    schedule = DS.linear(20)
    levels, beta = time_grid(schedule)[::-1], np.linspace(1e-4, 0.02, 20)
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
    formula, times = CHAINS[chain]
    schedule = PROCESSES[formula].schedule
    denoise = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"])).denoiser(schedule)
    a, b = (probe(solver, denoise, time_grid(schedule, times=times)) for solver in (DDIM(1.0), Ancestral("small")))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


def test_ddim_with_eta_0_is_euler_in_sigma_over_alpha_and_in_t_for_the_flow():
    """d(x/alpha)/d(sigma/alpha) = ε̂ for every schedule; dx/dt = ε̂ − x̂ for the flow only."""
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    x = torch.from_numpy(np.array([[0.3, 1.0, -2.0, 0.1]]))
    for schedule in (S.Flow(), S.LinearLogSNR(), S.VarianceExploding(), DS.cosine(20)):
        t, s = (schedule(torch.tensor(v, dtype=torch.float64)) for v in (0.8, 0.35))
        x_hat, eps, _ = data.predict(x, t)
        euler = s.alpha * (x / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * eps)
        step, state = DDIM().step(data.denoiser(schedule), x, t, s, (), x[:0])
        torch.testing.assert_close(step, euler, rtol=1e-12, atol=1e-12)
        assert state == DDIM().init(x, []) == Ancestral().init(x, []) == ()
        in_t = x + (0.35 - 0.8) * (eps - x_hat)
        assert torch.allclose(step, in_t, rtol=1e-12, atol=1e-12) == isinstance(schedule, S.Flow)


# --- the table of names --------------------------------------------------------------------------------------------


def test_every_solver_has_a_row():
    """Each name builds the solver of its row, or is tested in a file of its own."""
    rows = {row.name: row.solver for row in ROWS.values() if row.name}
    assert {name: solvers.build(name) for name in rows} == rows
    assert set(solvers.SOLVERS) == {*rows, *WITHOUT_REFERENCE}


def test_build():
    assert solvers.build("ddim", eta=0.5) == DDIM(0.5)
    assert solvers.build("ancestral", variance="large") == Ancestral("large")
    with pytest.raises(ConfigError) as error:
        solvers.build("magic")
    assert (error.value.code, error.value.where) == ("SOLVER", "'magic'")
    with pytest.raises(ConfigError, match=r"eta = 0.3: there is no such setting. Its settings are var"):
        solvers.build("ancestral", eta=0.3, speed=3)

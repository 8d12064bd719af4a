"""Langevin updates have a stationary distribution in place of an order. It is computed without randomness: on
Gaussian data from the affine map of an update, on a mixture from its transition kernel on a fine grid."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import EmpiricalData, GaussianData, MixtureData, Spy
from test_affine import COVS, MEAN, D, probe

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.langevin import AnnealedLangevin, langevin
from undiffuse.sampling.time_grids import time_grid

f64 = torch.float64


def misprinted(x, score, size, noise):
    """With √size in place of √(2 size)."""
    return x + size * score + math.sqrt(size) * noise


# --- one update ----------------------------------------------------------------------------------------------------


def test_one_update():
    x, score, z = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=f64)
    expected = [
        [a + 0.08 * b + 0.4 * c for a, b, c in zip(*rows, strict=True)] for rows in zip(x, score, z, strict=True)
    ]
    torch.testing.assert_close(langevin(x, score, 0.08, z), torch.tensor(expected, dtype=f64))
    sizes = torch.tensor([[0.08], [0.02]], dtype=f64)
    both = langevin(x, score, sizes, z)
    torch.testing.assert_close(both[0], langevin(x, score, 0.08, z)[0])
    torch.testing.assert_close(both[1], langevin(x, score, 0.02, z)[1])
    assert langevin(x.float(), score.float(), 0.1, z.float()).dtype == torch.float32


@pytest.mark.parametrize("size", [1.0, 0.5, 0.1, 1e-3])
def test_the_stationary_variance_of_a_standard_gaussian(size):
    """x ← (1 − g) x + √(2g) z has variance V = 2g/(1 − (1 − g)²) = 1/(1 − g/2); with √g half of it."""
    one, none = torch.ones((), dtype=f64), torch.zeros((), dtype=f64)
    for update, truth in ((langevin, 1 / (1 - size / 2)), (misprinted, 1 / (2 - size))):
        keep, fresh = float(update(one, -one, size, none)), float(update(none, -none, size, one))
        assert fresh**2 / (1 - keep**2) == pytest.approx(truth, rel=1e-12)
        variance = 5.0
        for _ in range(int(60 / size)):
            variance = keep**2 * variance + fresh**2
        assert variance == pytest.approx(truth, rel=1e-12)


# --- on a mixture --------------------------------------------------------------------------------------------------

MIXTURE = MixtureData(
    torch.tensor([0.8, 0.2], dtype=f64), torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.09], [0.16]], dtype=f64)
)


def kernel(update, x: torch.Tensor) -> np.ndarray:
    """(n, n): the transition probabilities from x_i to the cell of x_j, for an ``update`` (x, noise) ↦ x."""
    mean = update(x, torch.zeros_like(x))
    std = update(x, torch.ones_like(x)) - mean
    density = torch.exp(-0.5 * ((x.T - mean) / std) ** 2) / (math.sqrt(2 * math.pi) * std)
    return (density * (x[1, 0] - x[0, 0])).numpy()


def stationary(matrix: np.ndarray) -> np.ndarray:
    """π with π K = π and sum 1."""
    n = len(matrix)
    equations = np.vstack([matrix.T - np.eye(n), np.ones(n)])
    return np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0), rcond=None)[0]


def line(reach: float, n: int) -> torch.Tensor:
    return torch.linspace(-reach, reach, n, dtype=f64)[:, None]


def distance(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation."""
    return 0.5 * float(np.abs(p - q).sum())


@pytest.mark.parametrize(
    ("update", "power", "other"), [(langevin, 1, 2), (misprinted, 2, 1)], ids=["right", "misprinted"]
)
def test_the_stationary_density_tends_to_p_and_with_the_misprint_to_its_square(update, power, other):
    level = S.VarianceExploding(0.3, 2.0)(0.0)
    x = line(3.5, 281)
    p = MIXTURE.log_density(x, level).exp().numpy()
    goal, wrong = (p**k / (p**k).sum() for k in (power, other))
    score = MIXTURE.score(x, level)
    errors = []
    for size in (0.01, 0.005, 0.0025):
        matrix = kernel(lambda at, z, size=size: update(at, score, size, z), x)
        assert float(np.abs(matrix[60:-60].sum(1) - 1).max()) < 1e-12  # the cells are fine enough
        weights = stationary(matrix)
        errors.append(distance(weights, goal))
        assert distance(weights, wrong) > 0.1
    assert errors[-1] < 0.005
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(slopes, 1, atol=0.1)


def test_annealing_finds_the_weights_of_separate_modes():
    """Modes of 0.8 and 0.2 with nothing between them. From N(0, 4), 1000 updates at one level leave 0.502 on the
    left, about the half that it began with, and 100 at each of ten levels 0.789."""
    data = MixtureData(
        torch.tensor([0.8, 0.2], dtype=f64), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1), 0.001, dtype=f64)
    )
    schedule = S.VarianceExploding(0.08, 2.0)
    denoise = data.denoiser(schedule)
    x = line(9.0, 601)
    update = AnnealedLangevin(updates_per_level=1)
    levels = time_grid(schedule, 10)
    start = torch.exp(-0.5 * (x[:, 0] / 2) ** 2).numpy()
    p = data.log_density(x, levels[-1]).exp().numpy()

    def run(levels) -> np.ndarray:
        weights = start / start.sum()
        for s in levels:
            matrix = kernel(lambda at, z, s=s: update.step(denoise, at, s, s, (), z[None])[0], x)
            for _ in range(100):
                weights = weights @ matrix
        return weights

    annealed, alone = run(levels[1:]), run(levels[-1:] * 10)
    left = (x[:, 0] < 0).numpy()
    assert annealed.sum() == pytest.approx(1, abs=1e-4)
    assert annealed[left].sum() == pytest.approx(0.789, abs=0.001)
    assert alone[left].sum() == pytest.approx(0.502, abs=0.001)
    assert distance(annealed, p / p.sum()) < 0.02
    assert distance(alone, p / p.sum()) > 0.25


# --- the solver ----------------------------------------------------------------------------------------------------

CHAINS = {
    "exploding": (S.VarianceExploding(), [1, 0.8, 0.5, 0.3, 0.0]),
    "linear": (DS.linear(), [1, 0.5, 0.2, 0.03, 0]),
    "log-SNR": (S.LinearLogSNR(), [1, 0.7, 0.4, 0]),
    "flow": (S.Flow(), [0.95, 0.6, 0.2, 0.0]),
}


@pytest.mark.parametrize("cov", COVS.values(), ids=COVS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    ("step_size", "each", "settings"), [(0.1, 3, {}), (0.5, 1, {}), (0.1, 3, {"denoise_last": False})]
)
def test_affine_map(chain, cov, step_size, each, settings):
    """Song 2019, algorithm 1: x + (α_i/2) s + √α_i z, T times at each sigma_i, α_i = ε sigma_i²/sigma_L².

    The last update is E[x given x_t]: in a step into data, and by default at a last level of any noise.
    """
    schedule, times = CHAINS[chain]
    levels = time_grid(schedule, times=times)
    solver = AnnealedLangevin(step_size, each, **settings)
    spy = Spy(GaussianData(torch.from_numpy(MEAN), torch.from_numpy(cov)).denoiser(schedule))
    result = probe(solver, spy, levels)
    assert len(spy.seen) == solver.calls * (len(levels) - 1)
    assert (solver.calls, solver.noises_per_step, solver.order) == (each, each, None)

    sigma_L = 0.01
    epsilon = 2 * step_size * sigma_L**2
    matrix, offset, noises = np.eye(D), np.zeros(D), []
    for k, (t, s) in enumerate(pairwise(levels)):
        at = s if s.sigma > 0 else t
        alpha, sigma = float(at.alpha), float(at.sigma)
        assert all(tuple(level[:4]) == tuple(at[:4]) for _, level, _, _ in spy.seen[k * each : (k + 1) * each])
        moved = alpha / float(t.alpha)
        matrix, offset, noises = moved * matrix, moved * offset, [moved * z for z in noises]
        precision = np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(D))
        size = epsilon * (sigma / sigma_L) ** 2
        for i in range(each):
            last = s.sigma == 0 or (k == len(levels) - 2 and not settings)
            if last and i == each - 1:
                M, shift, fresh = alpha * cov @ precision, MEAN - alpha**2 * cov @ precision @ MEAN, 0.0
                M, shift = float(s.alpha) * M, float(s.alpha) * shift
            else:
                M, shift = np.eye(D) - size / 2 * precision, size / 2 * alpha * precision @ MEAN
                fresh = math.sqrt(size)
            matrix, offset = M @ matrix, M @ offset + shift
            noises = [M @ z for z in noises] + [fresh * np.eye(D)]
    close = {"rtol": 1e-9, "atol": 1e-10 * float(levels[0].sigma)}
    np.testing.assert_allclose(result.matrix, matrix, **close)
    np.testing.assert_allclose(result.offset, offset, **close)
    np.testing.assert_allclose(result.noise, np.array(noises), **close)


def test_a_variance_preserving_chain_is_the_exploding_one_in_x_over_alpha():
    schedule, times = S.LinearLogSNR(8.0, -4.0), [1, 0.6, 0.3, 0.0]
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    levels = time_grid(schedule, times=times)
    ratios = [level.sigma / level.alpha for level in levels]
    exploding = [NoiseLevel(v.t, torch.ones((), dtype=f64), r, v.log_snr) for v, r in zip(levels, ratios, strict=True)]
    here, there = (
        probe(AnnealedLangevin(updates_per_level=2), data.denoiser(schedule), chain) for chain in (levels, exploding)
    )
    first, last = float(levels[0].alpha), float(levels[-1].alpha)
    np.testing.assert_allclose(here.matrix * first / last, there.matrix, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(here.offset / last, there.offset, rtol=1e-10)
    np.testing.assert_allclose(here.noise / last, there.noise, rtol=1e-10, atol=1e-12)


def test_items_of_a_batch_at_different_levels():
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    solver, schedule = AnnealedLangevin(0.2, 2), DS.linear(20)
    denoise = data.denoiser(schedule)
    x, *noise = torch.randn(3, 2, D, generator=torch.Generator().manual_seed(0), dtype=f64)
    noise = torch.stack(noise)
    t, s = schedule(torch.tensor([0.5, 0.05])), schedule(torch.tensor([0.4, 0.0]))
    whole, state = solver.step(denoise, x, t, s, (), noise)
    assert state == ()
    for i in range(2):
        alone, _ = solver.step(denoise, x[i : i + 1], t.take(i), s.take(i), (), noise[:, i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    clean, _ = AnnealedLangevin(updates_per_level=1).step(denoise, x, t, schedule(torch.zeros(2)), (), noise[:1])
    torch.testing.assert_close(clean, data.predict(x, t).x)


def test_samples_keep_no_noise_of_the_last_level():
    """Data at one point: after ten levels from 2 to 0.02 the spread is 0.02 without the last denoising, else 0."""
    data, schedule = EmpiricalData(torch.full((1, 1), 0.3)), S.VarianceExploding(0.02, 2.0)
    levels = time_grid(schedule, 9)
    spread = {
        denoise: float(
            np.linalg.norm(probe(AnnealedLangevin(denoise_last=denoise), data.denoiser(schedule), levels, 1)[2])
        )
        for denoise in (False, True)
    }
    assert spread[False] == pytest.approx(0.02 / math.sqrt(1 - 0.1 / 2), rel=1e-3)
    assert spread[True] < 1e-12
    assert spread[False] * 255 / 2 > 2.5  # grey levels


def test_a_corrector_does_not_denoise():
    schedule = S.VarianceExploding(0.02, 2.0)
    (t, s), x = time_grid(schedule, 1), torch.ones(1, D, dtype=f64)
    data = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))
    for solver in (AnnealedLangevin(updates_per_level=1), AnnealedLangevin(updates_per_level=1, denoise_last=False)):
        state = solver.init(x, [t, s])
        found, _ = solver.step(data.denoiser(schedule), x, s, s, state, x[None])
        torch.testing.assert_close(found, langevin(x, data.score(x, s), 0.1 * s.sigma**2, x))


def test_settings():
    assert solvers.build("annealed_langevin") == AnnealedLangevin(0.1, 100)
    assert solvers.build("annealed_langevin", step_size=0.3, updates_per_level=5) == AnnealedLangevin(0.3, 5)
    with pytest.raises(ConfigError, match="the updates diverge at a step_size of 2 or more"):
        AnnealedLangevin(step_size=2.0)
    assert AnnealedLangevin(1.5, 1).calls == 1
    assert solvers.build("annealed_langevin", denoise_last=False) == AnnealedLangevin(denoise_last=False)
    with pytest.raises(
        ConfigError, match=r"denoise_last = 0: it has to be true or false. Its settings are .*_last=true"
    ):
        solvers.build("annealed_langevin", denoise_last=0)
    for step_size, updates in ((0.0, 1), (2.0, 1), (math.nan, 5), (0.1, 0), (0.1, 10_001)):
        with pytest.raises(
            ConfigError, match=r"SOLVER.*Give a step_size between 0 and 2, and updates_per_level from 1"
        ):
            AnnealedLangevin(step_size, updates)
    zero_terminal = time_grid(S.Flow(), 4)
    with pytest.raises(ConfigError, match=r"'annealed_langevin': .*zero-terminal SNR.*Use 'ddim'"):
        AnnealedLangevin().init(torch.zeros(1, 1), zero_terminal)

"""The likelihood baselines: probabilities of integers that sum to one and equal brute force."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import norm

from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import baselines
from undiffuse.evaluation.baselines import gaussian_mixtures, independent_pixels, mixture_nats, shared_values
from undiffuse.process.gaussian import Gaussian

EVERY = torch.tensor(list(itertools.product(range(3), repeat=2)))


@pytest.fixture
def few_settings(monkeypatch):
    monkeypatch.setattr(baselines, "COMPONENTS", (1, 2, 4, 1000))  # more components than items are not fitted
    monkeypatch.setattr(baselines, "REG_COVAR", (1e-3, 1e-2))
    monkeypatch.setattr(baselines, "RESTARTS", 1)


def correlated(n, seed):
    """(n, 1, 2) integers of 0, 1, 2, the second pixel mostly a copy of the first."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 3, n)
    second = np.where(rng.random(n) < 0.8, first, rng.integers(0, 3, n))
    return np.stack([first, second], 1)[:, None]


def test_independent_pixels_is_add_alpha_counting():
    train, validation = np.array([[0, 2], [0, 2], [1, 2]]), np.array([[0, 1], [1, 2]])
    result = independent_pixels(train, validation, EVERY, 3)
    alpha = result.chosen["alpha"]
    by_hand = [-math.log((np.sum(train[:, 0] == v) + alpha) / (3 + 3 * alpha))
               - math.log((np.sum(train[:, 1] == w) + alpha) / (3 + 3 * alpha)) for v, w in EVERY.tolist()]  # fmt: skip
    np.testing.assert_allclose(result.nats, by_hand, rtol=1e-12)
    assert np.exp(-result.nats).sum() == pytest.approx(1, abs=1e-12)
    # n_dv + α over N + α L on the two validation items: dense search for the same minimum
    grid = np.geomspace(1e-3, 10, 4001)
    loss = -np.log((2 + grid) * (1 + grid) * grid * (3 + grid) / (3 + 3 * grid) ** 4)
    assert alpha == pytest.approx(grid[loss.argmin()], rel=0.13)
    assert 0.01 < alpha < 9


def test_mixture_equals_brute_force_and_sums_to_one():
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-0.8, 0.1], [0.4, 1.3]], dtype=torch.float64)
    scales = torch.tensor([[0.3, 0.5], [1.1, 0.2]], dtype=torch.float64)
    nats = mixture_nats(EVERY, weights, means, scales, 3).numpy()
    edges = [-np.inf, -0.5, 0.5, np.inf]
    brute = [sum(weights[k] * math.prod(norm.cdf(edges[v + 1], means[k, d], scales[k, d])
                                        - norm.cdf(edges[v], means[k, d], scales[k, d]) for d, v in enumerate(item))
                 for k in range(2)) for item in EVERY.tolist()]  # fmt: skip
    np.testing.assert_allclose(np.exp(-nats), brute, rtol=1e-10)
    assert np.exp(-nats).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("average", [1, 3])
def test_gaussian_mixture_is_a_distribution_and_models_the_dependence(few_settings, average):
    train, validation, held_out = (correlated(n, seed) for seed, n in enumerate((400, 200, 300)))
    mixture = gaussian_mixtures(train, validation, held_out, 3, averages=(average,))[0]
    independent = independent_pixels(train, validation, held_out, 3)
    assert mixture.chosen["components"] > 1
    assert mixture.chosen["fits"] == 3 * 2 + 5
    paired = independent.nats - mixture.nats
    assert paired.mean() > 5 * paired.std() / math.sqrt(len(paired))
    every = gaussian_mixtures(train, validation, EVERY.reshape(-1, 1, 2), 3, averages=(average,))[0]
    assert np.exp(-every.nats).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(every.bits_per_dim, every.nats / (2 * math.log(2)))


def test_the_chosen_fit_is_the_best_on_the_validation_part(few_settings):
    """Validation as the held-out part: no single fit of the grid does better than the chosen one."""
    train, validation = correlated(100, 0), correlated(60, 1)
    best = gaussian_mixtures(train, validation, validation, 3)[0].nats.mean()
    for components, reg in itertools.product((1, 2, 4), (1e-3, 1e-2)):
        baselines.COMPONENTS, baselines.REG_COVAR = (components,), (reg,)  # restored by the fixture
        assert gaussian_mixtures(train, validation, validation, 3)[0].nats.mean() >= best - 1e-12


@pytest.mark.parametrize(
    ("lo", "hi"), [(-0.5, 0.5), (5, 5.5), (-40, -39), (39, 40), (300, 301), (8, math.inf), (-math.inf, -50), (-3, 90)]
)
def test_mass_of_a_bin_holds_in_the_tails(lo, hi):
    mpmath.mp.dps = 50
    lower, upper = sorted((abs(lo), abs(hi)))
    if lo < 0 < hi:
        exact = 1 - mpmath.ncdf(lo) - mpmath.ncdf(-mpmath.mpf(hi))
    else:  # the mirrored bin
        exact = (mpmath.erfc(mpmath.mpf(lower) / mpmath.sqrt(2)) - mpmath.erfc(mpmath.mpf(upper) / mpmath.sqrt(2))) / 2
    edges = torch.tensor(lo, dtype=torch.float64), torch.tensor(hi, dtype=torch.float64)
    value = Gaussian(torch.zeros(()), torch.zeros(())).bin_log_prob(edges)
    assert float(value) == pytest.approx(float(mpmath.log(exact)), rel=1e-12)


def test_refusals(monkeypatch):
    good = correlated(5, 0)
    for bad in (good + 1, good - 1, good + 0.5):
        with pytest.raises(DataError, match=r"NUM_VALUES.*held_out"):
            independent_pixels(good, good, bad, 3)
    for bad in (good[:, 0], good[:0]):
        with pytest.raises(DataError, match="SHAPE"):
            independent_pixels(good, bad, good, 3)
    with pytest.raises(ConfigError):
        independent_pixels(good, good, good, 1)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.mixture", None)
    with pytest.raises(ConfigError, match=r"undiffuse\[data\]"):
        gaussian_mixtures(good, good, good, 3)


def test_values_that_are_shared_by_all_places():
    """Two channels of three values, by hand: probabilities (n + 1)/(N + 3) of the channel's own counts."""
    train, held_out = np.array([[5, 0, 0], [1, 2, 2]]), np.array([[2, 1, 0], [0, 0, 3]])
    expected = -(2 * math.log2(6 / 8) + math.log2(1 / 8) + 3 * math.log2(3 / 8)) / 6
    assert shared_values(train, held_out) == pytest.approx(expected, rel=1e-12)
    assert shared_values(np.zeros((1, 4), int), np.array([[1, 2, 0, 3]])) == 2.0

"""Laplace distributions: density, and masses of bins that sum to 1 at any scale and distance."""

import math

import mpmath
import pytest
import torch

from undiffuse.data.transform import IntegerLevels
from undiffuse.process.laplace import Laplace

f64 = torch.float64


def test_density():
    x, mean, log_scale = (torch.tensor([n], dtype=f64) for n in (0.7, -0.4, -1.2))
    b = math.exp(-1.2)
    assert float(Laplace(mean, log_scale).log_prob(x)) == pytest.approx(math.log(math.exp(-1.1 / b) / (2 * b)))


@pytest.mark.parametrize("log_scale", [-9.0, -2.0, 3.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.013, 0.9, 40.0])
def test_masses_of_bins(mean, log_scale):
    """Against fifty digits: each bin's mass to 1e-9 in its logarithm, and the sum over the values is 1."""
    levels = IntegerLevels(9)
    edges = levels.edges(torch.arange(9))
    p = Laplace(torch.full((9,), mean, dtype=f64), torch.full((9,), log_scale, dtype=f64))
    log_prob = p.bin_log_prob(edges)
    assert float(torch.logsumexp(log_prob, 0)) == pytest.approx(0, abs=1e-9)
    with mpmath.workdps(50):

        def cdf(edge):
            u = (mpmath.mpf(float(edge)) - mpmath.mpf(mean)) / mpmath.exp(log_scale)
            return mpmath.exp(u) / 2 if u <= 0 else 1 - mpmath.exp(-u) / 2

        def mass(low, high):
            u, v = ((mpmath.mpf(float(edge)) - mpmath.mpf(mean)) / mpmath.exp(log_scale) for edge in (low, high))
            return cdf(high) - cdf(low) if u <= 0 else mpmath.exp(-u) / 2 - mpmath.exp(-v) / 2

        exact = [float(mpmath.log(mass(low, high))) for low, high in zip(*edges, strict=True)]
    torch.testing.assert_close(log_prob, torch.tensor(exact, dtype=f64), rtol=1e-9, atol=1e-9)


def test_gradients_are_finite_at_outer_bins_and_far_from_the_mean():
    mean = torch.tensor([-50.0, 0.0, 0.0, 50.0], dtype=f64, requires_grad=True)
    log_scale = torch.full((4,), -7.0, dtype=f64, requires_grad=True)
    edges = IntegerLevels(5).edges(torch.tensor([0, 0, 4, 2]))
    Laplace(mean, log_scale).bin_log_prob(edges).sum().backward()
    assert torch.isfinite(mean.grad).all()
    assert torch.isfinite(log_scale.grad).all()
    assert float(mean.grad[3]) == pytest.approx(-math.exp(7.0))

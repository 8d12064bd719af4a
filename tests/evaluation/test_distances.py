"""Distances against closed forms, on features whose sample moments are exact by construction."""

import math

import pytest
import torch

from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.evaluation.distances import frechet, jackknife, kernel, nearest, precision


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(n, mean, root, seed=0):
    """(n, D) rows whose sample mean is ``mean`` and unbiased covariance ``root`` ``root``ᵀ, to rounding."""
    white = noise(n, len(mean), seed=seed)
    white = torch.linalg.qr(white - white.mean(0)).Q * (n - 1) ** 0.5
    return torch.as_tensor(mean, dtype=torch.float64) + white @ torch.as_tensor(root, dtype=torch.float64).T


def test_frechet_of_diagonal_gaussians():
    a = exact(50, [1.0, 2.0, 3.0], torch.diag(torch.tensor([1.0, 2.0, 0.0])))
    b = exact(70, [1.0, 0.0, 3.5], torch.diag(torch.tensor([3.0, 2.0, 0.5])), seed=1)
    expected = (0 + 4 + 0.25) + (4 + 0 + 0.25)  # |Δμ|² + Σ (s_a − s_b)²
    assert frechet(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute():
    root_a, root_b = torch.tensor([[1.0, 0.0], [2.0, 0.5]]), torch.tensor([[0.3, -1.0], [0.0, 2.0]])
    a, b = exact(40, [0.0, 0.0], root_a), exact(40, [0.0, 0.0], root_b, seed=1)
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    product = cov_a @ cov_b
    trace_root = (product.trace() + 2 * product.det().sqrt()).sqrt()  # of a 2 x 2 matrix
    expected = float(cov_a.trace() + cov_b.trace() - 2 * trace_root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)  # the oracle's roots are float32


def test_frechet_with_fewer_rows_than_dimensions_is_that_of_the_subspace():
    a, b = exact(12, [0.0, 1.0, 2.0], torch.eye(3)), exact(20, [1.0, 1.0, 0.0], 2 * torch.eye(3), seed=1)
    frame = torch.linalg.qr(noise(500, 3, seed=2)).Q
    assert frechet(a @ frame.T, b @ frame.T) == pytest.approx((1 + 4) + 3, rel=1e-12)


def test_frechet_of_orthogonal_subspaces_has_no_overlap():
    a, b = torch.zeros(5, 40, dtype=torch.float64), torch.zeros(5, 40, dtype=torch.float64)
    a[:, :4], b[:, 20:24] = exact(5, [0.0] * 4, torch.eye(4)), exact(5, [0.0] * 4, torch.eye(4), seed=1)
    assert frechet(a, b) == pytest.approx(8, rel=1e-12)


@pytest.mark.parametrize("shape", [(60, 5), (6, 30)])
def test_invariances(shape):
    a, b = noise(*shape), 1.5 * noise(*shape, seed=1) + 0.3
    turn = torch.linalg.qr(noise(shape[1], shape[1], seed=2)).Q
    value = frechet(a, b)
    assert frechet(b, a) == pytest.approx(value, rel=1e-12)
    assert frechet(a @ turn + 7, b @ turn + 7) == pytest.approx(value, rel=1e-9)
    assert frechet(3 * a, 3 * b) == pytest.approx(9 * value, rel=1e-9)
    assert frechet(a, a.flip(0)) <= 1e-12 * float(a.var(0).sum())
    assert kernel(b, a, blocks=3) == pytest.approx(kernel(a, b, blocks=3), rel=1e-12)
    assert kernel(a @ turn, b @ turn, blocks=3) == pytest.approx(kernel(a, b, blocks=3), rel=1e-9)


def test_kernel_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[2.0, 2.0]] * 4)
    # Whatever the shuffle, a block of 4 rows: within a 2 pairs of k(1,0; 1,0), k(0,2; 0,2), the other 4 mixed.
    same, mixed = (1.5**3 + 3.0**3) / 6, 1.0 * 4 / 6
    value = same + mixed + 5.0**3 - 2 * (2.0**3 + 3.0**3) / 2
    both = torch.cat([a, a]), torch.cat([b, b])
    mean, _ = kernel(*both, blocks=2, seed=_seed_of_equal_halves())
    assert mean == pytest.approx(value, rel=1e-12)


def _seed_of_equal_halves():
    """A seed that shuffles rows 0 to 7 so that both halves hold as many odd ones."""
    for seed in range(1000):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        if int((order[:4] % 2).sum()) == 2:
            return seed
    raise AssertionError


def polynomial_mean(mean_a, root_a, mean_b, root_b):
    """E (x·y/D + 1)³ of independent Gaussians x, y: moments up to the third of each, contracted."""

    def moments(mean, root):
        cov = root @ root.T
        second = cov + torch.outer(mean, mean)
        mixed = torch.einsum("i,jk->ijk", mean, cov)
        third = torch.einsum("i,j,k->ijk", mean, mean, mean) + mixed + mixed.permute(1, 0, 2) + mixed.permute(2, 1, 0)
        return mean, second, third

    pairs = zip(moments(mean_a, root_a), moments(mean_b, root_b), strict=True)
    first, second, third = ((p * q).sum() for p, q in pairs)
    d = len(mean_a)
    return float(1 + 3 * first / d + 3 * second / d**2 + third / d**3)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kernel_is_unbiased(shift):
    """5,000 blocks of 4: rejected beyond 6 errors, false alarm 2e-9 for a normal mean and, allowing a
    skewness of 10 of one block (measured: below 5), under 1e-6. Power: the V-statistic, the nearest
    biased estimate, lies more than 12 errors off, so would pass with probability below 1e-8."""
    blocks, size = 5_000, 4
    mean_a, root_a = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64) / 2
    mean_b = mean_a + shift
    root_b = root_a + shift * torch.tensor([[1.0, 0.0], [0.5, 0.2]], dtype=torch.float64)
    a, b = mean_a + noise(blocks * size, 2) @ root_a.T, mean_b + noise(blocks * size, 2, seed=1) @ root_b.T
    gaussian_a, gaussian_b = (mean_a, root_a), (mean_b, root_b)
    truth = (
        polynomial_mean(*gaussian_a, *gaussian_a)
        + polynomial_mean(*gaussian_b, *gaussian_b)
        - 2 * polynomial_mean(*gaussian_a, *gaussian_b)
    )

    mean, stderr = kernel(a, b, blocks=blocks)
    assert abs(mean - truth) < 6 * stderr
    diagonal = sum(((r.square().sum(1) / 2 + 1) ** 3).mean() - polynomial_mean(*gaussian, *gaussian)
                   for r, gaussian in ((a, gaussian_a), (b, gaussian_b)))  # fmt: skip
    assert diagonal / size > 12 * stderr


def test_kernel_error_is_the_spread_of_the_mean():
    """The mean over 200 fresh sets spreads as the stated error: χ² with 199 degrees, kept within a
    factor 1.4 of the deviation; under 1e-9 by chance for normal means."""
    runs = [kernel(noise(200, 3, seed=2 * i), noise(200, 3, seed=2 * i + 1), blocks=20) for i in range(200)]
    means, errors = torch.tensor(runs).T
    assert 1 / 1.4 < means.std() / errors.square().mean().sqrt() < 1.4


def test_same_seed_same_number_and_the_global_generator_is_left_alone():
    a, b = noise(64, 3), noise(64, 3, seed=1)
    before = torch.get_rng_state()
    assert kernel(a, b, seed=3) == kernel(a, b, seed=3) != kernel(a, b, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_refusals():
    a = noise(10, 3)
    for bad in (a[0], a[:1], a[:, :2], a[:, :0]):
        with pytest.raises(DataError, match="SHAPE"):
            frechet(a, bad)
    with pytest.raises(NonFiniteError):
        frechet(a, a * math.nan)
    with pytest.raises(ConfigError):
        kernel(a, a, blocks=1)
    with pytest.raises(DataError, match="FEW"):
        kernel(a, a, blocks=6)


def test_precision_by_hand():
    """Balls around 0, 1, 3, 7 that reach to the second nearest other row: radii 3, 2, 3, 6."""
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    samples = torch.tensor([[-3.0], [-3.1], [13.0], [13.1]])
    assert precision(samples, data, k=2) == 0.5
    assert precision(data, data, k=2) == 1
    with pytest.raises(DataError, match="4 rows have no 4 neighbours each"):
        precision(samples, data, k=4)


def test_rows_that_repeat_are_within_each_others_balls():
    """Radii of 0: rows that are equal but for rounding count as inside, and others do not."""
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randint(3, (50, 70), generator=g).double().repeat_interleave(4, 0)
        rows = rows[torch.randperm(200, generator=g)]
        assert precision(rows[:26].clone(), rows) == 1
    assert precision(rows + 1e-3, rows) == 0


def test_nearest_rows(monkeypatch):
    a, b = noise(50, 6), noise(40, 6, seed=1)
    pairwise = (a[:, None] - b).norm(dim=2)
    monkeypatch.setattr("undiffuse.evaluation.distances.CHUNK_DISTANCES", 130)  # three rows at a time
    values, indices = nearest(a, b, 3)
    torch.testing.assert_close(values, pairwise.sort(1).values[:, :3], rtol=1e-12, atol=0)
    assert torch.equal(indices, pairwise.sort(1).indices[:, :3])
    assert nearest(b, b)[0].abs().max() == 0
    assert nearest(a, b[:2], 5)[0].shape == (50, 2)


def test_the_jackknife_of_a_difference_of_means():
    """For a mean of equal groups it is the standard error of the group means, √(Σ (m_g − m)²/(G (G − 1)))."""
    a, b = noise(60, 1), noise(80, 1, seed=1)
    error = jackknife(lambda x, y: float(x.mean() - y.mean()), a, b)
    means = a.view(-1, 10).mean(0) - b.view(-1, 10).mean(0)
    assert error == pytest.approx(float(means.std()) / 10**0.5, rel=1e-9)
    with pytest.raises(DataError, match="19 rows are too few for 10 groups"):
        jackknife(lambda x, y: 0.0, a[:19], b)

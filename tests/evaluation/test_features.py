"""Feature extractors: their shapes and their exact values where those are known."""

import pytest
import torch

from undiffuse.errors import ConfigError
from undiffuse.evaluation.features import EXTRACTORS, default_extractor, get_extractor


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("shape", [(3, 8), (1, 9, 7), (2, 5, 4, 3)])
def test_features_are_a_function_of_each_item(name, shape):
    train, x = noise(100, *shape), noise(300, *shape, seed=1)
    extract = EXTRACTORS[name].build(train)
    rows = extract(x)
    assert rows.dtype == torch.float64
    assert rows.shape == (300, {"raw": x[0].numel(), "pca": min(64, x[0].numel()), "random_conv": 448}[name])
    torch.testing.assert_close(extract(x[7:9]), rows[7:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(EXTRACTORS[name].build(train)(x), rows, rtol=0, atol=0)
    assert rows.std(0).max() > 0.1


def test_raw_features_are_the_values():
    x = noise(5, 2, 3)
    assert torch.equal(get_extractor("raw").build(x)(x), x.flatten(1).double())


def test_principal_components_have_the_variances_of_the_data():
    """Data of 100 dimensions in a 70-dimensional subspace: 64 uncorrelated coordinates with the largest variances."""
    train = noise(500, 70) * torch.linspace(3, 0.1, 70) @ torch.linalg.qr(noise(100, 70, seed=1)).Q.T + 5
    rows = get_extractor("pca").build(train)(train)
    covariance = torch.cov(rows.T)
    spectrum = torch.linalg.eigvalsh(torch.cov(train.double().T)).flip(0)[:64]
    torch.testing.assert_close(covariance, spectrum.diag(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-5)


def test_random_convolutions_tell_textures_apart():
    """Stripes and noise of equal mean and variance are far apart, beside the spread of each."""
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(50, 1, 16, 16) + 0.01 * noise(50, 1, 16, 16)
    extract = get_extractor("random_conv").build(stripes)
    a, b = extract(stripes), extract(noise(50, 1, 16, 16, seed=1).sign())
    assert (a.mean(0) - b.mean(0)).norm() > 1.5 * (b - b.mean(0)).norm(dim=1).mean()


def test_the_default_and_unknown_names():
    assert [default_extractor(shape) for shape in ((2,), (1, 8, 8), (3, 32, 32))] == ["raw", "raw", "pca"]
    with pytest.raises(ConfigError, match="--features inception: no such extractor"):
        get_extractor("inception")
    with pytest.raises(ConfigError, match="random_conv needs images"):
        get_extractor("random_conv").build(noise(5, 4))

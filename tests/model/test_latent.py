"""The bound of latent diffusion against closed forms: a linear-Gaussian autoencoder with an exact prior."""

import itertools
import math

import numpy as np
import pytest
import torch
from latent_models import (
    exact_model,
    f64,
    linear_transform,
    prior_nll,
    tiny_autoencoder,
    tiny_latent_model,
)
from oracles import gaussian_kl

from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.errors import ConfigError
from undiffuse.likelihood.nll import concatenate
from undiffuse.model import checkpoint
from undiffuse.model.latent import LatentTransform

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=f64) * 1.5


def quadrature(points=24):
    """Noises (points², 2) and weights that integrate a polynomial against N(0, I) exactly."""
    nodes, weights = (torch.tensor(n, dtype=f64) for n in np.polynomial.hermite_e.hermegauss(points))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.cartesian_prod(weights, weights).prod(1)


@pytest.mark.parametrize("units", [Identity(), Standardized((0.2, -1.0, 3.0), (0.5, 2.0, 1.5))])
def test_the_exact_posterior_and_prior_give_log_p_itself(units):
    """−log p(x given z) + log q(z given x) − log p(z) is −log p(x) for every z, whatever the standardization."""
    transform = linear_transform(transform=units)
    values = units.to_data(X)
    for seed in range(3):
        eps = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)
        x, parts = transform.bound_terms(values, eps)
        bound = parts["reconstruction"] + parts["posterior"] + prior_nll(transform, x)
        exact = -transform.autoencoder.network.log_prob(X) - units.log_abs_det((3,))
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-12)


def test_otherwise_the_gap_is_the_kl_of_q_to_the_posterior():
    transform = linear_transform(shift=0.3, factor=0.6)
    eps, weights = quadrature()
    network = transform.autoencoder.network
    for x in X[:2]:
        z, parts = transform.bound_terms(x.expand(len(eps), -1), eps)
        bound = weights @ (parts["reconstruction"] + parts["posterior"] + prior_nll(transform, z))
        mean, var = network.posterior(x)
        kl = gaussian_kl(mean + 0.3, 0.6 * var, mean, var).sum()
        assert float(kl) > 0.1
        torch.testing.assert_close(bound, -network.log_prob(x) + kl, rtol=0, atol=1e-10)


def test_the_bound_of_a_model_is_log_p_itself():
    """With the flow's likelihood of z, to the integrator's tolerance; the determinant, log 3 + log 0.2, is −0.51."""
    transform = linear_transform()
    model, network = exact_model(transform), transform.autoencoder.network
    flow = model.nll(X, estimate="ode", mc_samples=1)
    torch.testing.assert_close(flow.total, -network.log_prob(X), rtol=0, atol=2e-4)
    assert list(flow.extra) == ["posterior", "reconstruction"]
    parts = flow.prior + flow.diffusion_nats + flow.decoder + flow.extra["reconstruction"] + flow.extra["posterior"]
    torch.testing.assert_close(flow.total, parts)


def test_importance_samples_tighten_the_bound_of_a_poor_encoder():
    """E[exp(−total)] = p(x) for any number of z, of 300 copies of an item; q has another mean and a larger variance.

    |z| < 6 (false alarm below 1e-8). One z costs the KL of 0.7 nats, eight less than a third of it.
    """
    model = exact_model(linear_transform(shift=0.3, factor=1.5))
    x = X[:1].expand(300, -1)
    log_p, gaps = model.transform.autoencoder.network.log_prob(X[:1]), {}
    for samples in (1, 8):
        nll = model.nll(x, estimate="ode", mc_samples=samples, batch=300)
        parts = nll.prior + nll.diffusion_nats + nll.decoder + nll.extra["reconstruction"] + nll.extra["posterior"]
        torch.testing.assert_close(nll.total, parts)
        gaps[samples] = gap = nll.total + log_p
        weights = torch.exp(-gap)
        assert abs(float(weights.mean()) - 1) < 6 * float(weights.std()) / math.sqrt(300)
        assert float(gap.mean()) > -6 * float(gap.std()) / math.sqrt(300)
    mean, var = model.transform.autoencoder.network.posterior(X[:1])
    kl, stderr = float(gaussian_kl(mean + 0.3, 1.5 * var, mean, var).sum()), float(gaps[1].std()) / math.sqrt(300)
    assert float(gaps[1].mean()) == pytest.approx(kl, abs=6 * stderr)
    assert float(gaps[8].mean()) < float(gaps[1].mean()) / 3


def test_items_have_noise_of_their_own_in_any_batch():
    model = exact_model(linear_transform())
    whole = model.nll(X, seed=3, estimate="continuous", mc_samples=2)
    parts = [model.nll(X[i : i + 2], seed=3, estimate="continuous", mc_samples=2, first=i) for i in (0, 2, 4)]
    assert torch.equal(concatenate(parts).total, whole.total)
    # the logarithm's last bit depends on the place in the batch on some processors
    torch.testing.assert_close(concatenate(parts).extra["posterior"], whole.extra["posterior"], rtol=1e-14, atol=1e-14)
    assert float(concatenate(parts).stderr) == float(whole.stderr)
    assert not torch.equal(model.nll(X, seed=4, estimate="continuous", mc_samples=2).total, whole.total)


@pytest.mark.parametrize("distribution", ["laplace", "gaussian"])
def test_probabilities_of_all_items_sum_to_at_most_one(distribution):
    """Three pixels of three values: Σ_x p(x given z) = 1, and Σ_x exp(−bound(x)) ≤ 1 with the mean over q exact."""
    transform = linear_transform(transform=IntegerLevels(3), shift=0.1)
    transform.autoencoder.config = type(transform.autoencoder.config)(distribution=distribution)
    items = torch.tensor(list(itertools.product(range(3), repeat=3)))
    for z in torch.randn(3, 2, dtype=f64, generator=torch.Generator().manual_seed(0)):
        x_hat = transform.decode(z.expand(len(items), -1))
        assert float(transform.autoencoder.log_prob(items, x_hat).exp().sum()) == pytest.approx(1, abs=1e-12)
    eps, weights = quadrature(12)
    total = 0.0
    for item in items:
        z, parts = transform.bound_terms(item.expand(len(eps), -1), eps)
        total += float(torch.exp(-weights @ (parts["reconstruction"] + parts["posterior"] + prior_nll(transform, z))))
    assert 0.4 < total < 1


def test_what_has_no_likelihood_is_refused_by_name():
    values = torch.randint(17, (2, 1, 8, 8))
    model = tiny_latent_model(distribution="none")
    with pytest.raises(ConfigError, match=r"NO_DECODER.*no distribution of x given z"):
        model.nll(values)
    model.transform.autoencoder.network.is_deterministic = True
    model.transform.autoencoder.network.encode = lambda x: (torch.zeros(len(x), 2, 4, 4), None)
    with pytest.raises(ConfigError, match=r"DETERMINISTIC.*autoencoder \(kl\) is deterministic"):
        model.nll(values)


def test_latents_are_standardized_and_decoded():
    autoencoder = tiny_autoencoder()
    transform = LatentTransform(autoencoder, (0.5, -1.0), (2.0, 0.25))
    values = torch.randint(17, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, _ = autoencoder.encode(transform.values.to_model(values))
    x = transform.to_model(values)
    torch.testing.assert_close(x[:, 0], (mean[:, 0] - 0.5) / 2)
    torch.testing.assert_close(x[:, 1], (mean[:, 1] + 1) / 0.25)
    torch.testing.assert_close(transform.decode(x), autoencoder.decode(mean))
    assert transform.to_data(x).dtype == torch.uint8
    assert (transform.edges(x), transform.log_abs_det((1, 8, 8))) == (None, 0.0)
    assert transform == LatentTransform(tiny_autoencoder(), (0.5, -1.0), (2.0, 0.25))
    assert transform != LatentTransform(tiny_autoencoder(seed=1), (0.5, -1.0), (2.0, 0.25))
    assert transform != LatentTransform(autoencoder, (0.5, -1.0), (2.0, 0.5))
    for mean, std in (((0.0,), (1.0,)), ((0.0, math.nan), (1.0, 1.0)), ((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (1.0,))):
        with pytest.raises(ConfigError, match="LATENTS"):
            transform.standardize(mean, std)


def test_a_latent_model_is_a_model(tmp_path):
    """Samples have the shape of items, the file is self-contained, and noise has the shape of z."""
    model = tiny_latent_model()
    assert (model.item_shape, model.x_shape, model.dims) == ((1, 8, 8), (2, 4, 4), 64)
    samples = model.sample(3, seed=1)
    assert samples.shape == (3, 1, 8, 8)
    checkpoint.save(model, tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.sample(3, seed=1), samples)
    assert checkpoint.fingerprint(loaded) == checkpoint.fingerprint(model)
    assert loaded.transform == model.transform
    assert torch.equal(loaded.nll(samples).total, model.nll(samples).total)
    assert loaded.from_noise(loaded.to_noise(samples)).shape == samples.shape
    assert not any("autoencoder" in name for name in model.state_dict())

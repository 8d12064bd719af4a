"""Variants by noise and back: their distribution on Gaussian data, both ends of the strength, and seeds."""

import pytest
import torch
from latent_models import exact_model, linear_transform, tiny_latent_model
from oracles import GaussianData

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.sdedit import sdedit, variant_levels
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise

NETWORK = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}
FLOW = {"name": "flow"}


def small(transform=None, shape=(1, 4, 4), schedule=FLOW, chain_length=1000, **network) -> Diffusion:
    torch.manual_seed(0)
    config = ModelConfig(network=NETWORK | network, schedule=schedule, chain_length=chain_length)
    model = Diffusion(config, shape, Identity() if transform is None else transform).double()
    with torch.no_grad():  # the network is zero at initialization
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
def test_variants_of_gaussian_data_have_the_mean_and_variance_of_the_flow(strength, monkeypatch):
    """(157), for each draw of the noise: mean and variance are those of a function that is linear in it."""
    model = small(shape=(1, 1, 2))
    m, c = torch.tensor([[[0.7, -0.4]]], dtype=torch.float64), torch.tensor([[[0.3, 1.5]]], dtype=torch.float64)
    data = GaussianData(m, c)
    monkeypatch.setattr(model, "denoiser", lambda: data.denoiser(model.schedule))
    x = torch.tensor([[[-0.5, 1.0]]], dtype=torch.float64)
    got = sdedit(model, x, 3, strength, seed=5, num_steps=400)
    alpha, sigma = 1 - strength, strength
    V = alpha**2 * c + sigma**2
    eps = ItemNoise(5, range(3), (1, 1, 2))(1)[0].double()
    mean, std = m + alpha * torch.sqrt(c / V) * (x - m), sigma * torch.sqrt(c / V)
    torch.testing.assert_close(got, mean + std * eps, rtol=0, atol=8e-3)
    coarse = sdedit(model, x, 3, strength, seed=5, num_steps=200)  # the error is that of a solver of order 1
    fine_error, coarse_error = ((y - mean - std * eps).abs().max() for y in (got, coarse))
    assert 1.8 < float(coarse_error / fine_error) < 2.2


def test_strength_one_is_a_sample_and_a_small_one_returns_the_input():
    model = small()
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 4, 4)
    assert torch.equal(sdedit(model, x, 3, 1.0, seed=2), model.sample(3, seed=2, sampler="ddim"))
    torch.testing.assert_close(sdedit(model, x, 2, 1e-9, num_steps=3), x.expand(2, 1, 4, 4), rtol=0, atol=1e-6)
    levels = small(IntegerLevels(17), schedule={"name": "linear_log_snr", "high": 12.0})
    values = torch.arange(16).reshape(1, 1, 4, 4)
    variants = sdedit(levels, levels.transform.to_model(values)[0], 2, 1e-6)
    assert torch.equal(variants, values.expand(2, 1, 4, 4).to(variants.dtype))
    with pytest.raises(ConfigError, match="seed"):
        sdedit(model, x, 1, 0.5, seed=-1)
    with pytest.raises(ConfigError, match="n = 0"):
        sdedit(model, x, 0, 0.5)


def test_variants_depend_on_seed_and_number_alone():
    model = small(classes=3)
    x = torch.zeros(1, 4, 4)
    cond = Condition(label=torch.tensor([0, 1, 2, 0, 1]))
    done = []
    whole = sdedit(model, x, 5, 0.5, seed=1, num_steps=4, cond=cond)
    for batch in (1, 2):
        parts = sdedit(model, x, 5, 0.5, seed=1, num_steps=4, batch=batch, cond=cond, progress=done.append)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert sum(done) == 40
    assert not torch.allclose(sdedit(model, x, 5, 0.5, seed=2, num_steps=4, cond=cond), whole)
    assert not torch.allclose(sdedit(model, x, 5, 0.5, seed=1, num_steps=4), whole)


def test_a_model_of_latents_starts_from_the_mean_of_q():
    """A strength of almost 0 returns what the decoder makes of it."""
    model, x = exact_model(linear_transform()), torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    expected = model.transform.to_data(model.transform.to_model(x[None], torch.float64))
    assert float((expected - x).abs().max()) > 0.1
    torch.testing.assert_close(sdedit(model, x, 2, 0.01, num_steps=2), expected.expand(2, -1), rtol=0, atol=0.01)


def test_variants_of_latents_are_decoded_batch_by_batch(monkeypatch):
    model, decoded = tiny_latent_model(), []
    decode = model.transform.autoencoder.decode
    monkeypatch.setattr(model.transform.autoencoder, "decode", lambda z: decoded.append(len(z)) or decode(z))
    assert len(sdedit(model, torch.zeros(1, 8, 8), 5, 0.5, num_steps=2, batch=2)) == 5
    assert decoded == [2, 2, 1]


def test_times_of_tables_and_of_distilled_models():
    table = small(schedule={"name": "linear", "T": 20}, chain_length=20)
    for strength, steps, expected in (
        (0.5, 4, [10, 8, 5, 3, 0]),
        (0.2, 100, [4, 3, 2, 1, 0]),
        (0.01, None, [1, 0]),
        (0.5, 1, [10, 0]),
    ):
        times = [float(level.t) * 20 for level in variant_levels(table, strength, steps)]
        assert times == pytest.approx(expected)
    config = ModelConfig(network=NETWORK, schedule={"name": "linear_log_snr", "high": 8.0}, calls=2)
    distilled = Diffusion(config, (1, 4, 4), Identity())
    times = [float(level.t) for level in variant_levels(distilled, 0.5)]
    assert times == pytest.approx([t / 2 for t in distilled.default_sampler.times])
    config = ModelConfig(network=NETWORK, schedule={"name": "linear", "T": 20}, chain_length=20, calls=3)
    distilled = Diffusion(config, (1, 4, 4), Identity())
    times = [float(level.t) for level in variant_levels(distilled, 0.5, 20)]
    assert times == pytest.approx([t / 2 for t in distilled.default_sampler.times])
    for strength in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="STRENGTH"):
            variant_levels(table, strength)

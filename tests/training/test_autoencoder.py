"""Training autoencoders: a task like any other, whose loss is a bound where its weights make it one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_models import KL, tiny_autoencoder
from oracles import gaussian_kl
from tiny_run import checkpoint_hashes, stopping_at

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model import checkpoint
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.own_output import described_picture, is_marked_picture
from undiffuse.training.autoencoder_task import AutoencoderRecipe, AutoencoderTask, fit_autoencoder

IMAGES = from_array(np.random.default_rng(0).integers(17, size=(40, 1, 8, 8)), num_values=17, name="tiny")
VALUES = torch.from_numpy(IMAGES.values[:4])
SETTINGS = {"precision": "float32", "held_out": 0.2, "previews": 1, "snapshots": 0, "seed": 4, "flip": True}
RECIPE = AutoencoderRecipe(AutoencoderConfig(KL), TrainConfig(batch=12, max_steps=5, warmup=2, lr=0.01, **SETTINGS))


def fit(folder, data=IMAGES, recipe=RECIPE):
    return fit_autoencoder(recipe, data, folder, device="cpu", quiet=True)


def test_a_stopped_run_resumes_to_the_bit(tmp_path):
    with stopping_at(2):
        fit(tmp_path / "stopped")
    fit(tmp_path / "stopped")
    fit(tmp_path / "straight")
    assert checkpoint_hashes(tmp_path / "stopped", 5) == checkpoint_hashes(tmp_path / "straight", 5)
    trained = autoencoders.load(tmp_path / "straight")
    assert not torch.equal(trained.log_scale, torch.full((1,), -2.0))
    path = tmp_path / "straight" / "pictures" / "reconstructions.png"
    assert is_marked_picture(path)
    picture, words = described_picture(path)
    assert picture.size[1] > picture.size[0]
    assert words == "Items and their reconstructions"
    with pytest.raises(CheckpointError, match=r"KIND.*autoencoder, not a diffusion model"):
        checkpoint.load(tmp_path / "straight")


def test_images_of_more_than_256_values(tmp_path):
    """They are uint16, which torch does not join with other types."""
    deep = from_array(np.random.default_rng(0).integers(1000, size=(40, 1, 8, 8)), num_values=1000, name="deep")
    assert deep.values.dtype == np.uint16
    assert (fit(tmp_path / "run", deep) / "pictures" / "reconstructions.png").is_file()


def test_the_loss_is_the_bound_of_the_autoencoder_with_weight_1():
    """(−log p(x given z) + w KL)/dims, by hand; with l1, Σ |x − x̂| in place of the first term."""
    autoencoder = tiny_autoencoder(reconstruction="nll", kl_weight=0.7)
    eps = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x = autoencoder.transform.to_model(VALUES)
    mean, log_var = autoencoder.encode(x)
    x_hat = autoencoder.decode(mean + torch.exp(log_var / 2) * eps)
    kl = gaussian_kl(mean, log_var.exp(), torch.zeros(()), torch.ones(())).flatten(1).sum(1)
    loss = (-autoencoder.log_prob(VALUES, x_hat) + 0.7 * kl) / 64
    torch.testing.assert_close(autoencoder.loss(VALUES, eps), loss.float())
    torch.testing.assert_close(autoencoder.loss(VALUES[:1], eps[:1]), loss[:1].float())
    l1 = tiny_autoencoder(kl_weight=0.7)
    loss = ((x - x_hat).abs().flatten(1).sum(1) + 0.7 * kl) / 64
    torch.testing.assert_close(l1.loss(VALUES, eps), loss)


def test_with_l1_the_scale_learns_and_the_decoder_does_not_see_it():
    """The gradient of the scale is that of −log p(x given z); that of the decoder is that of the L1 loss alone."""
    eps = torch.zeros(4, 2, 4, 4)
    autoencoder = tiny_autoencoder(kl_weight=0.0)
    autoencoder.loss(VALUES, eps).sum().backward()
    weight = autoencoder.network.decoder.conv_out.weight
    own, scale = weight.grad.clone(), autoencoder.log_scale.grad.clone()
    autoencoder.zero_grad()
    x = autoencoder.transform.to_model(VALUES)
    x_hat = autoencoder.decode(autoencoder.encode(x)[0])
    ((x - x_hat).abs().sum() / 64).backward()
    torch.testing.assert_close(own, weight.grad)
    (-autoencoder.log_prob(VALUES, x_hat.detach()).sum() / 64).backward()
    torch.testing.assert_close(scale, autoencoder.log_scale.grad)


@pytest.mark.parametrize("distribution", ["none", "laplace", "gaussian"])
def test_the_fitted_scale_is_that_of_maximal_likelihood(distribution):
    """For continuous data its gradient is zero; what had no distribution becomes a Laplace distribution."""
    values = torch.randn(10, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = Autoencoder(AutoencoderConfig(KL, distribution=distribution), (2, 8, 8), Identity())
    fitted = plain.with_fitted_scale(values, batch=3)
    assert fitted.config.distribution == ("laplace" if distribution == "none" else distribution)
    x_hat = fitted.decode(fitted.encode(values)[0]).detach()
    (gradient,) = torch.autograd.grad(fitted.log_prob(values, x_hat).sum(), fitted.log_scale)
    torch.testing.assert_close(gradient, torch.zeros(2), rtol=0, atol=2e-3)
    assert torch.equal(plain.log_scale, torch.full((2,), -2.0))


@torch.no_grad()
def test_the_numbers_of_an_evaluation():
    task = AutoencoderTask(RECIPE)
    torch.manual_seed(0)
    model = task.build_model(IMAGES, IMAGES.split(0.2)).eval()
    numbers = task.evaluate(model, IMAGES, IMAGES.split(0.2), False, TimeLimit()).numbers
    values = torch.from_numpy(IMAGES.values[IMAGES.split(0.2).validation])
    x = model.transform.to_model(values)
    mean, log_var = model.encode(x)
    kl = gaussian_kl(mean, log_var.exp(), torch.zeros(()), torch.ones(())).sum() / len(x) / 64 / np.log(2)
    assert numbers["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert numbers["items"] == len(x)
    assert 0 < numbers["l1"] < 2
    assert 2 < numbers["reconstruction"] < 40
    model.decode = lambda z: torch.full_like(x[: len(z)], 9.0)  # shown as the largest value, which is x = 1
    shown = task.evaluate(model, IMAGES, IMAGES.split(0.2), False, TimeLimit()).numbers["l1"]
    assert shown == pytest.approx(float((1 - x).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "cauchy"}, r"model.distribution = 'cauchy'"),
        ({"reconstruction": "l2"}, r"model.reconstruction = 'l2'"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"network": {"kind": "vq"}}, "no autoencoder 'vq'"),
        ({"network": {"kind": "kl", "widths": []}}, "widths"),
        ({"network": {"kind": "kl", "width": 3}}, "no such setting"),
        ({"network": {"kind": "kl", "widths": [8, 8, 8, 8, 8]}}, "divided by the factor 16"),
    ],
)
def test_recipes_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Autoencoder(replace(AutoencoderConfig(), **settings), (1, 8, 8), tiny_autoencoder().transform)


def test_vectors_are_refused(tmp_path):
    vectors = from_array(np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), name="vectors")
    with pytest.raises(ConfigError, match=r"SHAPE.*vectors have no sides"):
        fit(tmp_path / "run", vectors, replace(RECIPE, train=replace(RECIPE.train, flip=False)))
    assert not (tmp_path / "run").exists()


def test_a_program_of_float64_by_default_loads_float32(tmp_path):
    autoencoders.save(tiny_autoencoder(), tmp_path / "ae.safetensors")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = autoencoders.load(tmp_path / "ae.safetensors")
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.dtype == torch.float32
    assert autoencoders.fingerprint(loaded) == autoencoders.fingerprint(tiny_autoencoder())


def test_a_file_that_is_damaged_or_something_else(tmp_path):
    path = tmp_path / "ae.safetensors"
    autoencoders.save(tiny_autoencoder(), path)
    assert autoencoders.fingerprint(autoencoders.load(path)) == autoencoders.fingerprint(tiny_autoencoder())
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="DAMAGED"):
        autoencoders.load(path)
    with pytest.raises(CheckpointError, match="NOT_FOUND"):
        autoencoders.load(tmp_path / "nothing")

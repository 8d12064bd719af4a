import math
from dataclasses import replace

import pytest
import torch

from undiffuse import loss as losses
from undiffuse import presets, solvers
from undiffuse.codec import Identity, Pixels
from undiffuse.config import Config, ModelConfig, TrainConfig, from_dict, to_dict
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError

SHAPES = {
    "digits": (1, 8, 8),
    "cpu-small": (1, 16, 16),
    "likelihood": (1, 8, 8),
    "gpu": (3, 8, 8),
    "ddpm-cifar10": (3, 32, 32),
    "sohl-dickstein": (1, 8, 8),
    "ncsn": (1, 8, 8),
    "vdm": (1, 8, 8),
    "vector": (2,),
    "series": (2, 8),
    "volume": (1, 4, 4, 4),
}


def values(shape, levels, n=2):
    g = torch.Generator().manual_seed(0)
    if levels is None:
        return torch.randn(n, *shape, generator=g)
    return torch.randint(levels, (n, *shape), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_a_model_with_a_finite_loss_and_bound(name):
    shape = SHAPES[name]
    levels = 17 if len(shape) == 3 else None
    recipe = presets.fitted(presets.get(name), levels)
    assert to_dict(from_dict(Config, to_dict(recipe))) == to_dict(recipe)  # where a tuple is a list
    torch.manual_seed(0)
    model = Diffusion(recipe.model, shape, Identity() if levels is None else Pixels(levels)).eval()
    data = values(shape, levels)
    eps = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model.loss(data, torch.tensor([0.1, 0.9]), eps)
    assert loss.shape == (2,)
    assert torch.isfinite(loss).all()
    bound = model.nll(data, draws=2)
    assert (bound.calls, bound.total.shape) == (2, (2,))
    assert torch.isfinite(bound.total).all()
    if name == "ddpm-cifar10":
        assert sum(p.numel() for p in model.network.parameters()) == 35_746_307


def test_ho_et_al():
    recipe = presets.get("ddpm-cifar10")
    model, train = recipe.model, recipe.train
    assert model == ModelConfig(
        network={"kind": "unet", "widths": (128, 256, 256, 256), "blocks": 2, "attention": (1,)}
        | {"heads": 1, "dropout": 0.1},
        schedule={"name": "linear", "T": 1000},
        target={"name": "eps"},
        weight={"name": "simple"},
        times={"name": "steps"},
        preconditioning={"scale": "none", "time": "step"},
        steps=1000,
        loss="matching",
        variance="large",
    )
    assert (train.batch, train.lr, train.steps, train.warmup, train.decay) == (128, 2e-4, 800_000, 5000, 0.0)
    assert (train.clip, train.betas, train.flip, train.weight_decay) == (1.0, (0.9, 0.999), True, 0.0)


def test_song_and_ermon():
    """Ten levels from 1 to 0.01 of their units, where data are in [0, 1], and 100 updates at each."""
    recipe = presets.get("ncsn").model
    model = Diffusion(recipe, (1, 8, 8), Pixels(17))
    sigmas = [float(level.sigma) for level in model.levels]
    assert sigmas[1:] == pytest.approx([2 * 0.01 ** (k / 9) for k in range(10)], rel=1e-4)
    assert solvers.build("annealed_langevin").calls == 100
    x, eps = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    t = model.schedule(model.times.sample(torch.tensor([0.0, 0.5, 1.0])))
    w = model.target.weight(model.weight(t), t)  # λ(σ) = σ² on the score [Song19 §4.2]
    torch.testing.assert_close(w, t.sigma**2)
    assert (float(t.sigma[0]), float(t.sigma[2])) == (pytest.approx(sigmas[-1]), pytest.approx(sigmas[0]))
    y = torch.zeros_like(x)  # what a network says before it is trained
    torch.testing.assert_close(losses.matching(y, model.target, x, eps, model.weight(t), t), torch.ones(3))


def test_a_sample_by_annealed_langevin():
    small = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    model = Diffusion(replace(presets.get("ncsn").model, network=small), (1, 4, 4), Pixels(17))
    data = values((1, 4, 4), 17)
    loss = model.loss(data, torch.tensor([0.0, 0.7]), torch.ones(2, 1, 4, 4))
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    samples = model.sample(2, solver="annealed_langevin", steps=2)
    assert (samples.shape, samples.dtype, len(calls)) == (data.shape, torch.uint8, 2 * 100)


def test_sohl_dickstein_et_al():
    model = presets.get("sohl-dickstein").model
    assert (model.loss, model.variance, model.steps, model.times) == ("bound", "learned", 1000, {"name": "steps"})


def test_kingma_et_al():
    """What is trained is the bound in continuous time; network, shape and ends have gradients, from the fitted end."""
    recipe = presets.fitted(presets.get("vdm"), 17)
    assert recipe.model.network["fourier"]
    model = Diffusion(recipe.model, (1, 8, 8), Pixels(17))
    assert float(model.levels[-1].log_snr) == presets.clean_end(17)
    data, u, eps = values((1, 8, 8), 17), torch.tensor([0.1, 0.9]), torch.randn(2, 1, 8, 8)
    model.loss(data, u, eps).mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (model.network.leave.bias, *model.schedule.parameters()))


@pytest.mark.parametrize(
    ("shape", "device", "name"),
    [
        ((2,), "cpu", "vector"),
        ((784,), "cuda", "vector"),
        ((3, 200), "cpu", "series"),
        ((1, 16, 16, 16), "cuda", "volume"),
        ((1, 8, 8), "cpu", "digits"),
        ((1, 8, 8), "cuda", "digits"),
        ((3, 12, 12), "cpu", "digits"),
        ((1, 12, 13), "cpu", "cpu-small"),
        ((1, 28, 28), "cpu", "cpu-small"),
        ((1, 28, 28), "cuda", "gpu"),
    ],
)
def test_choice_by_shape(shape, device, name):
    assert presets.choose(shape, 256, device) == name


def test_the_clean_end_goes_with_the_width_of_a_bin():
    assert presets.clean_end(256) == 13.3
    for levels in (2, 17, 1024, 65536):
        assert presets.clean_end(levels) == pytest.approx(13.3 + 2 * math.log(levels / 256), abs=5e-4)
    recipe = Config(ModelConfig(steps=7), TrainConfig(batch=3))
    fitted = presets.fitted(recipe, 17)
    assert fitted.model.schedule == {"name": "linear_log_snr", "high": presets.clean_end(17)}
    assert (fitted.model.steps, fitted.train) == (7, recipe.train)
    assert presets.fitted(fitted, 256) == fitted  # what is asked for stays
    assert presets.fitted(recipe, None) == recipe
    table = Config(ModelConfig(schedule={"name": "cosine"}))
    assert presets.fitted(table, 17) == table


def test_unknown():
    with pytest.raises(ConfigError, match=r"^error\[PRESET\] 'best': no such preset. Use one of digits, cpu-small, "):
        presets.get("best")

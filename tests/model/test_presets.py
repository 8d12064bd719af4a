import math
import subprocess
import sys
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model import losses, presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig, from_dict, to_dict
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.clean_end import clean_end
from undiffuse.sampling import solvers
from undiffuse.sampling.sampler import Sampler

SHAPES = {
    "digits": (1, 8, 8),
    "cpu-small": (1, 16, 16),
    "likelihood": (1, 8, 8),
    "gpu": (3, 8, 8),
    "ddpm-cifar10": (3, 8, 8),
    "adm": (1, 8, 8),
    "sohl-dickstein": (1, 8, 8),
    "ncsn": (1, 8, 8),
    "vdm": (1, 8, 8),
    "vector": (2,),
    "series": (2, 8),
    "volume": (1, 4, 4, 4),
}


def values(shape, num_values, n=2):
    g = torch.Generator().manual_seed(0)
    if num_values is None:
        return torch.randn(n, *shape, generator=g)
    return torch.randint(num_values, (n, *shape), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_a_model_with_a_finite_loss_and_bound(name):
    shape = SHAPES[name]
    num_values = 17 if len(shape) == 3 else None
    recipe = presets.adapt_to_data(presets.get(name), num_values)
    assert to_dict(from_dict(Config, to_dict(recipe))) == to_dict(recipe)  # tuples became lists
    torch.manual_seed(0)
    model = Diffusion(recipe.model, shape, Identity() if num_values is None else IntegerLevels(num_values)).eval()
    data = values(shape, num_values)
    eps = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model.loss(data, torch.tensor([0.1, 0.9]), eps)
    assert loss.shape == (2,)
    assert torch.isfinite(loss).all()
    bound = model.nll(data, mc_samples=2)
    decoder_calls = recipe.model.output == "categorical" or float(model.chain[-1].sigma) == 0
    assert (bound.calls, bound.total.shape) == (2 + decoder_calls, (2,))
    assert torch.isfinite(bound.total).all()


def test_the_recipe_of_ho_et_al():
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
        chain_length=1000,
        loss="weighted_mse",
        variance="large",
    )
    assert (train.batch, train.lr, train.max_steps, train.warmup, train.decay) == (128, 2e-4, 800_000, 5000, 0.0)
    assert (train.clip, train.betas, train.flip, train.weight_decay) == (1.0, (0.9, 0.999), True, 0.0)


def test_the_levels_of_song_and_ermon():
    """Ten levels from 1 to 0.01 in their units, with data in [0, 1], and 100 updates at each."""
    recipe = presets.get("ncsn").model
    model = Diffusion(recipe, (1, 8, 8), IntegerLevels(17))
    sigmas = [float(level.sigma) for level in model.chain]
    assert sigmas[1:] == pytest.approx([2 * 0.01 ** (k / 9) for k in range(10)], rel=1e-4)
    assert solvers.build("annealed_langevin").calls == 100
    x, eps = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    t = model.schedule(model.times.sample(torch.tensor([0.0, 0.5, 1.0])))
    w = model.target.weight(model.weight(t), t)  # λ(σ) = σ² on the score [Song19 §4.2]
    torch.testing.assert_close(w, t.sigma**2)
    assert (float(t.sigma[0]), float(t.sigma[2])) == (pytest.approx(sigmas[-1]), pytest.approx(sigmas[0]))
    y = torch.zeros_like(x)  # the output of an untrained network
    torch.testing.assert_close(losses.weighted_mse(y, model.target, x, eps, model.weight(t), t), torch.ones(3))


def test_samples_of_ncsn_by_annealed_langevin():
    small = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    model = Diffusion(replace(presets.get("ncsn").model, network=small), (1, 4, 4), IntegerLevels(17))
    data = values((1, 4, 4), 17)
    loss = model.loss(data, torch.tensor([0.0, 0.7]), torch.ones(2, 1, 4, 4))
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    samples = model.sample(2, sampler=Sampler("annealed_langevin", num_steps=2))
    assert (samples.shape, samples.dtype, len(calls)) == (data.shape, torch.uint8, 2 * 100)


def test_the_recipe_of_sohl_dickstein_et_al():
    model = presets.get("sohl-dickstein").model
    chosen = (model.loss, model.variance, model.chain_length, model.times)
    assert chosen == ("bound", "learned", 1000, {"name": "steps"})


def test_vdm_trains_network_and_schedule_from_the_clean_end_of_the_data():
    recipe = presets.adapt_to_data(presets.get("vdm"), 17)
    assert recipe.model.network["fourier"]
    model = Diffusion(recipe.model, (1, 8, 8), IntegerLevels(17))
    assert float(model.chain[-1].log_snr) == clean_end(17)
    data, u, eps = values((1, 8, 8), 17), torch.tensor([0.1, 0.9]), torch.randn(2, 1, 8, 8)
    model.loss(data, u, eps).mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in (model.network.conv_out.bias, *model.schedule.parameters()))


@pytest.mark.parametrize(("name", "mean", "std"), [("cpu-small", -0.5, 1.5), ("likelihood", -1.2, 1.8)])
def test_the_training_noise_levels_of_images_are_those_of_a_truncated_normal(name, mean, std):
    model = Diffusion(presets.adapt_to_data(presets.get(name), 256).model, (1, 28, 28), IntegerLevels(256))
    normal = NormalDist(mean, std)
    low, high = (normal.cdf(-0.5 * float(model.schedule(torch.tensor([t])).log_snr)) for t in (0.0, 1.0))
    t = model.schedule(model.times.sample(torch.tensor([0.5])))
    assert float(-0.5 * t.log_snr) == pytest.approx(normal.inv_cdf((low + high) / 2), abs=1e-4)


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
        ((1, 28, 28), "cuda:1", "gpu"),
        ((1, 28, 28), "xpu", "gpu"),
    ],
)
def test_the_preset_for_a_shape(shape, device, name):
    assert presets.choose(shape, device) == name


def test_the_clean_end_follows_the_width_of_a_bin():
    assert clean_end(256) == 13.3
    for num_values in (2, 17, 1024, 65536):
        assert clean_end(num_values) == pytest.approx(13.3 + 2 * math.log(num_values / 256), abs=5e-4)
    recipe = Config(ModelConfig(chain_length=7), TrainConfig(batch=3))
    adapted = presets.adapt_to_data(recipe, 17)
    assert adapted.model.schedule == {"name": "linear_log_snr", "high": clean_end(17)}
    assert (adapted.model.chain_length, adapted.train) == (7, recipe.train)
    assert presets.adapt_to_data(adapted, 256) == adapted  # an end that is given stays
    assert presets.adapt_to_data(recipe, None) == recipe
    table = Config(ModelConfig(schedule={"name": "cosine"}))
    assert presets.adapt_to_data(table, 17) == table


@pytest.mark.parametrize("num_values", [None, 1025])
def test_a_categorical_output_needs_few_discrete_values(num_values):
    assert presets.adapt_to_data(presets.get("digits"), num_values).model.output == "values"


def test_a_conditional_recipe_accepts_the_conditions_of_the_data():
    sizes, plain = {"classes": 3, "vector": 2}, Config(ModelConfig())
    recipe = replace(plain, train=TrainConfig(conditional=True))
    assert presets.adapt_to_data(recipe, None, sizes).model.network == {"kind": "unet", **sizes}
    assert presets.adapt_to_data(plain, None, sizes) == plain
    other = replace(recipe, model=ModelConfig(network={"kind": "unet", "classes": 4}))
    with pytest.raises(ConfigError, match=r"model.network.classes = 4: the data make it 3. Leave it out"):
        presets.adapt_to_data(other, None, sizes)


@pytest.mark.parametrize("size", ["64", 64.0, True])
@pytest.mark.parametrize("name", ["text", "classes"])
def test_the_size_of_a_condition_is_a_whole_number(name, size):
    recipe = Config(ModelConfig(network={"kind": "unet", name: size}), TrainConfig(conditional=True))
    with pytest.raises(ConfigError, match=rf"model.network.{name} = {size!r}: the data make it 1. Leave it out"):
        presets.adapt_to_data(recipe, None, {name: 1})


def test_the_table_is_read_without_torch():
    code = "import sys; from undiffuse.model.presets import PRESETS; print(*PRESETS); assert 'torch' not in sys.modules"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == list(presets.PRESETS)


def test_an_unknown_preset():
    with pytest.raises(ConfigError, match=r"^error\[PRESET\] 'best': no such preset. Use one of digits, cpu-small, "):
        presets.get("best")

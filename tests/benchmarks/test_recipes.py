"""benchmarks/recipes: every row is a recipe of its own, with a network that exists."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import global_batch

from undiffuse.data.from_array import from_array
from undiffuse.model.config import TrainConfig, to_dict
from undiffuse.networks.registry import build

PATH = Path(__file__).parents[2] / "benchmarks" / "recipes"


@pytest.fixture(scope="module")
def recipes():
    loader = SourceFileLoader("recipes", str(PATH))
    module, paths = module_from_spec(spec_from_loader("recipes", loader)), list(sys.path)
    loader.exec_module(module)
    sys.path[:] = paths
    return module


def test_every_recipe_is_another_one_with_a_network_that_exists(recipes):
    seen = []
    for name in recipes.RECIPES:
        config = recipes.recipe(name, 5.0, 1)
        assert (config.train.minutes, config.train.seed) == (5.0, 1)
        assert to_dict(config) not in seen, name
        seen.append(to_dict(config))
        with torch.device("meta"):
            network = dict(config.model.network)
            build(network.pop("kind"), channels=1, dims=2, **network)


def test_later_changes_replace_earlier_ones(recipes):
    changes = {"train": {"lr": 1.0, "batch": 2}}, {"model": {"output": "values"}}, {"train": {"lr": 3.0}}
    assert recipes.merged(*changes) == {"train": {"lr": 3.0, "batch": 2}, "model": {"output": "values"}}


def test_settings_of_a_network_are_added_and_another_kind_replaces_it(recipes):
    preset = {"model": {"network": {"kind": "unet", "widths": (8,)}, "output": "values"}}
    other, dropout = {"kind": "dit", "width": 8}, recipes.unet(dropout=0.1)
    assert recipes.merged(preset, dropout)["model"]["network"] == {**preset["model"]["network"], "dropout": 0.1}
    assert recipes.merged(preset, {"model": {"network": other}}, dropout)["model"] == {
        "network": {**other, "dropout": 0.1},
        "output": "values",
    }
    assert recipes.recipe("dropout", 1.0, 0, "digits").model.network["widths"] == (32, 64)


def test_patches_change_the_times_and_the_noise_of_a_batch(recipes):
    data = from_array(np.random.default_rng(0).integers(256, size=(40, 1, 4, 4)).astype(np.uint8), num_values=256)
    settings = TrainConfig(batch=16, seed=1)

    def batch():
        return global_batch(data, np.arange(40), settings, 3)

    plain = batch()
    with recipes.independent_times():
        other = batch()
    assert torch.equal(other.u, batch().u) is False
    assert float(other.u.sort().values.diff().std()) > 10 * float(plain.u.sort().values.diff().std())
    with recipes.immiscible_noise():
        near = batch()
        noise = near.eps
    assert sorted(noise.flatten(1).tolist()) == sorted(plain.eps.flatten(1).tolist())
    x = 2 * plain.values.float() / 255 - 1
    assert float((x - noise).square().sum()) < 0.95 * float((x - plain.eps).square().sum())
    assert torch.equal(batch().eps, plain.eps)

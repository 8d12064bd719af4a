"""benchmarks/recipes: every row is a recipe of its own, with a network that exists."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import torch

from undiffuse.model.config import to_dict
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

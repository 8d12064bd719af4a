"""One rule from options to a recipe, for every command of training."""

from types import SimpleNamespace

import numpy as np
import pytest

from undiffuse.cli.recipe_options import RecipeOptions
from undiffuse.cli.train_autoencoder import recipe_for
from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError
from undiffuse.model.config import Config, to_dict
from undiffuse.training.autoencoder_task import AutoencoderRecipe

DATA = from_array(np.arange(160, dtype=np.uint8).reshape(10, 1, 4, 4), name="ten")
NEW = SimpleNamespace(record=None)
KINDS = {"diffusion": (Config, Config), "autoencoder": (AutoencoderRecipe, lambda: recipe_for("cpu"))}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[train]\nlr = 0.002\nbatch = 4\nmax_steps = 7\nseed = 5\n")
    return path


@pytest.mark.parametrize(("kind", "base"), KINDS.values(), ids=KINDS)
def test_an_option_comes_before_the_file_and_the_file_before_the_preset(kind, base, file):
    recipe, as_begun = RecipeOptions(lr=0.01, config=file).recipe(NEW, DATA, kind, base)
    train = recipe.train
    assert (as_begun, train.lr, train.batch, train.max_steps, train.minutes, train.seed) == (False, 0.01, 4, 7, None, 5)
    assert RecipeOptions(minutes=3.0, config=file).recipe(NEW, DATA, kind, base)[0].train.minutes == 3
    assert RecipeOptions(minutes=3.0, config=file).recipe(NEW, DATA, kind, base)[0].train.max_steps is None
    items = len(DATA.split(train.held_out).train)
    of_epochs = RecipeOptions(epochs=2.0, config=file).recipe(NEW, DATA, kind, base)[0].train.max_steps
    assert of_epochs == -(-2 * items // 4)
    assert RecipeOptions(seed=0, config=file).recipe(NEW, DATA, kind, base)[0].train.seed == 0
    plain = RecipeOptions().recipe(NEW, DATA, kind, base, default_minutes=5.0, on_nonfinite="skip")[0].train
    assert (plain.minutes, plain.max_steps, plain.on_nonfinite, plain.lr) == (5, None, "skip", base().train.lr)
    assert plain.seed == 0


@pytest.mark.parametrize(("kind", "base"), KINDS.values(), ids=KINDS)
def test_without_options_a_run_goes_on_as_it_began(kind, base, file):
    begun, _ = RecipeOptions(seed=3, config=file).recipe(NEW, DATA, kind, base)
    run = SimpleNamespace(record={"config": to_dict(begun)})
    assert RecipeOptions().recipe(run, DATA, kind, base) == (begun, True)
    for given in ({"lr": 0.01}, {"own": (None, 2)}, {"minutes": 1.0}):
        assert RecipeOptions(**given).recipe(run, DATA, kind, base)[1] is False


def test_an_extended_run_takes_a_length_alone():
    for options, others in ((RecipeOptions(lr=0.1), ()), (RecipeOptions(own=(2,)), ()), (RecipeOptions(), ("a",))):
        with pytest.raises(ConfigError, match="keeps the recipe that it began with"):
            options.extended(NEW, DATA, "cpu", Config, None, *others)


def test_a_length_is_given_once():
    with pytest.raises(ConfigError, match="--minutes, --epochs: each determines the length"):
        RecipeOptions(minutes=1.0, epochs=2.0)
    with pytest.raises(ConfigError, match="not a length"):
        RecipeOptions(epochs=0.0)

"""Training on images of low resolution with noise: batches, resuming, and that the image is used."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
import torch
from scipy import stats
from tiny_run import checkpoint_hashes, global_batch, stopping_at

from undiffuse.data.from_array import from_array
from undiffuse.data.stage_data import split_data
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.networks.condition import Condition
from undiffuse.training.batches import CLEAN_IMAGES, image_noise_std
from undiffuse.training.distillation_task import fit_distillation

IMAGES = tiny_run.data()
UNET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
SETTINGS = TrainConfig(
    batch=12, max_steps=4, warmup=2, precision="float32", held_out=0.2, previews=1, snapshots=0, flip=True, crop=1
)
RECIPE = Config(ModelConfig(UNET, {"name": "linear_log_snr", "high": 6.0}, chain_length=5), SETTINGS)


@pytest.mark.parametrize("name", ["mean", "haar"])
def test_values_and_image_of_a_batch_are_of_one_augmented_image(name):
    """The crop moves images by one pixel, across blocks: both parts are made of the moved image."""
    data = split_data(IMAGES, 2, name)
    items, quiet = data.split(0.2).train, replace(SETTINGS, image_noise=0.0)
    batch, full = global_batch(data, items, quiet, 3), global_batch(IMAGES, items, quiet, 3)
    low = data.resolution.low(full.values.numpy())
    assert torch.equal(batch.values, torch.from_numpy(data.resolution.rest(full.values.numpy())))
    assert torch.equal(batch.cond.image, IntegerLevels(5).to_model(torch.from_numpy(low)))
    assert torch.equal(batch.cond.image_level, torch.full((12,), math.inf))
    assert torch.equal(batch.u, full.u)
    assert batch.cond.label is None
    assert full.cond is None


def test_the_noise_of_images_is_a_function_of_seed_and_step():
    data, settings = split_data(IMAGES, 2), replace(SETTINGS, batch=32, conditional=True, condition_dropout=1.0)
    items = data.split(0.2).train
    a, again, other = (global_batch(data, items, settings, step).cond for step in (0, 0, 1))
    clean = global_batch(data, items, replace(settings, image_noise=0.0), 0).cond
    assert torch.equal(a.image, again.image)
    assert not torch.equal(a.image_level, other.image_level)
    std = torch.sigmoid(-a.image_level.double()).sqrt().float()[:, None, None, None]
    eps = (a.image - (1 - std**2).sqrt() * clean.image) / std
    assert torch.equal(a.image[std.flatten() == 0], clean.image[std.flatten() == 0])
    kept = eps[std.flatten() > 0].flatten().numpy()
    assert len(kept) > 80
    assert stats.kstest(kept, "norm").pvalue > 1e-6  # power: scaled by 2 fails with p < 1e-6
    assert stats.kstest(2 * kept, "norm").pvalue < 1e-4
    assert (a.label == -1).all()  # labels are dropped, the image is not


def test_a_tenth_of_the_images_has_no_noise_and_the_rest_any():
    std = image_noise_std(torch.linspace(0, 1, 1001)[:-1], 0.5)
    assert float((std == 0).float().mean()) == pytest.approx(CLEAN_IMAGES, abs=2e-3)
    assert float(std.max()) == pytest.approx(0.5, abs=1e-3)
    assert float(std[std > 0].mean()) == pytest.approx(0.25, abs=1e-3)


def test_noise_on_an_image_by_hand():
    cond = Condition(image=torch.tensor([[[0.5]], [[1.0]], [[-1.0]]]))
    noisy = cond.with_image_noise(torch.tensor([0.0, 0.6, 1.0]), torch.tensor([[[7.0]], [[2.0]], [[3.0]]]))
    torch.testing.assert_close(noisy.image.flatten(), torch.tensor([0.5, 0.8 + 1.2, 3.0]))
    assert noisy.image_level.tolist() == [math.inf, pytest.approx(math.log(0.64 / 0.36)), -math.inf]
    with pytest.raises(ConfigError, match=r"image_noise = 1\.5"):
        replace(SETTINGS, image_noise=1.5)


def test_a_stopped_run_resumes_to_the_bit(tmp_path):
    data = split_data(IMAGES, 2, "haar")
    with stopping_at(2):
        tiny_run.train(RECIPE, tmp_path / "stopped", data)
    for folder in ("stopped", "straight"):
        tiny_run.train(RECIPE, tmp_path / folder, data)
    assert checkpoint_hashes(tmp_path / "stopped", 4) == checkpoint_hashes(tmp_path / "straight", 4)
    model = checkpoint.load(tmp_path / "straight")
    assert model.condition_sizes == {"image": 1}
    assert model.info["stage"] == data.stage
    with pytest.raises(ConfigError, match=r"DISTILLED.*super-resolution.*the base"):
        fit_distillation(model, data, tmp_path / "distilled", SETTINGS)


def test_training_learns_to_use_the_image(tmp_path):
    """Images of one grey each: with its own image the bound is far below that with the image of another item."""
    greys = np.random.default_rng(0).integers(2, size=(60, 1, 1, 1)).repeat(4, 2).repeat(4, 3)
    data = split_data(from_array(greys, num_values=2, name="greys"), 2)
    train = replace(SETTINGS, max_steps=60, lr=0.02, held_out=0.0, flip=False, crop=0, batch=32)
    model = checkpoint.load(tiny_run.train(replace(RECIPE, train=train), tmp_path / "run", data))
    values, cond = torch.from_numpy(data.values[:32]), data.given_condition(np.arange(32), conditional=False)
    own = model.nll(values, cond=cond).total.mean()
    wrong = model.nll(values, cond=replace(cond, image=-cond.image)).total.mean()
    assert float(wrong - own) > 3.0

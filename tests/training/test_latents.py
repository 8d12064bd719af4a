"""Training on latents: packed posteriors, a fresh z at each use, runs that stop and resume."""

import shutil

import numpy as np
import pytest
import torch
from latent_models import tiny_autoencoder
from tiny_run import checkpoint_hashes, quick_looks, stopping_at

from undiffuse.cli.train import _print_next_commands
from undiffuse.data.from_array import from_array
from undiffuse.data.transform import MinMax, Standardized
from undiffuse.errors import CheckpointError, ConfigError, DataError
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.latent import LatentTransform
from undiffuse.training import distillation_task, latents
from undiffuse.training import fit as loop
from undiffuse.training.augmentation import FLIPS, augment
from undiffuse.training.diffusion_task import DiffusionTask, fit_diffusion
from undiffuse.training.distillation_task import fit_distillation
from undiffuse.training.run_folder import Run

IMAGES = from_array(np.random.default_rng(0).integers(17, size=(40, 1, 8, 8)), num_values=17, name="tiny")
SETTINGS = {"precision": "float32", "held_out": 0.2, "previews": 1, "snapshots": 0, "seed": 4}
NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
TRAIN = TrainConfig(batch=12, max_steps=5, warmup=2, lr=0.01, flip=True, **SETTINGS)
RECIPE = Config(ModelConfig(network=NETWORK, chain_length=5), TRAIN)


def fit(folder, recipe=RECIPE, data=IMAGES, autoencoder=None):
    return fit_diffusion(recipe, data, folder, device="cpu", quiet=True, autoencoder=autoencoder)


def reader_in(folder, settings=TRAIN, autoencoder=None):
    transform = LatentTransform(autoencoder or tiny_autoencoder())
    items = IMAGES.split(0.2).train
    read = latents.packed_reader(transform, transform.autoencoder, IMAGES, items, settings, folder, "cpu")
    return read.read, transform, items


def test_a_stopped_run_resumes_to_the_bit_and_packs_once(tmp_path, monkeypatch):
    """The recipe of a run names the autoencoder, and its folder holds it: a resumed run needs nothing else."""
    packed, write = [], latents._write_posteriors
    monkeypatch.setattr(latents, "_write_posteriors", lambda *a: (packed.append(a[0]), write(*a)))
    with stopping_at(2):
        fit(tmp_path / "stopped", autoencoder=tiny_autoencoder())
    task = DiffusionTask(RECIPE, autoencoder=tiny_autoencoder()).adapt(IMAGES, TRAIN)
    assert task.config.model.autoencoder == autoencoders.fingerprint(tiny_autoencoder())
    fit(tmp_path / "stopped", task.config)
    fit(tmp_path / "straight", autoencoder=tiny_autoencoder())
    assert len(packed) == 2
    assert checkpoint_hashes(tmp_path / "stopped", 5) == checkpoint_hashes(tmp_path / "straight", 5)
    one, other = (checkpoint.load(tmp_path / name) for name in ("stopped", "straight"))
    assert one.transform == other.transform
    shutil.rmtree(tmp_path / "stopped" / "latents")  # a file of its own
    assert torch.equal(checkpoint.load(tmp_path / "stopped").sample(2), other.sample(2))


def test_another_autoencoder_is_another_run(tmp_path):
    with stopping_at(1):
        fit(tmp_path / "run", autoencoder=tiny_autoencoder())
    with pytest.raises(ConfigError, match=r"RUN.*model.autoencoder was"):
        fit(tmp_path / "run", autoencoder=tiny_autoencoder(seed=1))
    task = DiffusionTask(RECIPE, autoencoder=tiny_autoencoder()).adapt(IMAGES, TRAIN)
    with pytest.raises(ConfigError, match=r"AUTOENCODER.*Give the autoencoder"):
        fit(tmp_path / "other", task.config)


def test_a_damaged_or_missing_autoencoder_is_one_line_and_the_run_goes_on_with_it_restored(tmp_path):
    """The run's own copy, without which a command that names none cannot resume."""
    config = DiffusionTask(RECIPE, autoencoder=tiny_autoencoder()).adapt(IMAGES, TRAIN).config
    with stopping_at(1):
        fit(tmp_path / "run", autoencoder=tiny_autoencoder())
    path = tmp_path / "run" / "latents" / "autoencoder.safetensors"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-2] ^= 1
    for damaged in (content[: len(content) // 2], bytes(flipped), b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            fit(tmp_path / "run", config)
        assert (error.value.where, len(str(error.value).splitlines())) == (str(path), 1)
    path.unlink()
    with pytest.raises(ConfigError, match=r"AUTOENCODER.*Give the autoencoder"):
        fit(tmp_path / "run", config)
    with quick_looks():
        fit(tmp_path / "run", config, autoencoder=tiny_autoencoder())
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_each_use_has_a_fresh_z_of_the_seed_and_the_step(tmp_path):
    read, _, items = reader_in(tmp_path)
    first = read(items[:12], TRAIN, 0)
    assert (first.shape, first.dtype) == ((12, 2, 4, 4), np.float32)
    assert np.array_equal(first, read(items[:12], TRAIN, 0))
    assert not np.array_equal(first, read(items[:12], TRAIN, 1))


def test_mirror_images_are_encoded_and_not_mirrored_latents(tmp_path):
    """With a variance of nothing z is the mean of q of the item, or of its mirror image, standardized."""
    autoencoder = tiny_autoencoder()
    torch.nn.init.zeros_(autoencoder.network.quant_conv.weight[2:].data)
    torch.nn.init.constant_(autoencoder.network.quant_conv.bias[2:].data, -30.0)
    settings = TrainConfig(flip=True, flip_vertical=True, batch=12, max_steps=1, seed=1)
    read, transform, items = reader_in(tmp_path, settings, autoencoder)
    chosen = items[:12]
    x, seen = read(chosen, settings, 3), set()
    values = torch.from_numpy(augment(IMAGES.values[chosen], settings, 3).copy())
    torch.testing.assert_close(torch.from_numpy(x), transform.to_model(values), rtol=0, atol=1e-4)
    for name in FLIPS:
        seen |= {(name, bool(on)) for on in latents.mirrored(name, settings, 3, 12)}
    assert len(seen) == 4  # both, for both


def test_latents_are_standardized_by_the_moments_of_z(tmp_path):
    """E z = 0 and E z² = 1 over items, mirror images, positions and q, in each channel, to rounding."""
    _, transform, items = reader_in(tmp_path)
    values = torch.from_numpy(IMAGES.values[items])
    mean, log_var = (torch.cat(pair).double() for pair in zip(
        transform.posterior(values), transform.posterior(values.flip(-1)), strict=True
    ))  # fmt: skip
    for channel in range(2):
        m, var = mean[:, channel], log_var[:, channel].exp()
        assert transform.mean[channel] == pytest.approx(float(m.mean()), abs=1e-6)
        assert transform.std[channel] == pytest.approx(float((m.var(correction=0) + var.mean()).sqrt()), rel=1e-5)


def test_what_is_packed_is_used_again_unless_it_is_damaged_or_of_something_else(tmp_path):
    read, transform, items = reader_in(tmp_path)
    path, expected = tmp_path / "latents" / "posteriors.npy", read(items[:3], TRAIN, 0)
    written = path.stat().st_mtime_ns
    again, other, _ = reader_in(tmp_path)
    assert path.stat().st_mtime_ns == written
    assert (other.mean, other.std) == (transform.mean, transform.std)
    assert np.array_equal(again(items[:3], TRAIN, 0), expected)
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    assert np.array_equal(reader_in(tmp_path)[0](items[:3], TRAIN, 0), expected)
    (tmp_path / "latents" / "latents.json").write_text("{}")
    assert np.array_equal(reader_in(tmp_path)[0](items[:3], TRAIN, 0), expected)
    assert not np.array_equal(
        reader_in(tmp_path, autoencoder=tiny_autoencoder(seed=1))[0](items[:3], TRAIN, 0), expected
    )


def test_what_is_packed_does_not_depend_on_the_fitted_scale(tmp_path):
    """It is fitted at each start, and rounds as the machine does."""
    given, items, written = tiny_autoencoder(distribution="none"), IMAGES.split(0.2).train, set()
    for part in (items[:4], items[4:8]):
        transform = LatentTransform(given.with_fitted_scale(IMAGES.tensor(part)))
        latents.packed_reader(transform, given, IMAGES, items, TRAIN, tmp_path, "cpu")
        written.add((tmp_path / "latents" / "posteriors.npy").stat().st_mtime_ns)
    assert len(written) == 1


def test_an_imported_autoencoder_standardizes_by_the_moments_of_the_training_part():
    data = from_array(np.random.default_rng(0).normal(5, 2, (40, 1, 8, 8)).astype(np.float32))
    autoencoder = tiny_autoencoder(distribution="none")
    autoencoder.transform = Standardized((0.0,), (1.0,))
    for info, moments in (({"imported": "TAESD"}, data.moments(data.split(0.2).train)), ({}, ((0.0,), (1.0,)))):
        autoencoder.info = info
        task = DiffusionTask(RECIPE, autoencoder=autoencoder).adapt(data, TRAIN)
        assert task.build_model(data, data.split(0.2)).transform.values == Standardized(*moments)
        assert autoencoder.transform == Standardized((0.0,), (1.0,))


def test_items_that_the_autoencoder_was_trained_on_are_not_held_out():
    autoencoder = tiny_autoencoder()
    autoencoder.info |= {"fingerprint": IMAGES.fingerprint, "held_out": 0.05}
    task = DiffusionTask(RECIPE, autoencoder=autoencoder)
    adapted, _, lines = loop.adapt_task(task, IMAGES, torch.device("cpu"))
    assert adapted.config.train.held_out == 0.05
    assert lines == ["note: held_out is 0.05, that of the autoencoder, which was trained on the other items"]


def test_data_that_do_not_fit_and_moving_are_refused(tmp_path):
    wrong = from_array(np.zeros((9, 1, 4, 4), np.uint8), num_values=17, name="wrong")
    with pytest.raises(DataError, match=r"1×4×4 with 17 possible values, those of the autoencoder 1×8×8"):
        fit(tmp_path / "run", data=wrong, autoencoder=tiny_autoencoder())
    moved = Config(RECIPE.model, TrainConfig(crop=1, max_steps=2, **SETTINGS))
    with pytest.raises(ConfigError, match=r"CROP.*encoded once"):
        fit(tmp_path / "run", moved, autoencoder=tiny_autoencoder())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("transform", "value_range", "cause"),
    [
        (MinMax(0.0, 1.0), None, "these data have no range of values, and those of the autoencoder the range 0 to 1"),
        (
            MinMax(0.0, 1.0),
            (0.0, 9.0),
            "these data have the range 0 to 9 of values, and those of the autoencoder the range 0 to 1",
        ),
        (
            Standardized((0.0,), (1.0,)),
            (0.0, 1.0),
            "these data have the range 0 to 1 of values, and those of the autoencoder no range",
        ),
    ],
)
def test_data_of_another_range_of_values_are_refused(transform, value_range, cause, tmp_path):
    """Every sample would be in the range of the autoencoder, or leave that of the data."""
    values = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    autoencoder = tiny_autoencoder()
    autoencoder.transform = transform
    with pytest.raises(DataError, match=rf"^error\[RANGE\] floats: {cause}"):
        latents.check_data(autoencoder, from_array(values, value_range=value_range, name="floats"), TRAIN)
    limits = (transform.low, transform.high) if isinstance(transform, MinMax) else None
    latents.check_data(autoencoder, from_array(values, value_range=limits, name="floats"), TRAIN)


def test_a_deterministic_encoder_trains_and_samples_without_a_likelihood(tmp_path, capsys):
    network = {"kind": "taesd", "width": 8, "latent_channels": 2, "blocks": [1, 1], "decoder_blocks": [1, 1]}
    torch.manual_seed(0)
    config = autoencoders.AutoencoderConfig(network, distribution="none")
    autoencoder = autoencoders.Autoencoder(config, (1, 8, 8), tiny_autoencoder().transform)
    model = checkpoint.load(fit(tmp_path / "run", autoencoder=autoencoder))
    assert model.transform.autoencoder.config.distribution == "laplace"  # fitted, of x given z
    assert model.sample(2).shape == (2, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"DETERMINISTIC.*\(taesd\)"):
        model.nll(torch.from_numpy(IMAGES.values[:2]))
    capsys.readouterr()
    _print_next_commands(Run(tmp_path / "run"), IMAGES, "", "")
    assert capsys.readouterr().out == f"next: undiffuse sample {tmp_path / 'run'}\n"  # evaluate would be an error


def test_a_latent_model_is_distilled(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 2)
    teacher = checkpoint.load(fit(tmp_path / "run", autoencoder=tiny_autoencoder()))
    settings = TrainConfig(batch=12, max_steps=2, warmup=1, lr=0.001, **SETTINGS)
    student = checkpoint.load(
        fit_distillation(teacher, IMAGES, tmp_path / "student", settings, device="cpu", quiet=True)
    )
    assert student.transform == teacher.transform
    assert student.sample(2).shape == (2, 1, 8, 8)

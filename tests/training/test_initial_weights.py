"""Fine-tuning: a run that starts from a model starts at its loss, whatever conditions or data are added."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from latent_models import tiny_autoencoder
from tiny_run import checkpoint_hashes, global_batch, quick_looks, save_only, stopping_at

from undiffuse.cli.distill import _settings_of as distillation_settings
from undiffuse.data.caption_embeddings import CaptionEmbeddings
from undiffuse.data.from_array import from_array
from undiffuse.data.stage_data import split_data
from undiffuse.data.transform import Standardized, transform_for
from undiffuse.errors import CheckpointError, ConfigError, DataError
from undiffuse.evaluation.plan import shared_condition
from undiffuse.model import checkpoint
from undiffuse.model.autoencoder import fingerprint
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.networks.condition import Condition
from undiffuse.training import fit as loop
from undiffuse.training import initial_weights
from undiffuse.training.diffusion_task import DiffusionTask, fit_diffusion
from undiffuse.training.distillation_task import fit_distillation
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(5, size=(40, 1, 4, 4))
LABELS = np.arange(40) % 3
DATA = from_array(IMAGES, num_values=5, name="images")
UNET = {"kind": "unet", "widths": (8, 8), "blocks": 1, "attention": (1,), "patch": 2, "fourier": (1, 2)}
MODEL = ModelConfig(network=UNET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5)
TRAIN = TrainConfig(
    batch=12, max_steps=3, warmup=0, lr=0.01, precision="float32", held_out=0.2, previews=1, snapshots=0
)


def build(data=DATA, model=MODEL, conditional=False, network=None, **network_settings) -> Diffusion:
    """A model of ``data`` whose weights are all random, also those that are zero at first."""
    model = replace(model, network={**model.network, **network_settings})
    config = Config(model, replace(TRAIN, conditional=conditional))
    torch.manual_seed(1)
    built = DiffusionTask(config, network).adapt(data, config.train).build_model(data, data.split(0.2))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def started(start, data, path="start", conditional=True, **settings):
    """(the model that a run on ``data`` starts with, the lines of its log)."""
    recipe = Config(start.config, replace(TRAIN, conditional=conditional, **settings))
    task = DiffusionTask(recipe).start_from(start, path)
    model = task.adapt(data, recipe.train).build_model(data, data.split(0.2))
    return model.eval(), task.load_initial_weights(model, start, path)


def losses(model, data, cond=None):
    values = torch.from_numpy(np.ascontiguousarray(data.values[:12]))
    g = torch.Generator().manual_seed(5)
    u, eps = torch.rand(12, generator=g, dtype=torch.float64), torch.randn(12, *model.x_shape, generator=g)
    with torch.no_grad():
        return model.loss(values, u, eps, cond=cond)


LABELLED = from_array(IMAGES, LABELS, num_values=5)
TEXTS = replace(DATA, captions=tuple(("red", "green", "blue")[i % 3 : i % 3 + 1] for i in range(40)))
ADDED = {
    "nothing": DATA,
    "labels": LABELLED,
    "vectors": from_array(IMAGES, num_values=5, cond=RNG.normal(3, 2, (40, 6)).astype(np.float32)),
    "tokens": from_array(IMAGES, num_values=5, cond=RNG.normal(size=(40, 3, 6)).astype(np.float32)),
    "captions": TEXTS,
    "captions and labels": replace(LABELLED, captions=TEXTS.captions),
    "another size": from_array(RNG.integers(5, size=(40, 1, 6, 8)), num_values=5),
    "an image": split_data(DATA, 2),
}


@pytest.mark.parametrize("name", ADDED)
def test_the_first_loss_is_that_of_the_model_also_with_new_conditions(name):
    """To rounding: a term of exactly zero is added, and a convolution sums zeros more."""
    data, start = ADDED[name], build()
    model, (note, *more) = started(start, data, conditional=bool(data.condition_sizes.keys() - {"image"}))
    cond = data.given_condition(np.arange(12), True) if data.condition_sizes else None
    before = losses(build(data) if name == "another size" else start, data)  # of the same seed, whatever the size
    torch.testing.assert_close(losses(model, data, cond), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(model, data), before, rtol=1e-5, atol=1e-6)
    assert more == []
    assert note.startswith("starts from start: ")
    assert ("new: nothing; left out: nothing" in note) == (name in ("nothing", "another size"))
    assert ("new: embed.label (1 tensor); left out: nothing" in note) == (name == "labels")
    if name == "nothing":
        assert torch.equal(losses(model, data), before)
    if name == "vectors":  # standardized by the moments of these data, which the model did not have
        mean = data.cond[data.split(0.2).train].mean(0)
        torch.testing.assert_close(model.network.embed.vector.mean, torch.from_numpy(mean))


@pytest.mark.parametrize(
    "given", [{"labels": LABELS}, {"cond": RNG.normal(size=(40, 6))}, {"cond": RNG.normal(size=(40, 2, 6))}]
)
def test_the_first_loss_of_vectors_with_new_conditions(given):
    given = {name: array.astype(np.float32) if name == "cond" else array for name, array in given.items()}
    values = RNG.normal(size=(40, 3)).astype(np.float32)
    start = build(from_array(values), ModelConfig(network={"kind": "mlp", "width": 8, "depth": 2}, chain_length=5))
    data = from_array(values, **given)
    model, notes = started(start, data)
    assert len(notes) == 1
    cond = data.condition(np.arange(12))
    torch.testing.assert_close(losses(model, data, cond), losses(start, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["labels", "vectors", "tokens", "captions", "an image"])
def test_what_is_new_learns(name):
    """The gradient at the first step reaches the end of what was added, and the output then depends on it."""
    data = ADDED[name]
    model, _ = started(build(), data, conditional=name != "an image")
    cond = data.given_condition(np.arange(12), True)
    values = torch.from_numpy(np.ascontiguousarray(data.values[:12]))
    u, eps = torch.linspace(0.1, 0.9, 12, dtype=torch.float64), torch.randn(values.shape, generator=torch.Generator())
    model.loss(values, u, eps, cond=cond).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * (0 if parameter.grad is None else parameter.grad))
    assert not torch.equal(losses(model, data, cond), losses(model, data))


def test_captions_that_join_tokens_change_the_attention_and_the_note_says_so():
    tokens = ADDED["tokens"]
    start = build(tokens, conditional=True)
    both = replace(tokens, captions=TEXTS.captions)
    _, (note, change) = started(start, both)
    assert "new: text" in note
    assert change.startswith("without a condition its first predictions differ from that model's, by 0.")


def test_classes_are_known_by_their_names_and_new_ones_start_as_none():
    old = replace(LABELLED, classes=("cat", "dog", "emu"))
    new = replace(from_array(IMAGES, np.arange(40) % 4, num_values=5), classes=("dog", "fox", "cat", "gnu"))
    start = build(old, conditional=True)
    model, (note,) = started(start, new)
    assert model.condition_sizes == {"classes": 4}
    assert "2 of 4 classes known by name" in note
    for label, was in {0: 1, 1: -1, 2: 0, 3: -1, -1: -1}.items():
        now, before = (losses(m, new, Condition(label=torch.full((12,), k))) for m, k in ((model, label), (start, was)))
        assert torch.equal(now, before)
    same, _ = started(start, old)
    cond = old.condition(np.arange(12))
    assert torch.equal(losses(same, old, cond), losses(start, old, cond))


def test_conditions_that_the_data_lack_stay_and_are_null():
    start = build(LABELLED, conditional=True)
    model, (note,) = started(start, DATA, conditional=False)
    assert "left out: nothing" in note
    assert torch.equal(losses(model, DATA), losses(start, DATA))


def test_a_run_without_conditions_keeps_the_network_and_gives_it_none():
    start = build(LABELLED, conditional=True)
    model, (note,) = started(start, LABELLED, conditional=False)
    assert "new: nothing; left out: nothing" in note
    assert torch.equal(losses(model, LABELLED), losses(start, LABELLED))


def test_a_learned_chain_goes_on_from_its_beta():
    chain = replace(MODEL, schedule={"name": "learned_chain", "T": 5}, loss="full_bound")
    start = build(model=chain)
    model, _ = started(start, DATA, conditional=False)
    assert torch.equal(model.schedule.beta, start.schedule.beta)
    assert torch.equal(losses(model, DATA), losses(start, DATA))


def test_continuous_data_keep_the_scale_of_the_model():
    old, new = (from_array(RNG.normal(m, s, (40, 3)).astype(np.float32)) for m, s in ((0, 1), (5, 3)))
    mlp = ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5)
    start = build(old, mlp)
    assert isinstance(start.transform, Standardized)
    model, (note,) = started(start, new, conditional=False)
    assert model.transform == start.transform
    assert "x is standardized by the moments of that model's data" in note
    assert torch.equal(losses(model, new), losses(start, new))


def test_integers_of_another_number_of_values():
    wider = from_array(RNG.integers(9, size=(40, 1, 4, 4)), num_values=9)
    start = build()
    model, (note,) = started(start, wider, conditional=False)
    assert "9 values in place of 5 values, both mapped to -1 to 1" in note
    assert model.transform == transform_for(wider)
    x, u, eps = torch.zeros(12, 1, 4, 4), torch.linspace(0.1, 0.9, 12).double(), torch.ones(12, 1, 4, 4)
    assert torch.equal(*(m.loss_of_x(x, u, eps).detach() for m in (model, start)))
    categorical = build(model=replace(MODEL, output="categorical"))
    with pytest.raises(DataError, match=r"INIT.*start predicts each of 5 values, and these data have 9 values"):
        started(categorical, wider, conditional=False)
    model, _ = started(categorical, DATA, conditional=False)
    assert torch.equal(losses(model, DATA), losses(categorical, DATA))


def test_latents_keep_their_autoencoder_and_its_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", save_only)
    images = from_array(RNG.integers(17, size=(40, 1, 8, 8)), num_values=17)
    other = from_array(RNG.integers(9, size=(40, 1, 8, 8)), num_values=17)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    recipe = Config(ModelConfig(network=network, chain_length=5), TRAIN)
    run = fit_diffusion(recipe, images, tmp_path / "run", "cpu", quiet=True, autoencoder=tiny_autoencoder())
    start = checkpoint.load(run)
    tuned = Config(start.config, replace_train(recipe, max_steps=1, lr=1e-12).train)
    first = checkpoint.load(fit_diffusion(tuned, other, tmp_path / "tuned", "cpu", init=run, quiet=True))
    assert first.transform == start.transform
    torch.testing.assert_close(losses(first, other), losses(start, other), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"INIT.*model\.autoencoder.*Leave out --autoencoder"):
        fit_diffusion(tuned, other, tmp_path / "x", "cpu", init=run, quiet=True, autoencoder=tiny_autoencoder(seed=1))


def test_the_autoencoder_of_a_start_may_be_given_with_its_fitted_scale():
    given = tiny_autoencoder(distribution="none")
    fitted, other = (
        given.with_fitted_scale(torch.from_numpy(RNG.integers(17, size=(4, 1, 8, 8)))),
        tiny_autoencoder(seed=1),
    )
    transform, name = LatentTransform(fitted, (0.0, 0.0), (1.0, 1.0)), fingerprint(given)
    start = SimpleNamespace(transform=transform, config=ModelConfig(autoencoder=name))
    assert name != fingerprint(fitted)
    assert initial_weights.autoencoder_fingerprint(fitted, start) == name
    assert initial_weights.autoencoder_fingerprint(other, start) == fingerprint(other)
    assert initial_weights.autoencoder_fingerprint(fitted, None) == fingerprint(fitted)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": {"name": "eps"}}, r'model\.target = \{"name": "eps"\}: the weights of start belong to .*"v"'),
        ({"schedule": {"name": "linear_log_snr", "high": 7.0}}, r"model\.schedule = .*7\.0.*6\.0"),
        ({"preconditioning": {"scale": "unit", "time": "log_snr"}}, r"model\.preconditioning"),
        ({"output": "categorical"}, r'model\.output = "categorical"'),
        ({"network": {**UNET, "widths": (8, 16)}}, r"model\.network\.widths = \[8, 16\].*\[8, 8\]"),
        ({"network": {**UNET, "heads": 2}}, r"model\.network\.heads = 2: .* a model with 1"),
        ({"loss": "hybrid", "variance": "learned"}, r'model\.variance = "learned"'),
    ],
)
def test_another_meaning_of_the_network_is_refused(change, error):
    start = build()
    recipe = Config(replace(MODEL, **change), TRAIN)
    with pytest.raises(ConfigError, match=rf"INIT\] {error}"):
        DiffusionTask(recipe).start_from(start, "start").adapt(DATA, TRAIN)


@pytest.mark.parametrize("change", [{"weight": {"name": "simple"}}, {"variance": "large"}, {"chain_length": 9}])
def test_another_loss_or_chain_is_accepted(change):
    task = DiffusionTask(Config(replace(MODEL, **change), TRAIN)).start_from(build(), "start").adapt(DATA, TRAIN)
    assert task.config.model == replace(MODEL, **change)


def test_a_chain_of_another_length_has_other_times_where_the_time_is_the_step():
    steps = replace(MODEL, preconditioning={"scale": "none", "time": "step"})
    with pytest.raises(ConfigError, match=r"model\.chain_length = 9"):
        DiffusionTask(Config(replace(steps, chain_length=9), TRAIN)).start_from(build(model=steps), "s").adapt(
            DATA, TRAIN
        )


def test_data_of_another_kind_are_refused():
    colour = from_array(RNG.integers(5, size=(40, 3, 4, 4)), num_values=5)
    shapes = r"the shape of the tensor 'conv_in.weight' is \(8, 20, 3, 3\) in start, and this run needs \(8, 60, 3, 3\)"
    with pytest.raises(CheckpointError, match=shapes):
        started(build(), colour, conditional=False)
    with pytest.raises(DataError, match=r"these are continuous values, and start models integers"):
        started(build(), from_array(RNG.normal(size=(40, 1, 4, 4)).astype(np.float32)), conditional=False)
    ranged = from_array(RNG.random((40, 1, 4, 4)).astype(np.float32), value_range=(0, 1))
    wider = from_array(RNG.random((40, 1, 4, 4)).astype(np.float32), value_range=(0, 2))
    with pytest.raises(DataError, match=r"start models values from 0 to 1, and these data have another range"):
        started(build(ranged), wider, conditional=False)
    vectors = from_array(IMAGES, num_values=5, cond=RNG.normal(size=(40, 4)).astype(np.float32))
    with pytest.raises(CheckpointError, match=r"'embed.vector.mean' is \(6,\) in start.* needs \(4,\)"):
        started(build(ADDED["vectors"], conditional=True), vectors)
    with pytest.raises(DataError, match=r"start enlarges images, and these data have no smaller ones"):
        started(build(ADDED["an image"]), DATA, conditional=False)
    embedded = build(ADDED["vectors"], conditional=True, tokens=5)
    embedded.info["text_encoder"] = {"name": "minilm", "digest": "0" * 64}
    with pytest.raises(
        DataError, match=r"TEXT_ENCODER.*the text encoder of these data is none, and that of start is minilm"
    ):
        started(embedded, ADDED["vectors"])


def test_a_text_encoder_is_known_by_its_digest_and_not_by_its_name():
    vectors, tokens = RNG.normal(size=(3, 2)).astype(np.float32), RNG.normal(size=(3, 1, 2)).astype(np.float16)
    encoder = {"name": "here", "digest": "1"}
    embeddings = CaptionEmbeddings(encoder, ("red", "green", "blue"), vectors, tokens, np.ones((3, 1), bool))
    data = replace(TEXTS, embeddings=embeddings)
    start = build(data, conditional=True)
    start.info["text_encoder"] = {"name": "there", "digest": "1"}
    assert started(start, data)[0].info["text_encoder"] == encoder
    start.info["text_encoder"] = {"name": "here", "digest": "2"}
    with pytest.raises(DataError, match="that of start is here or another version"):
        started(start, data)


def test_items_that_the_model_was_trained_on_are_not_held_out(tmp_path):
    """The smaller of the two shares, where the data are the same."""
    start = build()
    task = DiffusionTask(Config(MODEL, TRAIN)).start_from(start, "start")
    note = "note: held_out is {:g}, that of the model that it starts from, which was trained on the other items"
    for theirs, data, ours in ((0.05, DATA, 0.05), (0.0, DATA, 0.0), (0.3, DATA, 0.2), (0.05, ADDED["labels"], 0.2)):
        start.info["held_out"] = theirs
        adapted, _, lines = loop.adapt_task(task, data, torch.device("cpu"), start)
        assert adapted.config.train.held_out == ours
        assert lines == ([note.format(theirs)] if ours < 0.2 else [])
    start.info["held_out"] = 0.05
    start.info["name"] = ADDED["labels"].name  # these may be the data of the model, changed since
    assert loop.adapt_task(task, ADDED["labels"], torch.device("cpu"), start)[0].config.train.held_out == 0.05
    checkpoint.save(start, tmp_path / "start.safetensors")
    settings = {"quiet": True, "init": tmp_path / "start.safetensors"}
    with quick_looks():
        with stopping_at(1):
            fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", **settings)
        run = fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", quiet=True)  # from its copy
    assert (Run(run).record["config"]["train"]["held_out"], checkpoint.load(run).info["held_out"]) == (0.05, 0.05)


@pytest.mark.parametrize(
    ("method", "said"), [("consistency", "samples of the data and not their mean"), ("lagrangian", "of one time")]
)
def test_a_distilled_model_is_refused(method, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", save_only)
    run = fit_distillation(build(), DATA, tmp_path / "run", TRAIN, device="cpu", quiet=True, method=method)
    with pytest.raises(ConfigError, match=rf"DISTILLED.*{said}\. Give the model that it was distilled from"):
        fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "tuned", "cpu", init=run, quiet=True)


def test_a_run_keeps_a_copy_and_resumes_to_the_bit(tmp_path):
    """Stopped before its first checkpoint, and again later, without the weights that it started from."""
    checkpoint.save(build(LABELLED, conditional=True), tmp_path / "start.safetensors")
    recipe = Config(checkpoint.load(tmp_path / "start.safetensors").config, replace(TRAIN, conditional=True))
    other = from_array(IMAGES, np.arange(40) % 2, num_values=5)

    def train(name, **settings):
        return fit_diffusion(recipe, other, tmp_path / name, "cpu", quiet=True, **settings)

    with quick_looks():
        whole = train("whole", init=tmp_path / "start.safetensors")
        with stopping_at(0):
            train("run", init=tmp_path / "start.safetensors")
        (tmp_path / "start.safetensors").rename(tmp_path / "gone")
        with stopping_at(2):
            train("run")
        train("run", init=tmp_path / "start.safetensors")
        assert checkpoint_hashes(tmp_path / "run", 3) == checkpoint_hashes(whole, 3)
        facts = checkpoint.load(tmp_path / "run").info["init"]
        assert facts == {"weights": checkpoint.fingerprint(checkpoint.load(tmp_path / "gone")), "name": "array"}
        with pytest.raises(ConfigError, match=r"init was "):
            train("run", init=tmp_path / "run" / "model.safetensors")
        (tmp_path / "run" / "init.safetensors").write_bytes(b"damaged")
        with pytest.raises(
            CheckpointError, match=r"init.safetensors: the weights \w{12} that this run started from are"
        ):
            train("run")
        train("run", init=tmp_path / "gone")
    assert (tmp_path / "run" / "init.safetensors").read_bytes() == (tmp_path / "gone").read_bytes()


def test_a_run_that_began_without_weights_goes_on_without_them(tmp_path):
    """Resumed with --init by force; the weights are named in no record, and a missing file is reported."""
    checkpoint.save(build(), tmp_path / "start.safetensors")

    def train(name, **settings):
        return fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / name, "cpu", quiet=True, **settings)

    with quick_looks():
        whole = train("whole")
        with stopping_at(2):
            train("run")
        with pytest.raises(ConfigError, match=r"init was None, now"):
            train("run", init=tmp_path / "start.safetensors")
        with pytest.raises(CheckpointError, match=r"gone: no such file"):
            train("run", init=tmp_path / "gone", force=True)
        train("run", init=tmp_path / "start.safetensors", force=True)
    assert checkpoint.fingerprint(checkpoint.load(tmp_path / "run")) == checkpoint.fingerprint(checkpoint.load(whole))
    assert "init" not in checkpoint.load(tmp_path / "run").info
    assert not (tmp_path / "run" / "init.safetensors").exists()


def test_a_file_of_the_name_of_the_copy_is_not_replaced(tmp_path):
    checkpoint.save(build(), tmp_path / "start.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "init.safetensors").write_bytes(b"of the user")
    with pytest.raises(ConfigError, match=r"init.safetensors: this file exists already"):
        fit_diffusion(
            Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", quiet=True, init=tmp_path / "start.safetensors"
        )
    assert (tmp_path / "run" / "init.safetensors").read_bytes() == b"of the user"


def test_a_damaged_copy_is_written_anew_from_the_weights_that_are_named(tmp_path):
    """Its end is damaged, so that the fingerprint in its header is right."""
    checkpoint.save(build(), tmp_path / "start.safetensors")
    whole = (tmp_path / "start.safetensors").read_bytes()
    copy = tmp_path / "run" / "init.safetensors"
    settings = {"quiet": True, "init": tmp_path / "start.safetensors"}
    with quick_looks():
        with stopping_at(1):
            fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", **settings)
        copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=r"DAMAGED\] .*init.safetensors: its contents do not match"):
            fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", quiet=True)
        fit_diffusion(Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", **settings)
    assert copy.read_bytes() == whole


def test_the_first_step_of_a_run_has_the_loss_of_the_model(tmp_path, monkeypatch):
    first, record = [], Monitor.record_step
    monkeypatch.setattr(Monitor, "record_step", lambda m, loss, *rest: (first.append(loss), record(m, loss, *rest)))
    start = build()
    checkpoint.save(start, tmp_path / "start.safetensors")
    with quick_looks():
        fit_diffusion(
            Config(MODEL, TRAIN), DATA, tmp_path / "run", "cpu", init=tmp_path / "start.safetensors", quiet=True
        )
    batch = global_batch(DATA, DATA.split(0.2).train, TRAIN, 0)
    with torch.no_grad():
        assert first[0] == float(start.loss(batch.values, batch.u, batch.eps).mean())


def test_the_recipe_is_that_of_the_model_and_of_its_training(tmp_path):
    recipe = replace_train(tiny_run.recipe(2), lr=0.003, max_steps=2)
    with quick_looks():
        run = tiny_run.train(recipe, tmp_path / "run", tiny_run.data())
    fallback = TrainConfig(lr=0.5)
    tuned = initial_weights.recipe_of(run, tiny_run.data(), fallback)
    assert tuned.model == checkpoint.load(run).config
    assert (tuned.train.lr, tuned.train.max_steps, tuned.train.seed, tuned.train.conditional) == (0.003, None, 0, True)
    assert not initial_weights.recipe_of(run, DATA, fallback).train.conditional  # these have no labels
    assert initial_weights.recipe_of(run / "model.safetensors", DATA, fallback).train == fallback
    # what a run resolved for its machine and its data is open again
    assert (recipe.train.precision, recipe.train.held_out) == ("float32", 0.2)
    tuned = initial_weights.recipe_of(run, tiny_run.data(), TrainConfig()).train
    assert (tuned.lr, tuned.precision, tuned.held_out) == (0.003, "auto", 0.1)
    assert distillation_settings(run).precision == "auto"
    (run / "run.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"run.json: .*Name the file of the model, .*run/model.safetensors, to take"
    ):
        initial_weights.recipe_of(run, tiny_run.data(), fallback)
    (run / "run.json").unlink()
    tuned = initial_weights.recipe_of(run, tiny_run.data(), fallback)
    assert tuned.train == replace(fallback, conditional=True)


def test_an_image_that_data_and_model_share_makes_no_recipe_conditional(tmp_path):
    """The model of a stage has labels too, and is named by a string."""
    stage, init = split_data(LABELLED, 2), str(tmp_path / "start.safetensors")
    checkpoint.save(build(stage, conditional=True), init)
    for data, conditional in ((stage, True), (ADDED["an image"], False)):
        assert initial_weights.recipe_of(init, data, TrainConfig()).train.conditional == conditional


def test_the_recipe_of_a_run_whose_source_is_gone_is_that_which_it_began_with(tmp_path):
    recipe = replace_train(tiny_run.recipe(2), lr=0.003, max_steps=2)
    with quick_looks():
        tiny_run.train(recipe, tmp_path / "run", tiny_run.data())
    gone, begun = tmp_path / "gone.safetensors", Run(tmp_path / "run")
    found = initial_weights.recipe_of(gone, tiny_run.data(), TrainConfig(), run=begun)
    assert (found.train.lr, found.train.max_steps, found.train.seed) == (0.003, None, 0)
    for run in (None, Run(tmp_path / "new")):
        with pytest.raises(CheckpointError, match="NOT_FOUND"):
            initial_weights.recipe_of(gone, tiny_run.data(), TrainConfig(), run=run)


def test_a_note_lists_modules_with_their_tensors():
    names = ["network.down.0.conv.weight", "network.down.1.conv.weight", "network.network.embed.label", "embed.time.w"]
    assert initial_weights._list(names) == "down (2 tensors), embed.label (1 tensor), embed.time (1 tensor)"
    assert initial_weights._list([]) == "nothing"


def test_a_condition_that_training_did_not_give_is_not_given_later(tmp_path):
    """The network still accepts labels; `evaluate`, `ema`, `report` and `distill` do not give them."""
    start = build(LABELLED, conditional=True)
    model, _ = started(start, DATA, conditional=False)
    assert (model.condition_sizes, model.info["conditional"]) == ({"classes": 3}, False)
    assert shared_condition(model, DATA) == ("none", None)
    model, _ = started(start, LABELLED, conditional=False)
    assert shared_condition(model, LABELLED) == ("none", None)
    distilled = checkpoint.load(
        fit_distillation(model, LABELLED, tmp_path / "distilled", TRAIN, device="cpu", quiet=True)
    )
    assert distilled.info["conditional"] is False


def test_the_names_of_classes_are_those_of_the_labels_that_the_network_knows():
    """After training without labels on data with other classes or none: its rows are still those of the start."""
    start = build(replace(LABELLED, classes=("cat", "dog", "emu")), conditional=True)
    for data in (DATA, from_array(IMAGES, np.arange(40) % 2, num_values=5)):
        model, _ = started(start, data, conditional=False)
        assert model.info["classes"] == ["cat", "dog", "emu"]
        label = Condition(label=torch.arange(12) % 3)
        assert torch.equal(losses(model, data, label), losses(start, data, label))


def test_the_conditions_of_the_data_of_a_run_are_given_where_the_network_accepts_more():
    start = build(LABELLED, conditional=True)
    model, _ = started(start, TEXTS)
    assert model.condition_sizes.keys() == {"classes", "text"}
    assert shared_condition(model, TEXTS) == ("captions", None)
    other = replace(TEXTS, values=TEXTS.values[::-1].copy())
    assert shared_condition(model, other)[0] == "none"


def test_a_model_that_was_trained_without_its_conditions_starts_none(tmp_path):
    """Its file says so, and its labels keep their rows and names, whatever the data call them."""
    start = build(replace(LABELLED, classes=("cat", "dog", "emu")), conditional=True)
    model, _ = started(start, LABELLED, conditional=False)
    assert model.info["classes"] == ["cat", "dog", "emu"]
    label = Condition(label=torch.arange(12) % 3)
    assert torch.equal(losses(model, LABELLED, label), losses(start, LABELLED, label))
    checkpoint.save(model, tmp_path / "model.safetensors")
    recipe = initial_weights.recipe_of(tmp_path / "model.safetensors", LABELLED, TrainConfig())
    assert not recipe.train.conditional

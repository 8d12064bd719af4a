"""A network of the user's own: trained, saved, loaded and sampled, as an instance, a class and a registered kind."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import quick_looks
from torch import nn

import undiffuse
from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.checkpoint import describe
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from undiffuse.networks import registry
from undiffuse.networks.condition import Condition
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import compiled
from undiffuse.training.diffusion_task import fit_diffusion as fit

VALUES = np.random.default_rng(0).integers(5, size=(40, 1, 4, 4))
DATA = from_array(VALUES, num_values=5, name="tiny")
LABELLED = from_array(VALUES, np.arange(40) % 3, num_values=5, name="tiny")
CONFIG = Config(
    ModelConfig(schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TrainConfig(batch=8, max_steps=3, warmup=1, lr=0.01, precision="float32", held_out=0.2, previews=0, snapshots=0),
)
CONDITIONAL = replace(CONFIG, train=replace(CONFIG.train, conditional=True))


class Own(nn.Module):
    """A plain network of the user's own, without a declaration."""

    def __init__(self, channels: int = 1, out_channels: int = 1, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, time, cond=None):
        h = self.first(x) + time[:, None, None, None] / 10
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.last(h)


class Labelled(Own):
    """One that accepts labels, as a setting of its class and as an attribute of an instance."""

    def __init__(self, channels: int = 1, out_channels: int = 1, width: int = 4, classes: int = 0) -> None:
        super().__init__(channels, out_channels, width)
        self.settings, self.condition_sizes = {"width": width}, {"classes": classes}
        self.label = nn.Embedding(classes + 1, channels)

    def forward(self, x, time, cond=None):
        label = torch.full((len(x),), -1) if cond is None or cond.label is None else cond.label
        return super().forward(x + self.label(label + 1)[:, :, None, None], time)


@pytest.fixture
def kinds():
    """Forgets the kinds that a test registers."""
    before = dict(registry.NETWORKS)
    yield
    registry.NETWORKS.clear()
    registry.NETWORKS.update(before)


def train(config, data, folder, **settings):
    with quick_looks():
        return fit(config, data, folder, device="cpu", quiet=True, **settings)


def samples(model, **settings):
    return model.sample(3, seed=1, **settings, sampler=Sampler(num_steps=2))


def test_an_instance_is_trained_saved_loaded_and_sampled(tmp_path):
    torch.manual_seed(0)
    network = Own(width=5)
    before = deepcopy(network.state_dict())
    run = train(CONFIG, DATA, tmp_path / "run", network=network)
    started = train(CONFIG, DATA, tmp_path / "started", network=network, init=run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    model = undiffuse.load(run, network=Own(width=5))
    assert not torch.equal(model.network.first.weight, before["first.weight"])
    assert not torch.equal(undiffuse.load(started, network=Own(width=5)).network.first.weight, before["first.weight"])
    assert model.config.network == {"kind": "Own"}
    assert samples(model).shape == (3, 1, 4, 4)
    undiffuse.save(model, tmp_path / "again.safetensors")
    again = undiffuse.load(tmp_path / "again.safetensors", network=Own(width=5))
    assert torch.equal(samples(again), samples(model))
    with pytest.raises(CheckpointError, match=r"^error\[TENSOR\] "):
        undiffuse.load(run, network=Own)  # its default width is another
    with pytest.raises(
        CheckpointError, match=r"of the class 'Own', .*load\(path, network=Own\), or --network FILE.py:Own"
    ):
        undiffuse.load(run)
    with pytest.raises(CheckpointError, match="its network is of the kind 'Own', not 'Labelled'"):
        undiffuse.load(run, network=Labelled)


def test_a_class_is_built_from_the_settings_of_the_recipe_and_resumed(tmp_path, kinds):
    recipe = replace(CONDITIONAL, model=replace(CONDITIONAL.model, network={"kind": "Labelled", "width": 6}))
    short = replace(recipe, train=replace(recipe.train, max_steps=2))
    train(short, LABELLED, tmp_path / "run", network=Labelled)
    model = undiffuse.load(tmp_path / "run", network=Labelled)
    assert model.config.network == {"kind": "Labelled", "width": 6, "classes": 3}
    assert model.condition_sizes == {"classes": 3}
    first, second = (samples(model, cond=Condition(label=torch.full((3,), k))) for k in (0, 2))
    assert first.shape == second.shape == (3, 1, 4, 4)
    train(short, LABELLED, tmp_path / "run", network=Labelled)  # resumes the unfinished run
    started = train(short, LABELLED, tmp_path / "other", network=Labelled, init=tmp_path / "run")
    assert undiffuse.load(started, network=Labelled).config == model.config
    undiffuse.register("own", Labelled)  # another name than the file's
    assert undiffuse.load(started, network=Labelled).config.network == {**model.config.network, "kind": "own"}


def test_an_instance_declares_its_conditions(tmp_path):
    run = train(CONDITIONAL, LABELLED, tmp_path / "run", network=Labelled(classes=3))
    assert undiffuse.load(run, network=Labelled).config.network == {"kind": "Labelled", "width": 4, "classes": 3}
    with pytest.raises(ConfigError, match="does not declare the condition 'classes' of size 3"):
        train(CONDITIONAL, LABELLED, tmp_path / "other", network=Own())
    with pytest.raises(
        CheckpointError, match=r"its network cannot be built .*does not declare the condition 'classes'"
    ):
        undiffuse.load(run, network=Labelled(classes=2))


def test_a_registered_kind_needs_no_class_to_load(tmp_path, kinds):
    undiffuse.register("own", Labelled)
    recipe = replace(CONDITIONAL, model=replace(CONDITIONAL.model, network={"kind": "own"}))
    run = train(recipe, LABELLED, tmp_path / "run")
    assert undiffuse.load(run).config.network == {"kind": "own", "classes": 3}
    assert undiffuse.load(run, network=Labelled(classes=3)).condition_sizes == {"classes": 3}
    del registry.NETWORKS["own"]
    with pytest.raises(CheckpointError, match="its network is of the class 'own', which is not part of undiffuse"):
        undiffuse.load(run)


def test_a_third_kind_has_checkpointing_and_a_classifier(tmp_path, kinds):
    undiffuse.register("own", Own)
    model = replace(CONFIG.model, network={"kind": "own"})
    runs = [
        train(Config(model, replace(CONFIG.train, checkpointing=on)), DATA, tmp_path / str(on)) for on in (False, True)
    ]
    one, two = (undiffuse.load(run).state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    classifier = NoisyClassifier(NoisyClassifierConfig({"kind": "own"}), (1, 4, 4), IntegerLevels(5), ("a", "b", "c"))
    log_p = classifier(torch.randn(2, 1, 4, 4), classifier.schedule(torch.tensor([0.3, 0.8])))
    assert log_p.shape == (2, 3)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))


class Tied(Own):
    """Two layers with the same weights."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels)
        self.layers[1].weight = self.layers[0].weight


def test_tied_weights_are_trained_and_stay_tied(tmp_path):
    run = train(CONFIG, DATA, tmp_path / "run", network=Tied)
    network = undiffuse.load(run, network=Tied).network
    assert torch.equal(network.layers[0].weight, network.layers[1].weight)
    assert network.layers[0].weight is network.layers[1].weight
    train(replace(CONFIG, train=replace(CONFIG.train, max_steps=4)), DATA, run, network=Tied, force=True)  # resumes


class Normed(nn.Module):
    """A batch norm, and features that it keeps, to look at them."""

    def __init__(self, channels: int, out_channels: int, dims: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, 4) if dims == 0 else nn.Conv2d(channels, 4, 1)
        self.norm = nn.BatchNorm1d(4) if dims == 0 else nn.BatchNorm2d(4)
        self.last = nn.Linear(4, out_channels) if dims == 0 else nn.Conv2d(4, out_channels, 1)

    def forward(self, x, time, cond=None):
        self.features = torch.tanh(self.norm(self.first(x)))
        return self.last(self.features)


@pytest.mark.parametrize("data", [DATA, from_array(VALUES[:, 0, 0, :2] / 5, name="table")], ids=["images", "table"])
def test_a_batch_norm_counts_the_steps_alone(tmp_path, monkeypatch, data):
    """Neither the check of the memory nor the choice of the compiled form moves its statistics."""
    monkeypatch.setattr(compiled, "is_open", lambda *_: True)
    monkeypatch.setattr(compiled, "choose", lambda eager, gradient, _: (gradient(eager), ""))
    run = train(CONFIG, data, tmp_path / "run", network=Normed)
    tensors, _ = read_tensors(run / "checkpoints" / "step-00000003" / "network.safetensors")
    assert int(tensors["network.norm.num_batches_tracked"]) == 3


class Masked(Own):
    """A causal mask, and weights that start at a number."""

    def __init__(self, start: float, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf), persistent)
        nn.init.constant_(self.last.weight, start)


def test_what_cannot_be_stored_or_copied_is_refused_before_training(tmp_path):
    cases = (
        (Masked(0.1, True), r"network.mask: this buffer .* register_buffer\(..., persistent=False\)"),
        (
            Masked(torch.nan, False),
            "network.last.weight: this weight is NaN or infinite before the first step",
        ),
    )
    kept = Normed(1, 1, 2)
    kept(torch.zeros(2, 1, 4, 4), torch.zeros(2))
    for network, words in (*cases, (kept, "Normed: it cannot be copied.*Give its class")):
        with pytest.raises(ConfigError, match=words):
            train(CONFIG, DATA, tmp_path / "run", network=network)
    assert not (tmp_path / "run").exists()
    train(CONFIG, DATA, tmp_path / "run", network=Masked(0.1, False))


def test_a_categorical_output_and_a_learned_variance_set_the_output_channels():
    config = ModelConfig(output="categorical", loss="hybrid", variance="learned", chain_length=5)
    model = Diffusion(config, (1, 4, 4), IntegerLevels(5), network=Own)
    assert describe(model)["config"]["network"] == {"kind": "Own"}
    assert samples(model).dtype == torch.uint8
    with pytest.raises(ConfigError, match=r"makes \(2, 1, 4, 4\), not \(2, 25, 4, 4\).*train with output = 'values'"):
        Diffusion(config, (1, 4, 4), IntegerLevels(5), network=Own())


class Images(Own):
    item_dims = (2,)


class TwoChannels(Own):
    def __init__(self) -> None:
        super().__init__(1, 2)


@pytest.mark.parametrize(
    ("network", "settings", "shape", "cause"),
    [
        (Images, {}, (3,), r"a network of kind 'Images' does not take items of shape \(3,\). Use 'mlp'"),
        (Images(), {}, (1, 8), r"does not take items of shape \(1, 8\). Use 'unet'"),
        (Own, {"kind": "Own", "depth": 3}, (1, 4, 4), "a network of kind 'Own' has no such setting"),
        (Own, {"kind": "Own", "channels": 3}, (1, 4, 4), r"model.network.channels = 3: the rest of the model"),
        (Own, {"kind": "Own", "width": "a"}, (1, 4, 4), r"^error\[NETWORK\] Own: its constructor fails \(TypeError"),
        (Own(out_channels=2), {}, (1, 4, 4), r"^error\[NETWORK\] Own: from zeros .* not \(2, 1, 4, 4\)"),
        (TwoChannels, {}, (1, 4, 4), r"^error\[NETWORK\] TwoChannels: from zeros .* not \(2, 1, 4, 4\)"),
        (nn.Linear(4, 4), {}, (1, 4, 4), r"^error\[NETWORK\] Linear: its forward pass fails"),
    ],
)
def test_networks_that_cannot_work_are_one_line(network, settings, shape, cause):
    config = ModelConfig(network=settings) if settings else ModelConfig()
    with pytest.raises(ConfigError, match=cause) as caught:
        Diffusion(config, shape, Identity(), network=network)
    assert "\n" not in str(caught.value)

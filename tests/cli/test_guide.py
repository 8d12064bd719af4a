"""`train-classifier`, and what its runs and others guide `sample` by."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse import checkpoint
from undiffuse.cli.classifier import recipe_for
from undiffuse.cli.guide import class_names, guide
from undiffuse.codec import Identity, Pixels
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig, TrainConfig
from undiffuse.data import from_array
from undiffuse.denoiser import NetworkDenoiser
from undiffuse.diffusion import Diffusion
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.guidance import Autoguided, ClassifierFree, ClassifierGuided, Dynamic, Guidance
from undiffuse.train import Run, classifier_loop
from undiffuse.train import classifier as classifiers
from undiffuse.train.classifier import Classifier, ClassifierConfig

UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}


@pytest.fixture
def small(monkeypatch):
    """The recipe of the command, of a few weights, and no picture."""

    def recipe(data, device, **settings):
        made = recipe_for(data, device, **settings)
        train = replace(made.train, batch=8, precision="float32", held_out=0.2)
        return replace(made, model=replace(made.model, network=UNET), train=train)

    def missing(_):
        raise ConfigError("MISSING", "matplotlib", "it is not installed", "Install it")

    monkeypatch.setattr("undiffuse.cli.classifier.recipe_for", recipe)
    monkeypatch.setattr(classifier_loop, "accuracy_curve", missing)


def arrays(folder, labelled=True):
    values = np.random.default_rng(0).integers(5, size=(40, 1, 4, 4), dtype=np.uint8)
    np.savez(folder / "tiny.npz", x=values, **({"y": np.arange(40) % 3} if labelled else {}))
    return folder / "tiny.npz"


def test_train_classifier(call, small, tmp_path, monkeypatch):
    data, run = arrays(tmp_path), tmp_path / "run"
    said = call("train-classifier", data, "--out", run, "--steps", 3, "--seed", 5, "--levels", 5, "--device", "cpu")
    assert said.code == 0, said
    assert f"a classifier of 3 classes, 3 steps, into {run}" in said.out
    for shown in ("log SNR", "held-out accuracy", "log p(label), nats", "-5.0", " held-out items"):
        assert shown in said.out
    assert f"next: undiffuse sample RUN --classifier {run} --label NAME" in said.out
    made = Run(run).record["config"]
    assert (made["train"]["steps"], made["train"]["seed"], made["train"]["weight_decay"]) == (3, 5, 0.05)
    assert classifiers.load(run).classes == ("0", "1", "2")
    again = call("train-classifier", data, "--out", run, "--levels", 5)
    assert again == (0, f"{run} is a finished run already; give --out another folder to train again\n", "")
    Run(run)._write({**Run(run).record, "finished": False})
    assert "3 classes, 3 steps, into" in call("train-classifier", data, "--out", run, "--levels", 5).out  # as begun
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("undiffuse.cli.classifier.fit", lambda recipe, *_: print(recipe.train.minutes))
    empty = Classifier(ClassifierConfig(UNET), (1, 4, 4), Pixels(5), ("a", "b"), {"accuracy": []})
    monkeypatch.setattr("undiffuse.cli.classifier.load", lambda _: empty)
    said = call("train-classifier", data, "--levels", 5)
    assert "5 minutes, into runs/tiny-classifier\n5.0\n" in said.out
    assert "held-out" not in said.out


def test_its_errors_are_one_line(call, tmp_path):
    said = call("train-classifier", arrays(tmp_path, False), "--out", tmp_path / "run", "--steps", 3)
    assert said.code == 3
    assert said.err.startswith("error[LABELS] tiny")
    assert not (tmp_path / "run").exists()
    said = call("train-classifier", "digits", "--minutes", 1, "--steps", 3)
    assert (said.code, said.err) == (2, "error[USAGE] --minutes, --steps: both say when to stop. Give one of them.\n")


def test_the_recipe_suits_the_data():
    grey = from_array(np.zeros((9, 1, 8, 8), np.uint8), np.arange(9) % 2, levels=17)
    made = recipe_for(grey, "cpu", steps=3)
    assert made.model.network["widths"] == (32, 64)
    assert (made.model.high, made.model.low) == (7.876, -5.0)
    vectors = recipe_for(from_array(np.zeros((9, 2), np.float32), np.arange(9) % 2), "cpu", minutes=2.0)
    assert (vectors.model.high, vectors.model.low, vectors.model.network["kind"]) == (10.0, -6.0, "mlp")
    assert vectors.train == TrainConfig(batch=512, lr=1e-3, ema=0.05, weight_decay=0.05, minutes=2.0)


# --- the guide --------------------------------------------------------------------------------------------------------


def model(classes=0, seed=0, shape=(1, 4, 4), codec=Pixels(5), names=("a", "b", "c"), **config):  # noqa: B008
    torch.manual_seed(seed)
    network = {**UNET, "classes": classes} if classes else UNET
    made = Diffusion(ModelConfig(network=network, steps=5, **config), shape, codec, {"classes": list(names)})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Files of a model, a weak one, one of other data, one of another process, and two classifiers."""
    tmp_path = tmp_path_factory.mktemp("runs")
    checkpoint.save(model(3), tmp_path / "itself")
    checkpoint.save(model(3, seed=1), tmp_path / "weak")
    checkpoint.save(model(3, codec=Identity()), tmp_path / "other")
    checkpoint.save(model(3, schedule={"name": "flow"}), tmp_path / "flow")
    for name, classes in {"classifier": ("a", "b", "c"), "strange": ("a", "c", "b")}.items():
        torch.manual_seed(1)
        made = Classifier(ClassifierConfig(UNET), (1, 4, 4), Pixels(5), classes)
        torch.nn.init.normal_(made.network.leave.weight)
        classifiers.save(made, tmp_path / name)
    return tmp_path


def test_what_is_asked_for_is_around_the_model(runs):
    conditional = model(3)
    assert guide(conditional, Guidance()) is None
    made = guide(conditional, Guidance(2.0, -1.0, 3.0, 0.7, 0.5, 1.5, "dynamic"), runs / "classifier", runs / "weak")
    denoise = made(conditional.denoiser())
    assert isinstance(denoise, Dynamic)
    assert isinstance(denoise.denoise, ClassifierGuided)
    assert denoise.denoise.scale == 0.5
    assert isinstance(denoise.denoise.log_prob.__self__, Classifier)
    weak = denoise.denoise.denoise
    assert isinstance(weak, Autoguided)
    assert isinstance(weak.weak, NetworkDenoiser)
    assert weak.scale == 1.5
    assert isinstance(weak.denoise, ClassifierFree)
    assert (weak.denoise.scale, weak.denoise.low, weak.denoise.high, weak.denoise.rescale) == (2.0, -1.0, 3.0, 0.7)
    assert isinstance(guide(conditional, Guidance(), autoguide=runs / "weak")(conditional.denoiser()), Autoguided)


def test_samples_follow(runs):
    """Each changes what is drawn; labels go to a classifier also where the model itself hears none."""
    cond = Condition(label=torch.tensor([0, 1, 2]))
    conditional, plain = model(3), model()

    def drawn(of, guidance=Guidance(), **flags):  # noqa: B008
        flags = {name: runs / value for name, value in flags.items()}
        *_, last = of.trajectory(range(3), steps=4, clip=False, cond=cond, guide=guide(of, guidance, **flags))
        assert torch.isfinite(last.x).all()
        return last.x

    base = drawn(conditional)
    for other in (
        drawn(conditional, Guidance(3.0)),
        drawn(conditional, classifier="classifier"),
        drawn(conditional, Guidance(threshold="dynamic")),
        drawn(conditional, autoguide="weak"),
    ):
        assert not torch.allclose(base, other)
    *_, free = plain.trajectory(range(3), steps=4, clip=False)
    assert not torch.allclose(free.x, drawn(plain, classifier="classifier"))
    strong, twice = (drawn(plain, Guidance(classifier_scale=s), classifier="classifier") for s in (50.0, 100.0))
    assert not torch.allclose(strong, twice)


def test_names_of_labels(runs):
    assert class_names(model(3)) == ["a", "b", "c"]
    assert class_names(model(3), runs / "strange") == ["a", "b", "c"]
    assert class_names(model(), runs / "strange") == ["a", "c", "b"]
    assert class_names(model()) == []


def test_what_does_not_go_together_is_refused(runs):
    for asked, says in {
        (model(), Guidance(2.0), None, None): r"--guidance: the model was trained without labels .* Train one",
        (model(3), Guidance(), "strange", None): r".*strange has other classes than the model\. Train both",
        (model(3, codec=Identity()), Guidance(), "classifier", None): r"--classifier: .*classifier is of other data",
        (model(3, shape=(1, 8, 8)), Guidance(), "classifier", None): r"items \(1, 4, 4\), Pixels\(levels=5\)\. Use one",
        (model(3), Guidance(), None, "other"): r"--autoguide: .*other is of other data: items .* Identity\(\)\. Use",
        (model(3), Guidance(), None, "flow"): r"the weak model: the two models are of different noise processes",
        (model(3), Guidance(threshold="hard"), None, None): "threshold 'hard': unknown",
        (model(3), Guidance(), None, "itself"): r"--autoguide: .*itself is the model itself, .* Use an earlier",
        (model(3), Guidance(weak_scale=math.inf), None, "weak"): "scale = inf: it is not finite",
        (model(3), Guidance(classifier_scale=math.nan), "classifier", None): "scale = nan: it is not finite",
        (model(3), Guidance(rescale=0.7), None, None): "-rescale: it does nothing without --guidance other than 1",
        (model(3), Guidance(low=0.0), None, None): "-interval: it does nothing without --guidance other than 1",
        (model(3), Guidance(classifier_scale=5.0), None, "weak"): "-scale: it does nothing without --classifier",
        (model(3), Guidance(weak_scale=math.inf), "classifier", None): r"-scale: it does nothing without --autoguide\.",
        (model(codec=Identity()), Guidance(threshold="static"), None, None): r"--threshold static: .* have no range",
        (model(codec=Identity()), Guidance(threshold="dynamic"), None, None): r"--threshold dynamic: .* have no range",
    }.items():
        of, guidance, *files = asked
        with pytest.raises(ConfigError, match=rf"^error\[GUIDANCE\] .*{says}"):
            guide(of, guidance, *(None if f is None else runs / f for f in files))
    for flag, guidance, file in (("guidance", Guidance(2.0), None), ("classifier", Guidance(), runs / "classifier")):
        with pytest.raises(ConfigError, match=rf"--{flag}: nothing is told that it could guide to\. Give a --label"):
            guide(model(3), guidance, file, told=False)
    assert guide(model(3), Guidance(threshold="dynamic"), told=False) is not None
    with pytest.raises(CheckpointError, match="this is no classifier"):
        guide(model(3), Guidance(), runs / "weak")
    with pytest.raises(CheckpointError, match="this is a classifier, and no diffusion model"):
        guide(model(3), Guidance(), autoguide=runs / "classifier")
    assert guide(model(), Guidance(), runs / "strange") is not None  # whose labels are all there are

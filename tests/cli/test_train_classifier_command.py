"""`undiffuse train-classifier`: its run, its output, its errors and its recipe."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from undiffuse.cli.train_classifier import recipe_for
from undiffuse.data.from_array import from_array
from undiffuse.model.config import TrainConfig
from undiffuse.model.noisy_classifier import load
from undiffuse.training.run_folder import Run

UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}


@pytest.fixture
def small(monkeypatch):
    """The recipe of the command with a network of a few weights, and no figures."""

    def recipe(data, device, preset=None):
        config = recipe_for(data, device, preset)
        train = replace(config.train, batch=8, precision="float32", held_out=0.2, previews=0)
        return replace(config, model=replace(config.model, network=UNET), train=train)

    monkeypatch.setattr("undiffuse.cli.train_classifier.recipe_for", recipe)


def arrays(folder, labelled=True):
    values = np.random.default_rng(0).integers(5, size=(40, 1, 4, 4), dtype=np.uint8)
    np.savez(folder / "tiny.npz", x=values, **({"y": np.arange(40) % 3} if labelled else {}))
    return folder / "tiny.npz"


def test_a_run_its_end_and_its_extension(call, small, tmp_path):
    data, run = arrays(tmp_path), tmp_path / "run"
    flags = ["--out", run, "--num-values", 5, "--device", "cpu"]
    done = call("train-classifier", data, *flags, "--steps", 3, "--seed", 5)
    assert (done.code, done.err) == (0, "")
    printed = json.loads(call("train-classifier", data, *flags, "--json").out)
    assert printed == {"run": str(run), "model": f"{run}/model.safetensors", "records": Run(run).read_metrics()}
    assert f"a classifier of 3 classes, 3 steps, into {run}" in done.out
    for words in ("log SNR", "held-out accuracy", "log p(label), nats", "-5.0", " held-out items"):
        assert words in done.out
    assert f"done: {run}/model.safetensors; report: {run}/report.html\n" in done.out
    assert f"with --classifier {run} and --label\n" in done.out
    train = Run(run).record["config"]["train"]
    assert (train["max_steps"], train["seed"], train["weight_decay"], train["snapshots"]) == (3, 5, 0.05, 0)
    assert load(run).classes == ("0", "1", "2")
    again = call("train-classifier", data, *flags)
    assert again == (0, f"{run} is a finished run already; --extend trains it longer, another --out trains again\n", "")
    changed = call("train-classifier", data, *flags, "--extend", "--steps", 2, "--on-nonfinite", "skip")
    assert f"{run} is extended and resumes from step 3" in changed.out
    assert "3 classes, 5 steps, into" in changed.out
    train = Run(run).record["config"]["train"]
    assert (train["max_steps"], train["on_nonfinite"]) == (5, "skip")


def test_an_unfinished_run_resumes_with_its_recipe_or_names_what_changed(call, small, tmp_path):
    data, run = arrays(tmp_path), tmp_path / "run"
    flags = ["--out", run, "--num-values", 5, "--device", "cpu"]
    assert call("train-classifier", data, *flags, "--steps", 2).code == 0
    Run(run)._write({**Run(run).record, "finished": False})
    changed = call("train-classifier", data, *flags, "--steps", 2, "--seed", 1)
    assert changed.code == 2
    assert "at the beginning" in changed.out
    assert changed.err.startswith("error[RUN] ")
    changed = json.loads(call("train-classifier", data, *flags, "--steps", 2, "--seed", 1, "--json").out)
    assert changed == {"changed": [{"setting": "train.seed", "as_begun": "0", "now": "1"}]}
    assert "3 classes, 2 steps, into" in call("train-classifier", data, *flags).out


def test_the_default_is_five_minutes(call, small, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "undiffuse.training.classifier_task.fit_classifier",
        lambda recipe, *_, **__: lengths.append(recipe.train.minutes),
    )
    monkeypatch.setattr("undiffuse.model.noisy_classifier.load", lambda _: SimpleNamespace(info={}))
    done = call("train-classifier", arrays(tmp_path), "--num-values", 5)
    assert "5 minutes, into runs/tiny-classifier\n" in done.out
    assert lengths == [5.0]
    assert "held-out" not in done.out


def test_errors_are_one_line(call, tmp_path):
    refused = call("train-classifier", arrays(tmp_path, False), "--out", tmp_path / "run", "--steps", 3)
    assert refused.code == 3
    assert refused.err.startswith("error[LABELS] tiny")
    assert not (tmp_path / "run").exists()
    flags = ["--num-values", 5, "--from", 2, "--steps", 1, "--out", tmp_path / "run"]
    refused = call("train-classifier", arrays(tmp_path), *flags)
    assert refused.code == 2
    assert refused.err.startswith(
        "error[CLASSIFIER] tiny: a classifier gets no image beside the noisy item, and --from"
    )
    assert not (tmp_path / "run").exists()
    refused = call("train-classifier", "digits", "--minutes", 1, "--steps", 3)
    assert refused.code == 2
    assert refused.err == "error[USAGE] --minutes, --steps: each determines the length of the run. Give one of them.\n"


def test_the_recipe_is_that_of_the_preset_for_the_data():
    images = from_array(np.zeros((9, 1, 8, 8), np.uint8), np.arange(9) % 2, num_values=17)
    config = recipe_for(images, "cpu")
    assert config.model.network["widths"] == (32, 64)
    assert (config.model.high, config.model.low) == (7.876, -5.0)
    vectors = recipe_for(from_array(np.zeros((9, 2), np.float32), np.arange(9) % 2), "cpu")
    assert (vectors.model.high, vectors.model.low, vectors.model.network["kind"]) == (10.0, -6.0, "mlp")
    expected = TrainConfig(batch=512, lr=1e-3, ema=0.05, weight_decay=0.05, snapshots=0)
    assert vectors.train == expected

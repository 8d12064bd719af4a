"""A run resumes with the recipe and data that it began with; changes are named, and accepted with --force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import checkpoint_hashes, data, quick_looks, recipe, stopping_at, train

from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError
from undiffuse.model.config import replace_train
from undiffuse.training.run_folder import Run

ITEMS, RECIPE = data(), recipe(8)
VALUES = ITEMS.values


def model(**changes):
    return replace(RECIPE, model=replace(RECIPE.model, **changes)), ITEMS


def training(**changes):
    return replace_train(RECIPE, **changes), ITEMS


def images(values, levels=5):
    return RECIPE, from_array(values, np.arange(len(values)) % 3, num_values=levels)


CHANGES = {
    "model.chain_length": model(chain_length=6),
    "model.schedule.high": model(schedule={"name": "linear_log_snr", "high": 7.0}),
    "model.schedule.name": model(schedule={"name": "cosine"}),
    "model.network.kind": model(network={"kind": "unet"}),
    "model.network.width": model(network={"kind": "tiny", "width": 3}),
    "model.target.name": model(target={"name": "eps"}),
    "model.weight.name": model(weight={"name": "unit"}),
    "model.loss": model(loss="hybrid"),
    "model.variance": model(variance="large"),
    "train.lr": training(lr=0.02),
    "train.seed": training(seed=5),
    "train.batch": training(batch=6),
    "train.max_steps": training(max_steps=9),
    "train.ema": training(ema=0.1),
    "train.precision": training(precision="bfloat16"),
    "train.flip": training(flip=False),
    "train.conditional": training(conditional=False),
    "data.items": images(VALUES[:39]),
    "data.item_shape": images(VALUES[:, :, :3]),
    "data.num_values": images(VALUES, 6),
    "data.fingerprint": images(VALUES[::-1].copy()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_named(name, tmp_path):
    Run(tmp_path).open(RECIPE, ITEMS)
    config, items = CHANGES[name]
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path).open(config, items)
    assert caught.value.exit_code == 2
    assert name in [what for what, _, _ in caught.value.rows]
    assert all(old != new for _, old, new in caught.value.rows)
    assert "no options of training (train then keeps its recipe), or --force" in caught.value.fix
    assert Run(tmp_path).open(config, items, force=True)
    assert not Run(tmp_path).open(config, items)  # the record has changed
    (rows,) = Run(tmp_path).record["changed"]
    assert name in [what for what, _, _ in rows]


def test_another_torch_is_named(tmp_path, monkeypatch):
    Run(tmp_path).open(RECIPE, ITEMS)
    monkeypatch.setattr(torch, "__version__", torch.__version__ + ".1")  # a later build of the same major version
    assert not Run(tmp_path).open(RECIPE, ITEMS)
    monkeypatch.setattr(torch, "__version__", "3.0")
    with pytest.raises(ConfigError, match="torch was '2', now '3'"):
        Run(tmp_path).open(RECIPE, ITEMS)


def test_settings_newer_than_the_record_have_their_defaults(tmp_path):
    run = Run(tmp_path)
    run.open(RECIPE, ITEMS)
    record = run.record
    del record["config"]["train"]["on_nonfinite"]
    run._write(record)
    assert not run.open(RECIPE, ITEMS)
    with pytest.raises(ConfigError, match=r"train\.lr was 0\.01, now 0\.02"):
        run.open(*training(lr=0.02))


def test_settings_that_do_not_affect_training_may_change(tmp_path):
    Run(tmp_path).open(RECIPE, ITEMS)
    assert not Run(tmp_path).open(*training(on_nonfinite="skip"))
    assert Run(tmp_path).record["config"]["train"]["on_nonfinite"] == "skip"
    assert not Run(tmp_path).open(*training(save_minutes=1.0))
    assert Run(tmp_path).record["config"]["train"]["save_minutes"] == 1.0


def test_force_resumes_with_the_new_recipe(tmp_path):
    """From the step that was reached, to the new end."""
    with quick_looks():
        with stopping_at(5):
            train(RECIPE, tmp_path, ITEMS)
        config, _ = training(lr=0.02, max_steps=11)
        with pytest.raises(ConfigError, match="began with other settings"):
            train(config, tmp_path, ITEMS)
        train(config, tmp_path, ITEMS, force=True)
    assert checkpoint_hashes(tmp_path, 11)
    assert [what for what, _, _ in Run(tmp_path).record["changed"][0]] == ["train.lr", "train.max_steps"]


@pytest.mark.parametrize(("before", "after"), [({}, {"ema": 0.08}), ({"snapshots": 0}, {"snapshots": 2})])
def test_force_begins_averages_that_the_checkpoint_lacks(before, after, tmp_path):
    with quick_looks():
        with stopping_at(5):
            train(training(**before)[0], tmp_path, ITEMS)
        train(training(**after)[0], tmp_path, ITEMS, force=True)
    assert {"average", "extra"} <= checkpoint_hashes(tmp_path, 8).keys()


def finished_run(folder):
    with quick_looks():
        train(RECIPE, folder, ITEMS)
    Run(folder).finish()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["train.seed", "train.max_steps", "model.chain_length", "data.fingerprint"])
def test_a_finished_run_is_not_another_one(name, force, tmp_path):
    """It was returned as if it were the result of the other recipe or of the other data."""
    finished_run(tmp_path)
    before = Run(tmp_path).record
    config, items = CHANGES[name]
    with pytest.raises(ConfigError, match="holds a finished run with other settings") as caught:
        train(config, tmp_path, items, force=force)
    assert name in [what for what, _, _ in caught.value.rows]
    assert "--force" not in caught.value.fix
    assert ("--extend" in caught.value.fix) == (name == "train.max_steps")
    assert train(RECIPE, tmp_path, ITEMS) == tmp_path
    assert Run(tmp_path).record == before


def test_a_finished_run_of_another_torch_is_the_same_run(tmp_path, monkeypatch):
    """Nothing is going to be trained by this version."""
    finished_run(tmp_path)
    monkeypatch.setattr(torch, "__version__", "3.0")
    assert train(RECIPE, tmp_path, ITEMS) == tmp_path


def test_other_first_weights_are_named(tmp_path):
    with quick_looks():
        for seed in (4, 5):
            train(replace_train(RECIPE, seed=seed, max_steps=1), tmp_path / str(seed), ITEMS)
        with stopping_at(2):
            train(RECIPE, tmp_path / "run", ITEMS, init=tmp_path / "4")
        with pytest.raises(ConfigError, match=r"init was '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
            train(RECIPE, tmp_path / "run", ITEMS, init=tmp_path / "5" / "model.safetensors")
        train(RECIPE, tmp_path / "run", ITEMS)  # as begun
    Run(tmp_path / "run").finish()
    train(RECIPE, tmp_path / "run", ITEMS, init=tmp_path / "4")
    with pytest.raises(ConfigError, match="holds a finished run with other settings: init was"):
        train(RECIPE, tmp_path / "run", ITEMS, init=tmp_path / "5")


def test_the_command_prints_a_table_of_changes(tmp_path, capsys):
    np.save(tmp_path / "tiny.npy", VALUES)
    table = '[model]\nnetwork = {kind = "tiny"}\nchain_length = 5\n[train]\nbatch = 12\nsnapshots = 0\npreviews = 0\n'
    (tmp_path / "recipe.toml").write_text(table)

    def call(*more):
        options = [
            "--num-values",
            "5",
            "--config",
            tmp_path / "recipe.toml",
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
        ]
        code = main([str(word) for word in ("train", tmp_path / "tiny.npy", *options, *more)])
        return code, *capsys.readouterr()

    with quick_looks():  # the run stays unfinished
        assert call("--steps", 2)[0] == 0
        code, out, err = call("--steps", 3, "--seed", 7)
        assert code == 2
        assert [line.split() for line in out.splitlines() if "train." in line] == [
            ["train.max_steps", "2", "3"],
            ["train.seed", "0", "7"],
        ]
        assert "at the beginning" in out
        assert err.startswith("error[RUN] ")
        assert err.count("\n") == 1
        assert call("--steps", 3, "--seed", 7, "--force", "--on-nonfinite", "skip")[0] == 0
        code, out, err = plain(tmp_path, capsys)
        assert (code, err, out.startswith("recipe that the run began with, 3 steps, into")) == (0, "", True)
    assert Run(tmp_path / "run").record["config"]["train"]["on_nonfinite"] == "skip"
    Run(tmp_path / "run").finish()
    for same in ((), ("--steps", 3, "--seed", 7)):
        code, out, err = call(*same)[:3] if same else plain(tmp_path, capsys)
        assert (code, err) == (0, "")
        assert "is a finished run already" in out
    code, out, err = call("--steps", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "finished run with other settings: --seed was 7, now 0" in err
    assert ["train.seed", "7", "0"] in [line.split() for line in out.splitlines()]
    np.save(tmp_path / "tiny.npy", VALUES[::-1])
    code, _, err = plain(tmp_path, capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "data.fingerprint was" in err


def plain(folder, capsys):
    """The command without flags of the recipe: as begun."""
    arguments = ("train", folder / "tiny.npy", "--num-values", 5, "--out", folder / "run", "--device", "cpu")
    code = main([str(word) for word in arguments])
    return code, *capsys.readouterr()

"""A run that is made longer is the longer run, and says that it was."""

import json

import numpy as np
import pytest
import torch

from undiffuse.checkpoint import load, read_tensors, save
from undiffuse.cli import main
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.data import load as load_data
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.train import Run, fit, loop, state
from undiffuse.train.extend import extend
from undiffuse.train.watch import Watch

VALUES = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
DATA = from_array(VALUES, name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5),
    TrainConfig(batch=8, steps=10, warmup=2, lr=0.01, precision="float32", previews=5, snapshots=2),
)


@pytest.fixture(autouse=True)
def no_looks(monkeypatch):
    def end(watch):
        save(watch.smooth, watch.run.model)
        watch.run.finish()

    monkeypatch.setattr(Watch, "look", lambda *_: None)
    monkeypatch.setattr(Watch, "finish", end)


def train(config, out):
    return fit(config, DATA, out, device="cpu", quiet=True)


def held(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    found = {f"{f.name} {k}": t for f in place.glob("*.safetensors") for k, t in read_tensors(f)[0].items()}
    return found | {f"model {name}": t for name, t in load(folder).state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_to_the_bit_the_longer_run(tmp_path):
    """Ten steps, of which four decay, and six more are sixteen, of which six decay."""
    short, straight = train(CONFIG, tmp_path / "a"), train(replace_train(CONFIG, steps=16), tmp_path / "b")
    kept = sorted(int(f.name[-8:]) for f in (short / "checkpoints").iterdir())
    assert kept == [6, 8, 10]  # the newest two, and the one where the decay begins
    longer, step = extend(short, DATA, steps=6)
    assert (longer, step) == (replace_train(CONFIG, steps=16), 6)
    assert not Run(short).finished
    assert [f.name for f in (short / "checkpoints").iterdir()] == ["step-00000006"]
    train(longer, short)
    assert equal(held(short, 16), held(straight, 16))
    record = Run(short).record
    assert record["extended"] == [
        {"from_step": 6, "was": {"steps": 10, "minutes": None}, "now": {"steps": 16, "minutes": None}}
    ]
    assert record["finished"]
    longer, step = extend(short, DATA, steps=4)  # and once more
    train(longer, short)
    assert equal(held(short, 20), held(train(replace_train(CONFIG, steps=20), tmp_path / "c"), 20))
    assert len(Run(short).record["extended"]) == 2


def test_without_a_state_before_the_decay_it_has_one_of_its_own(tmp_path):
    folder = train(replace_train(CONFIG, previews=0), tmp_path / "run")
    longer, step = extend(folder, DATA, steps=10)
    assert step == 10
    progress = state.Progress(step=10, decay_from=6, last_step=10, length=10)
    loop.plan(progress, longer.train)
    assert (progress.decay_from, progress.last_step, progress.length) == (12, 20, 20)
    rates = [loop.rate(state.Progress(i, 0.0, 12, 20), longer.train) for i in (10, 12, 19)]
    assert rates == pytest.approx([1, 1, 1 / 8])
    train(longer, folder)
    assert load(folder).info is not None
    assert (folder / "checkpoints" / "step-00000020").is_dir()


def test_minutes(tmp_path, monkeypatch):
    """The clock, here a second a look at it: five minutes and five more are planned as ten."""
    ticks = iter(range(10**7))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    config = replace_train(CONFIG, steps=None, minutes=2.0)
    folder = train(config, tmp_path / "run")
    before = Run(folder).record["config"]["train"]
    longer, step = extend(folder, DATA, minutes=1.0)
    assert (before["minutes"], longer.train.minutes) == (2.0, 3.0)
    first = state._verify(folder / "checkpoints" / f"step-{step:08d}")
    assert first.decay_from is None or first.step <= first.decay_from
    train(longer, folder)
    last = state._verify(sorted((folder / "checkpoints").iterdir())[-1])
    assert last.length == 3.0
    assert 0.9 * 180 < last.seconds < 1.3 * 180
    assert 0.55 * 180 < 180 - (last.last_step - last.decay_from) / last.step * last.seconds < 0.75 * 180


def test_damage_is_not_gone_back_to(tmp_path):
    folder = train(CONFIG, tmp_path / "run")
    (folder / "checkpoints" / "step-00000006" / "network.safetensors").write_bytes(b"x")
    longer, step = extend(folder, DATA, steps=2)
    assert step == 10
    assert longer.train.steps == 12
    for left in (folder / "checkpoints").glob("step-*"):
        (left / "manifest.json").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        extend(folder, DATA, steps=2)


def test_what_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="no run to make longer"):
        extend(tmp_path / "none", DATA, steps=2)
    assert not (tmp_path / "none").exists()
    folder = train(CONFIG, tmp_path / "run")
    for given in ({}, {"minutes": 1.0}, {"steps": 1, "minutes": 1.0}):
        with pytest.raises(ConfigError, match=r"the length of this run is 10 steps\. Say with --steps"):
            extend(folder, DATA, **given)
    with pytest.raises(ConfigError, match="other data"):
        extend(folder, from_array(VALUES[:50]), steps=1)
    assert Run(folder).finished


def test_the_command(tmp_path, capsys):
    np.save(tmp_path / "v.npy", VALUES)
    fit(CONFIG, load_data(str(tmp_path / "v.npy")), tmp_path / "run", device="cpu", quiet=True)
    command = ["train", str(tmp_path / "v.npy"), "--out", str(tmp_path / "run"), "--device", "cpu", "--extend"]
    assert main([*command, "--steps", "4", "--preset", "ddpm"]) == 2
    assert "the recipe that it was begun with" in capsys.readouterr().err
    assert main([*command, "--steps", "4"]) == 0
    assert "goes on from step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["train"]["steps"] == 14
    assert (tmp_path / "run" / "checkpoints" / "step-00000014").is_dir()

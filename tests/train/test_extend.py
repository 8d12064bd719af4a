"""A run that is made longer is the longer run, and says that it was."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_run import stopping_at

from undiffuse.checkpoint import load, read_tensors, save
from undiffuse.cli import main
from undiffuse.cli.crew import Crew
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
        extend(folder, DATA, steps=3)


def test_asked_again_it_goes_on(tmp_path):
    """Stopped on its longer way, it is not made longer a second time; as much more of a finished one is more."""
    folder = train(CONFIG, tmp_path / "run")
    for again in range(3):
        longer, step = extend(folder, DATA, steps=6)
        assert (longer.train.steps, step) == (16, (6, 11, 14)[again])
        assert len(Run(folder).record["extended"]) == 1
        if again < 2:
            with stopping_at((11, 14)[again]):
                train(longer, folder)
    train(longer, folder)
    assert equal(held(folder, 16), held(train(replace_train(CONFIG, steps=16), tmp_path / "straight"), 16))
    assert extend(folder, DATA, steps=6)[0].train.steps == 22
    assert extend(folder, DATA, steps=7)[0].train.steps == 29  # as much was not asked for last
    assert extend(folder, DATA, steps=6)[0].train.steps == 35
    assert [note["now"]["steps"] for note in Run(folder).record["extended"]] == [16, 22, 29, 35]


def test_minutes_asked_again(tmp_path):
    run = Run(tmp_path)
    run.open(replace_train(CONFIG, steps=None, minutes=0.1), DATA)
    shutil.copytree(train(CONFIG, tmp_path / "other") / "checkpoints", run.checkpoints, dirs_exist_ok=True)
    assert [extend(tmp_path, DATA, minutes=0.2)[0].train.minutes for _ in range(2)] == [0.1 + 0.2] * 2


def test_killed_before_it_went_back(tmp_path, monkeypatch):
    """What it had is still there, and it does the rest when it is asked again."""
    folder, straight = train(CONFIG, tmp_path / "a"), train(replace_train(CONFIG, steps=16), tmp_path / "b")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "rewind", killed)
        with pytest.raises(KeyboardInterrupt):
            extend(folder, DATA, steps=6)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 3
    assert not Run(folder).finished
    longer, step = extend(folder, DATA, steps=6)
    assert (longer.train.steps, step) == (16, 6)
    train(longer, folder)
    assert equal(held(folder, 16), held(straight, 16))


def test_what_the_run_was_not_begun_with_is_refused_with_nothing_lost(tmp_path, monkeypatch):
    folder = train(CONFIG, tmp_path / "run")
    files = {f: f.read_bytes() for f in folder.rglob("*.*")}  # all but the lock
    with pytest.raises(ConfigError, match="begun without --conditional"):
        extend(folder, DATA, steps=2, conditional=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0")
        with pytest.raises(ConfigError, match="torch was '2', now '3'"):
            extend(folder, DATA, steps=2)
        assert {f: f.read_bytes() for f in folder.rglob("*.*")} == files
        extend(folder, DATA, steps=2, force=True)
    assert extend(folder, DATA, steps=2, force=True)[0].train.steps == 12
    assert extend(folder, DATA, steps=2, force=True)[0].train.steps == 12
    with stopping_at(11):
        fit(replace_train(CONFIG, steps=12), DATA, folder, device="cpu", quiet=True, force=True)
    assert len(Run(folder).record["changed"]) == 2  # to another torch and back
    assert extend(folder, DATA, steps=2)[0].train.steps == 12  # and what was asked for is still known


@pytest.mark.parametrize("more", [0, -4, float("nan"), float("inf")])
def test_no_longer(tmp_path, more):
    folder = train(CONFIG, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--steps: .* more steps make no run longer\. Give a number above 0"):
        extend(folder, DATA, steps=more)
    assert Run(folder).finished
    assert len(list((folder / "checkpoints").iterdir())) == 3


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
    for wrong, said in {"--conditional": "begun without --conditional", "--steps=-4": "make no run longer"}.items():
        assert main([*command, "--steps", "4", wrong]) == 2
        assert said in capsys.readouterr().err
        assert Run(tmp_path / "run").finished
    assert main([*command, "--steps", "4"]) == 0
    assert "goes on from step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["train"]["steps"] == 14
    assert (tmp_path / "run" / "checkpoints" / "step-00000014").is_dir()


def test_a_process_that_is_not_the_first_waits_and_goes_along(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "v.npy", VALUES)
    data = load_data(str(tmp_path / "v.npy"))
    fit(CONFIG, data, tmp_path / "run", device="cpu", quiet=True)
    asked = []

    def gather(said):  # by then the first has done it
        extend(tmp_path / "run", data, steps=6)
        return [None, said]

    app = sys.modules["undiffuse.cli.app"]  # `undiffuse.cli.app` is the application
    monkeypatch.setattr(app, "join", lambda device: Crew(1, 2, device, gather))
    monkeypatch.setattr(app, "fit", lambda config, *_, **__: asked.append(config.train.steps))
    command = ["train", str(tmp_path / "v.npy"), "--out", str(tmp_path / "run"), "--device", "cpu", "--extend"]
    assert main([*command, "--steps", "6"]) == 0
    assert asked == [16]
    assert len(Run(tmp_path / "run").record["extended"]) == 1
    assert "is to be longer" not in capsys.readouterr().out


PROCESS = """
import sys, torch
from undiffuse.cli import main
from undiffuse.train.watch import Watch
torch.set_num_threads(1)
Watch.look, Watch.finish = (lambda *_: None), (lambda watch: watch.run.finish())
code = main(sys.argv[1:])
torch.distributed.destroy_process_group()
sys.exit(code)
"""


@pytest.mark.release
def test_of_two_processes_one_makes_it_longer(tmp_path):
    """Over gloo; each of them used to, and they trained towards two ends."""
    np.save(tmp_path / "v.npy", VALUES)
    fit(CONFIG, load_data(str(tmp_path / "v.npy")), tmp_path / "run", device="cpu", quiet=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}
    flags = ["--out", str(tmp_path / "run"), "--device", "cpu", "--extend", "--steps", "6"]
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, "train", str(tmp_path / "v.npy"), *flags]

    def member(rank):
        own = os.environ | env | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=200)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(member, "01"))
    assert [each.returncode for each in done] == [0, 0], done
    assert ["is to be longer" in each.stdout for each in done] == [True, False]
    record = Run(tmp_path / "run").record
    assert (record["finished"], record["config"]["train"]["steps"], len(record["extended"])) == (True, 16, 1)
    assert state._verify(tmp_path / "run" / "checkpoints" / "step-00000016").step == 16

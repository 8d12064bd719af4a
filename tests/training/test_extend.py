"""An extended run equals the longer run, and its record notes the extension."""

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
from tiny_run import SlowMachine, finish_early, stopping_at

from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.registry import load as load_data
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.checkpoint import load
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.runtime.distributed_group import ProcessGroup
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training import diffusion_task
from undiffuse.training import extend as extend_module
from undiffuse.training import fit as loop
from undiffuse.training import train_state as state
from undiffuse.training.diffusion_task import DiffusionTask, fit_diffusion
from undiffuse.training.extend import extend
from undiffuse.training.lr_schedule import lr_factor, plan_lr_decay
from undiffuse.training.monitor import Monitor
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run

VALUES = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
DATA = from_array(VALUES, name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5),
    TrainConfig(batch=8, max_steps=10, warmup=2, lr=0.01, precision="float32", previews=5, snapshots=2),
)


@pytest.fixture(autouse=True)
def no_evaluations(monkeypatch):
    def end(monitor):
        finish_early(monitor)
        monitor.run.finish()

    monkeypatch.setattr(Monitor, "evaluate_now", lambda *_: None)
    monkeypatch.setattr(Monitor, "finish", end)


def train(config, out):
    return fit_diffusion(config, DATA, out, device="cpu", quiet=True)


def checkpoint_tensors(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    tensors = {f"{f.name} {k}": t for f in place.glob("*.safetensors") for k, t in read_tensors(f)[0].items()}
    return tensors | {f"model {name}": t for name, t in load(folder).state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_an_extended_run_is_the_longer_run(tmp_path):
    """Ten steps with a decay of four, extended by six, are sixteen with a decay of six."""
    short, straight = train(CONFIG, tmp_path / "a"), train(replace_train(CONFIG, max_steps=16), tmp_path / "b")
    kept = sorted(int(f.name[-8:]) for f in (short / "checkpoints").iterdir())
    assert kept == [6, 8, 10]  # the newest two, and the last before the decay
    longer, step = extend(short, DATA, steps=6)
    assert (longer, step) == (replace_train(CONFIG, max_steps=16), 6)
    assert not Run(short).finished
    assert [f.name for f in (short / "checkpoints").iterdir()] == ["step-00000006"]
    train(longer, short)
    assert equal(checkpoint_tensors(short, 16), checkpoint_tensors(straight, 16))
    record = Run(short).record
    assert record["extended"] == [
        {"from_step": 6, "was": {"max_steps": 10, "minutes": None}, "now": {"max_steps": 16, "minutes": None}}
    ]
    assert record["finished"]
    longer, step = extend(short, DATA, steps=4)  # a second time
    train(longer, short)
    straight = train(replace_train(CONFIG, max_steps=20), tmp_path / "c")
    assert equal(checkpoint_tensors(short, 20), checkpoint_tensors(straight, 20))
    assert len(Run(short).record["extended"]) == 2


def snapshots(folder):
    return {path.name: read_tensors(path)[0] for path in (folder / "snapshots").iterdir()}


@pytest.mark.parametrize(("count", "more"), [(2, 6), (4, 2), (4, 10), (3, 30)])
def test_an_extended_run_has_the_snapshots_of_the_longer_run(tmp_path, count, more):
    """It had those of its own length up to the step that it resumed from, in place of theirs."""
    config = replace_train(CONFIG, snapshots=count)
    short, straight = train(config, tmp_path / "a"), train(replace_train(config, max_steps=10 + more), tmp_path / "b")
    assert extend(short, DATA, steps=more)[1] == 6
    train(replace_train(config, max_steps=10 + more), short)
    one, other = snapshots(short), snapshots(straight)
    assert sorted(one) == sorted(other)
    assert all(torch.equal(one[file][name], other[file][name]) for file in one for name in one[file])
    assert 2 * count <= len(one) <= 4 * count


def test_without_a_checkpoint_before_the_decay_it_decays_twice(tmp_path):
    folder = train(replace_train(CONFIG, previews=0), tmp_path / "run")
    longer, step = extend(folder, DATA, steps=10)
    assert step == 10
    progress = Progress(step=10, decay_from=6, last_step=10, length=10)
    plan_lr_decay(progress, longer.train)
    assert (progress.decay_from, progress.last_step, progress.length) == (12, 20, 20)
    factors = [lr_factor(Progress(i, 0.0, 12, 20), longer.train) for i in (10, 12, 19)]
    assert factors == pytest.approx([1, 1, 1 / 8])
    train(longer, folder)
    assert load(folder).info is not None
    assert (folder / "checkpoints" / "step-00000020").is_dir()


def test_minutes(tmp_path, monkeypatch):
    """At a second a step, two minutes and one more are planned as three."""
    clock = SlowMachine(monkeypatch, step=1.0)

    def train(config, folder):
        return loop.fit(DiffusionTask(config), DATA, Run(folder), device="cpu", quiet=True, clock=clock)

    config = replace_train(CONFIG, max_steps=None, minutes=2.0)
    folder = train(config, tmp_path / "run")
    before = Run(folder).record["config"]["train"]
    longer, step = extend(folder, DATA, minutes=1.0)
    assert (before["minutes"], longer.train.minutes) == (2.0, 3.0)
    first = state.verify_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    assert first.decay_from is None or first.step <= first.decay_from
    train(longer, folder)
    last = state.verify_checkpoint(sorted((folder / "checkpoints").iterdir())[-1])
    assert last.length == 3.0
    assert last.step == last.seconds == 0.975 * 180 // 1  # the rest is for the last measurement
    assert last.last_step - last.decay_from == pytest.approx(longer.train.decay * last.seconds, abs=1)


def test_a_damaged_checkpoint_is_not_resumed(tmp_path):
    folder = train(CONFIG, tmp_path / "run")
    (folder / "checkpoints" / "step-00000006" / "network.safetensors").write_bytes(b"x")
    longer, step = extend(folder, DATA, steps=2)
    assert step == 10
    assert longer.train.max_steps == 12
    for left in (folder / "checkpoints").glob("step-*"):
        (left / "manifest.json").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of its checkpoints is intact"):
        extend(folder, DATA, steps=3)


def test_repeating_the_command_extends_once(tmp_path):
    """A run that stopped after it was extended resumes; a finished one is extended again."""
    folder = train(CONFIG, tmp_path / "run")
    for again in range(3):
        longer, step = extend(folder, DATA, steps=6)
        assert (longer.train.max_steps, step) == (16, (6, 11, 14)[again])
        assert len(Run(folder).record["extended"]) == 1
        if again < 2:
            with stopping_at((11, 14)[again]):
                train(longer, folder)
    train(longer, folder)
    straight = train(replace_train(CONFIG, max_steps=16), tmp_path / "straight")
    assert equal(checkpoint_tensors(folder, 16), checkpoint_tensors(straight, 16))
    assert extend(folder, DATA, steps=6)[0].train.max_steps == 22
    assert extend(folder, DATA, steps=7)[0].train.max_steps == 29  # another length
    assert extend(folder, DATA, steps=6)[0].train.max_steps == 35
    assert [note["now"]["max_steps"] for note in Run(folder).record["extended"]] == [16, 22, 29, 35]


def test_repeating_with_minutes_extends_once(tmp_path):
    run = Run(tmp_path)
    run.open(replace_train(CONFIG, max_steps=None, minutes=0.1), DATA)
    shutil.copytree(train(CONFIG, tmp_path / "other") / "checkpoints", run.checkpoints, dirs_exist_ok=True)
    assert [extend(tmp_path, DATA, minutes=0.2)[0].train.minutes for _ in range(2)] == [0.1 + 0.2] * 2


def test_a_kill_before_checkpoints_are_removed_loses_nothing(tmp_path, monkeypatch):
    """The checkpoints are still there, and the repeated command does the rest."""
    folder, straight = train(CONFIG, tmp_path / "a"), train(replace_train(CONFIG, max_steps=16), tmp_path / "b")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extend_module, "drop_checkpoints_after", killed)
        with pytest.raises(KeyboardInterrupt):
            extend(folder, DATA, steps=6)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 3
    assert not Run(folder).finished
    longer, step = extend(folder, DATA, steps=6)
    assert (longer.train.max_steps, step) == (16, 6)
    train(longer, folder)
    assert equal(checkpoint_tensors(folder, 16), checkpoint_tensors(straight, 16))


def test_a_refused_extension_changes_no_file(tmp_path, monkeypatch):
    folder = train(CONFIG, tmp_path / "run")
    files = {f: f.read_bytes() for f in folder.rglob("*.*")}  # all but the lock
    with pytest.raises(ConfigError, match="began without --conditional"):
        extend(folder, DATA, steps=2, conditional=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0")
        with pytest.raises(ConfigError, match="torch was '2', now '3'"):
            extend(folder, DATA, steps=2)
        assert {f: f.read_bytes() for f in folder.rglob("*.*")} == files
        extend(folder, DATA, steps=2, force=True)
    assert extend(folder, DATA, steps=2, force=True)[0].train.max_steps == 12
    assert extend(folder, DATA, steps=2, force=True)[0].train.max_steps == 12
    with stopping_at(11):
        fit_diffusion(replace_train(CONFIG, max_steps=12), DATA, folder, device="cpu", quiet=True, force=True)
    assert len(Run(folder).record["changed"]) == 2  # to another torch and back
    assert extend(folder, DATA, steps=2)[0].train.max_steps == 12  # the extension is still recorded


@pytest.mark.parametrize("more", [0, -4, float("nan"), float("inf")])
def test_lengths_that_extend_nothing_are_refused(tmp_path, more):
    folder = train(CONFIG, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--steps: a run cannot be extended by .*\. Give a number above 0"):
        extend(folder, DATA, steps=more)
    assert Run(folder).finished
    assert len(list((folder / "checkpoints").iterdir())) == 3


def test_requests_that_do_not_fit_the_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run to extend"):
        extend(tmp_path / "none", DATA, steps=2)
    assert not (tmp_path / "none").exists()
    folder = train(CONFIG, tmp_path / "run")
    for given in ({}, {"minutes": 1.0}, {"steps": 1, "minutes": 1.0}):
        with pytest.raises(
            ConfigError,
            match=r"the length of this run is 10 steps\. Give what to add, in the same unit: --extend --steps N",
        ):
            extend(folder, DATA, **given)
    with pytest.raises(ConfigError, match="other data"):
        extend(folder, from_array(VALUES[:50]), steps=1)
    assert Run(folder).finished
    record = Run(folder).record
    Run(folder)._write({**record, "config": {"pairs": "teacher", "train": record["config"]["train"]}})  # as of distill
    with pytest.raises(
        ConfigError, match=r"made by another command or version\. Extend it by the command that made it"
    ):
        extend(folder, DATA, steps=1)


def test_the_command(tmp_path, capsys):
    np.save(tmp_path / "v.npy", VALUES)
    fit_diffusion(CONFIG, load_data(str(tmp_path / "v.npy")), tmp_path / "run", device="cpu", quiet=True)
    command = ["train", str(tmp_path / "v.npy"), "--out", str(tmp_path / "run"), "--device", "cpu", "--extend"]
    assert main([*command, "--steps", "4", "--preset", "ddpm"]) == 2
    assert "keeps the recipe that it began with" in capsys.readouterr().err
    wrong = {"--conditional": "began without --conditional", "--steps=-4": "cannot be extended by -4"}
    for flag, message in wrong.items():
        assert main([*command, "--steps", "4", flag]) == 2
        assert message in capsys.readouterr().err
        assert Run(tmp_path / "run").finished
    assert main([*command, "--steps", "4"]) == 0
    assert "is extended and resumes from step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["train"]["max_steps"] == 14
    assert (tmp_path / "run" / "checkpoints" / "step-00000014").is_dir()


def test_another_process_waits_for_the_first_to_extend(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "v.npy", VALUES)
    data = load_data(str(tmp_path / "v.npy"))
    fit_diffusion(CONFIG, data, tmp_path / "run", device="cpu", quiet=True)
    lengths = []

    def gather(value):  # the first process has extended the run by then
        extend(tmp_path / "run", data, steps=6)
        return [None, value]

    group = ProcessGroup(1, 2, "cpu", gather)
    monkeypatch.setattr("undiffuse.runtime.distributed_group.init_process_group", lambda device: group)
    fit = lambda config, *_, **__: lengths.append(config.train.max_steps)  # noqa: E731
    monkeypatch.setattr(diffusion_task, "fit_diffusion", fit)
    command = ["train", str(tmp_path / "v.npy"), "--out", str(tmp_path / "run"), "--device", "cpu", "--extend"]
    assert main([*command, "--steps", "6"]) == 0
    assert lengths == [16]
    assert len(Run(tmp_path / "run").record["extended"]) == 1
    assert "is extended" not in capsys.readouterr().out


PROCESS = """
import sys, torch
from undiffuse.cli import main
from undiffuse.training.monitor import Monitor
torch.set_num_threads(1)
Monitor.evaluate_now, Monitor.finish = (lambda *_: None), (lambda monitor: monitor.run.finish())
code = main(sys.argv[1:])
torch.distributed.destroy_process_group()
sys.exit(code)
"""


@pytest.mark.release
def test_one_of_two_processes_extends_the_run(tmp_path):
    """Over gloo."""
    np.save(tmp_path / "v.npy", VALUES)
    fit_diffusion(CONFIG, load_data(str(tmp_path / "v.npy")), tmp_path / "run", device="cpu", quiet=True)
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
    assert ["is extended and resumes" in each.stdout for each in done] == [True, False]
    record = Run(tmp_path / "run").record
    assert (record["finished"], record["config"]["train"]["max_steps"], len(record["extended"])) == (True, 16, 1)
    assert state.verify_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000016").step == 16

"""Loggers get each number of a run once, however often it is stopped, killed and resumed."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from tiny_run import data, recipe, stopping_at, train

from undiffuse.cli import main
from undiffuse.errors import ConfigError
from undiffuse.training import monitor as monitors
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.loggers import LOGGERS, check_loggers
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

STEPS = 6


class KilledError(Exception):
    """As a kill: nothing is saved."""


class FakeWandb(ModuleType):
    """What accelerate uses of wandb. Like wandb it keeps a run by its id, and drops steps before its last one."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.started: list[dict] = []
        self.dropped = self.finished = 0
        self.failing = False

    def init(self, **options):
        self.started.append(options)
        resumed = options["id"] in self.runs
        history = self.runs.setdefault(options["id"], [])
        first = history[-1][0] + 1 if history else 0

        def log(values, step):
            if self.failing:
                raise RuntimeError("no connection")
            if step < max([first, *(at for at, _ in history)]):
                self.dropped += 1
            else:
                history.append((step, values))

        def finish():
            self.finished += 1

        return SimpleNamespace(log=log, finish=finish, step=first, resumed=resumed)


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    monkeypatch.setattr(monitors, "STEPS_PER_RECORD", 1)
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(Monitor, "_write_report", lambda *_: None)


def trained(folder, patch, loggers):
    """A run that a signal stops after 2 steps, that is killed after 4, and then ends; its records."""
    config, real = recipe(STEPS, previews=1), Monitor.record_step
    with stopping_at(2):
        train(config, folder, data(), loggers=loggers)

    def killed(monitor, *numbers):
        real(monitor, *numbers)
        if monitor.progress.step == 4:
            raise KilledError

    with patch.context() as more:
        more.setattr(Monitor, "record_step", killed)
        with pytest.raises(KilledError):
            train(config, folder, data(), loggers=loggers)
    train(config, folder, data(), loggers=loggers)
    return Run(folder).read_metrics()


def test_each_step_is_logged_once(tmp_path, monkeypatch, wandb):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra `tensorboard`"
    )
    records = trained(tmp_path / "run", monkeypatch, ["wandb", "tensorboard", "wandb"])
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))

    read = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(step, pytest.approx(loss)) for step, loss in losses]
    names = {name for record in records for name in record} - {"step"}
    assert set(read.Tags()["scalars"]) == names
    for name in names:
        assert [e.step for e in read.Scalars(name)] == sorted({r["step"] for r in records if name in r})

    [history] = wandb.runs.values()
    assert wandb.dropped == 0
    assert [(step, values["loss"]) for step, values in history if "loss" in values] == losses
    assert {name for _, values in history for name in values} == names
    assert len(wandb.started) == wandb.finished == 3
    assert wandb.started[0]["project"] == "undiffuse"
    assert wandb.started[0]["config"]["train"]["max_steps"] == STEPS
    assert {options["dir"] for options in wandb.started} == {str(tmp_path / "run")}


def test_the_board_gets_an_evaluation_that_was_interrupted(tmp_path, monkeypatch):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra `tensorboard`"
    )
    folder, config = tmp_path / "run", recipe(STEPS, previews=1)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionTask, "evaluate", Mock(side_effect=KilledError))
        with pytest.raises(KilledError):
            train(config, folder, data(), loggers=["tensorboard"])
    train(config, folder, data(), loggers=["tensorboard"])
    read = accumulator.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("final_bits_per_dim")] == [STEPS]
    assert [e.step for e in read.Scalars("loss")] == list(range(1, STEPS + 1))


def test_a_logger_that_begins_later_gets_the_records_before_it(tmp_path, wandb):
    config = recipe(STEPS, previews=1)
    with stopping_at(2):
        train(config, tmp_path / "run", data())
    train(config, tmp_path / "run", data(), loggers=["wandb"])
    [history] = wandb.runs.values()
    assert [step for step, values in history if "loss" in values] == list(range(1, STEPS + 1))


def test_a_logger_that_fails_costs_a_line(tmp_path, wandb, capsys, monkeypatch):
    real = Monitor.record_step

    def fail(monitor, *numbers):
        wandb.failing = monitor.progress.step == 3
        monitor.console.quiet = False
        real(monitor, *numbers)

    monkeypatch.setattr(Monitor, "record_step", fail)
    train(recipe(STEPS, previews=1), tmp_path / "run", data(), loggers=["wandb"])
    assert Run(tmp_path / "run").finished
    assert capsys.readouterr().out.count("WandBTracker fails and gets no more records: no connection") == 1
    [history] = wandb.runs.values()
    assert [step for step, _ in history] == [1, 2]


def test_a_run_in_the_working_folder_has_its_name(tmp_path, wandb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(recipe(1, previews=1), Path(), data(), loggers=["wandb"])
    assert wandb.started[0]["name"] == tmp_path.name


def test_it_does_not_change_the_run(tmp_path, wandb):
    one = train(recipe(2, previews=1), tmp_path / "one", data(), loggers=["wandb"])
    other = train(recipe(2, previews=1), tmp_path / "other", data())
    assert json.loads((one / "run.json").read_text()) == json.loads((other / "run.json").read_text())


def test_one_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\nUse wandb login")

    wandb.init = init
    with pytest.raises(ConfigError) as error:
        train(recipe(2), tmp_path / "run", data(), loggers=["wandb"])
    assert str(error.value).startswith("error[LOGGER] loggers = wandb: it cannot start (api_key not configured Use")


@pytest.mark.parametrize("command", ["train", "train-classifier", "train-autoencoder", "distill"])
def test_a_missing_package_and_a_wrong_name_are_errors_before_the_data_are_read(command, tmp_path, capsys, monkeypatch):
    name = {"train": "tensorboard", "distill": "chalk"}.get(command, "wandb")
    monkeypatch.setitem(sys.modules, name, None)
    assert main([command, str(tmp_path / "none"), "--log", name]) == 2
    line = f"error[MISSING_PACKAGE] {name}: is not installed. Install it: pip install 'undiffuse[{name}]'.\n"
    if name == "chalk":
        line = "error[LOGGER] --log chalk: no such logger. Give tensorboard or wandb.\n"
    assert capsys.readouterr().err == line


def test_every_logger_needs_its_package(monkeypatch):
    for name in LOGGERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match="is not installed"):
            check_loggers([name])

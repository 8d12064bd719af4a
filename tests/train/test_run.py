import csv
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.config import Config, ModelConfig, TrainConfig, to_dict
from undiffuse.data import from_array
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.train.run import Run, _holder, describe

DATA = from_array(np.arange(40).reshape(20, 2) % 5, name="tiny")
CONFIG = Config()


def test_a_run_is_opened_again_and_finished(tmp_path):
    run = Run(tmp_path / "deep" / "run")
    assert run.record is None
    assert not run.finished
    assert not run.folder.exists()  # nothing is made before `open`
    run.open(CONFIG, DATA)
    assert sorted(f.name for f in run.folder.iterdir()) == ["checkpoints", "pictures", "run.json"]
    begun = {"config": to_dict(CONFIG), "data": describe(DATA), "torch": torch.__version__, "finished": False}
    assert run.record == begun
    assert json.loads(json.dumps(describe(DATA))) == describe(DATA)
    assert describe(DATA)["fingerprint"] == DATA.fingerprint
    run.open(CONFIG, DATA)
    assert not run.finished
    run.finish()
    assert run.finished
    assert Run(str(run.folder)).record == {**begun, "finished": True}
    assert not (run.folder / "run.json.partial").exists()


def test_an_empty_folder_will_do(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    assert Run(tmp_path).record


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("train", {"lr": 0.5}, "train.lr was 0.001, now 0.5"),
        ("train", {"batch": 64, "seed": 1}, "train.batch was 128, now 64; train.seed was 0, now 1"),
        ("train", {"steps": 3}, "train.steps was None, now 3"),
        ("train", {"betas": (0.9, 0.9)}, "train.betas was [0.9, 0.99], now [0.9, 0.9]"),
        ("train", {"flip": True}, "train.flip was False, now True"),
        ("model", {"steps": 10}, "model.steps was 1000, now 10"),
        ("model", {"schedule": {"name": "cosine"}}, "model.schedule.name was 'linear_log_snr', now 'cosine'"),
        ("model", {"network": {"kind": "unet", "heads": 2}}, "model.network.heads was None, now 2"),
        ("model", {"variance": "large"}, "model.variance was 'small', now 'large'"),
    ],
)
def test_a_changed_recipe_is_refused_by_name(tmp_path, section, changes, said):
    Run(tmp_path).open(CONFIG, DATA)
    changed = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path).open(changed, DATA)
    assert caught.value.exit_code == 2
    assert said in str(caught.value)
    assert Run(tmp_path).record["config"] == to_dict(CONFIG)


def test_other_data_are_refused(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    with pytest.raises(ConfigError, match=r"data\.fingerprint was") as caught:
        Run(tmp_path).open(CONFIG, from_array(DATA.values[::-1] + 0, levels=5))
    assert caught.value.exit_code == 2
    Run(tmp_path).open(CONFIG, from_array(DATA.values + 0, levels=5, name="the same by another name"))


def test_a_run_killed_before_its_record_can_begin_again(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    (tmp_path / "run.json").rename(tmp_path / "run.json.partial")
    Run(tmp_path).open(CONFIG, DATA)
    assert Run(tmp_path).record is not None


def test_folders_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and is no run"):
        Run(tmp_path).open(CONFIG, DATA)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ResourceError, match="cannot be created"):
        Run(tmp_path / "thesis.tex").open(CONFIG, DATA)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"config": {}}', '{"config": 1, "data": 3, "finished": 1}'])
def test_damaged_records(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for look in (lambda run: run.record, lambda run: run.finished, lambda run: run.open(CONFIG, DATA)):
        with pytest.raises(CheckpointError, match="not the record of a run"):
            look(Run(tmp_path))


def test_metrics(tmp_path):
    run = Run(tmp_path)
    run.open(Config(ModelConfig(), TrainConfig()), DATA)
    assert run.read_metrics() == []
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "bits_per_dim": 1 / 3}, {"step": 3, "loss": 0.25}]
    run.write_metrics(records)
    assert run.read_metrics() == records
    assert run.read_metrics(up_to=2) == records[:2]
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"step": "1", "loss": "0.5", "bits_per_dim": ""}
    assert float(rows[1]["bits_per_dim"]) == 1 / 3
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "lo')  # torn
    assert run.read_metrics() == records


def test_one_writer(tmp_path):
    run = Run(tmp_path / "run")
    with run.alone():
        assert (run.folder / "lock").read_text() == f"{os.getpid()}\n"
        with (
            pytest.raises(ResourceError, match=rf"error\[BUSY\] .*process {os.getpid()} is training") as caught,
            run.alone(),
        ):
            raise AssertionError("two writers")
        assert caught.value.exit_code == 6
    with run.alone():  # it is free again
        pass
    (run.folder / "lock").write_text("123456\n")  # of a process that was killed
    with run.alone():
        assert (run.folder / "lock").read_text() == f"{os.getpid()}\n"


def test_a_writer_that_has_not_said_its_number_yet(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    monkeypatch.setattr("undiffuse.train.run.time.sleep", lambda _: (tmp_path / "lock").write_text("7\n"))
    assert _holder(tmp_path / "lock") == "7"
    (tmp_path / "lock").write_text("")
    monkeypatch.setattr("undiffuse.train.run.time.sleep", lambda _: None)
    assert _holder(tmp_path / "lock") == "unknown"


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite"])
def test_a_lock_that_cannot_be_written(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"undiffuse.train.run.os.{call}", full)
    with (
        pytest.raises(ResourceError, match=r"lock: its \d+ bytes could not be written \(No space"),
        Run(tmp_path).alone(),
    ):
        raise AssertionError("no lock")

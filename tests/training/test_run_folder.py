"""A run folder: its record, its lock and its metrics."""

import csv
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.data.from_array import from_array
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.model.config import Config, ModelConfig, TrainConfig, to_dict
from undiffuse.runtime.file_errors import FileProblem
from undiffuse.training.run_folder import Run, describe

DATA = from_array(np.arange(40).reshape(20, 2) % 5, name="tiny")
CONFIG = Config()


def test_a_run_is_opened_reopened_and_finished(tmp_path):
    run = Run(tmp_path / "deep" / "run")
    assert run.record is None
    assert not run.finished
    assert not run.folder.exists()  # `open` creates it
    run.open(CONFIG, DATA)
    assert sorted(f.name for f in run.folder.iterdir()) == ["checkpoints", "pictures", "run.json"]
    record = {"config": to_dict(CONFIG), "data": describe(DATA), "torch": torch.__version__, "finished": False}
    assert run.record == {**record, "id": run.id}
    record["id"] = run.id
    assert Run(tmp_path / "none").id == ""
    assert json.loads(json.dumps(describe(DATA))) == describe(DATA)
    assert describe(DATA)["fingerprint"] == DATA.fingerprint
    run.open(CONFIG, DATA)
    assert not run.finished
    run.finish()
    assert run.finished
    assert Run(str(run.folder)).record == {**record, "finished": True}
    assert not (run.folder / "run.json.partial").exists()


def test_only_files_of_the_run_are_removed(tmp_path):
    """What its own writes left, and nothing else: an interrupted evaluation once ended the next training."""
    run = Run(tmp_path)
    run.open(CONFIG, DATA)
    others = ["thesis.partial", "evaluation.json.partial"]
    for name in [
        *others,
        "run.json.partial",
        "metrics.jsonl.partial",
        "metrics.csv.partial",
        "model.safetensors.partial",
    ]:
        (tmp_path / name).touch()
    (tmp_path / "evaluation.partial").mkdir()
    run.open(CONFIG, DATA)
    assert {f.name for f in tmp_path.glob("*.partial")} == {*others, "evaluation.partial"}


def test_the_id_stays(tmp_path):
    """Of other recipes or data it is another; it stays when a run is resumed by force or extended."""
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    run.open(CONFIG, DATA)
    other.open(replace(CONFIG, train=replace(CONFIG.train, seed=1)), DATA)
    begun = run.id
    assert len(begun) == 64
    assert begun != other.id
    again = Run(tmp_path / "c")
    again.open(CONFIG, DATA)
    assert again.id == begun
    run.open(replace(CONFIG, train=replace(CONFIG.train, seed=1)), DATA, force=True)
    run.extend(replace(CONFIG, train=replace(CONFIG.train, seed=1, max_steps=9)), 3)
    run.finish()
    assert run.id == begun


def test_an_empty_folder_is_accepted(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    assert Run(tmp_path).record


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"lr": 0.5}, "train.lr was 0.001, now 0.5"),
        ("train", {"batch": 64, "seed": 1}, "train.batch was 128, now 64; train.seed was 0, now 1"),
        ("train", {"max_steps": 3}, "train.max_steps was None, now 3"),
        ("train", {"betas": (0.9, 0.9)}, "train.betas was [0.9, 0.99], now [0.9, 0.9]"),
        ("train", {"flip": True}, "train.flip was False, now True"),
        ("model", {"chain_length": 10}, "model.chain_length was 1000, now 10"),
        ("model", {"schedule": {"name": "cosine"}}, "model.schedule.name was 'linear_log_snr', now 'cosine'"),
        ("model", {"network": {"kind": "unet", "heads": 2}}, "model.network.heads was None, now 2"),
        ("model", {"variance": "large"}, "model.variance was 'small', now 'large'"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_setting_named(tmp_path, section, changes, message):
    Run(tmp_path).open(CONFIG, DATA)
    changed = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})
    with pytest.raises(ConfigError) as caught:
        Run(tmp_path).open(changed, DATA)
    assert caught.value.exit_code == 2
    assert message in str(caught.value)
    assert Run(tmp_path).record["config"] == to_dict(CONFIG)


def test_changed_data_are_refused(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    with pytest.raises(ConfigError, match=r"data\.fingerprint was") as caught:
        Run(tmp_path).open(CONFIG, from_array(DATA.values[::-1] + 0, num_values=5))
    assert caught.value.exit_code == 2
    Run(tmp_path).open(CONFIG, from_array(DATA.values + 0, num_values=5, name="equal data of another name"))


def test_a_run_killed_before_its_record_can_be_started_again(tmp_path):
    Run(tmp_path).open(CONFIG, DATA)
    (tmp_path / "run.json").rename(tmp_path / "run.json.partial")
    Run(tmp_path).open(CONFIG, DATA)
    assert Run(tmp_path).record is not None


def test_a_run_killed_at_its_record_can_be_started_again_with_skipped_files(tmp_path, monkeypatch):
    """skipped.json was written before the record, and the folder was then refused as one of the user's."""
    problem = FileProblem(tmp_path / "a.png", "EMPTY_FILE", "the file is empty")
    data, run = replace(DATA, report=replace(DATA.report, skipped=(problem,))), Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_write", lambda self, record: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.open(CONFIG, data)
    run.open(CONFIG, data)
    assert json.loads((run.folder / "skipped.json").read_text())[0]["code"] == "EMPTY_FILE"


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
    """A copy step-best beside no checkpoint once kept the weights of --init from being read."""
    run = Run(tmp_path)
    (run.checkpoints / "step-best").mkdir(parents=True)
    assert not run.has_checkpoint()
    (run.checkpoints / "step-00000003").mkdir()
    assert run.has_checkpoint()


def test_folders_with_other_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is neither empty nor a run"):
        Run(tmp_path).open(CONFIG, DATA)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ResourceError, match="cannot be created"):
        Run(tmp_path / "thesis.tex").open(CONFIG, DATA)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"config": {}}', '{"config": 1, "data": 3, "finished": 1}'])
def test_damaged_records_are_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    for read in (lambda run: run.record, lambda run: run.finished, lambda run: run.open(CONFIG, DATA)):
        with pytest.raises(CheckpointError, match="not the record of a run"):
            read(Run(tmp_path))


def test_metrics_are_read_as_written(tmp_path):
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
        file.write('{"step": 4, "lo')  # an incomplete line
    messages = []
    assert run.read_metrics(log=messages.append) == records
    assert messages == []  # a kill leaves it
    run.metrics.write_bytes(b'\xff\n{"step": "4"}\n' + run.metrics.read_bytes())
    assert run.read_metrics(log=messages.append) == records
    assert messages == [f"{run.metrics}: 2 damaged lines are left out"]
    run.metrics.unlink()
    run.metrics.mkdir()
    assert run.read_metrics(log=messages.append) == []
    assert "cannot be read (Is a directory)" in messages[1]


def test_a_run_has_one_writer(tmp_path):
    run = Run(tmp_path / "run")
    with run.exclusive():
        with (
            pytest.raises(ResourceError, match=rf"error\[BUSY\] .*process {os.getpid()} is training into") as caught,
            run.exclusive(),
        ):
            raise AssertionError("two writers")
        assert caught.value.exit_code == 6
    with run.exclusive():  # the lock is free again
        pass

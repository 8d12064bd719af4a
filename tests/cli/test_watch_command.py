"""`undiffuse watch`: the curves of a run that trains, has stopped or is finished."""

import json
import math
import os
import random
import sys

import numpy as np
import pytest
from rich.console import Console

from undiffuse.cli import main
from undiffuse.cli import watch as command
from undiffuse.data.from_array import from_array
from undiffuse.model.config import Config, TrainConfig
from undiffuse.report import table
from undiffuse.report.table import BARS, spark
from undiffuse.training.run_folder import Run

DATA = from_array(np.arange(40).reshape(20, 2) % 5, name="tiny")


def started(folder, settings, records=()):
    run = Run(folder)
    run.open(Config(train=TrainConfig(**settings)), DATA)
    for record in records:
        run.append_metrics(record)
    return run


def shown(run):
    console = Console(width=120)
    with console.capture() as caught:
        console.print(command.summary(run))
    return caught.get()


RECORDS = [
    {"step": 50, "seconds": 10.0, "loss": 1.0, "lr": 0.5, "items_per_second": 9.0, "gradient_norm": 2.0},
    {"step": 60, "seconds": 12.0, "bits_per_dim": 3.25, "gap": 0.01, "gap_stderr": 0.1, "overfit": False},
    {"step": 100, "seconds": 20.0, "loss": 0.5, "lr": 0.25, "items_per_second": 8.0, "gradient_norm": 1.0},
    {"step": 120, "seconds": 24.0, "bits_per_dim": 3.5, "gap": 0.5, "gap_stderr": 0.1, "overfit": True},
]


def test_spark(monkeypatch):
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert spark([5, 5]) == "▁▁"
    assert spark([]) == ""
    assert spark([1, math.nan, 2]) == "▁ █"
    assert spark([math.nan] * 3) == "   "
    assert len(spark(list(range(1000)))) == 40
    monkeypatch.setattr(table, "MAX_BARS", 4)
    assert spark(list(range(100))) == "▁▃▆█"


def test_a_run_that_stopped(tmp_path):
    run = started(tmp_path / "run", {"max_steps": 480}, RECORDS)
    for name in ("step-00000120", "step-best", "step-"):
        (run.checkpoints / name).mkdir()
    output = shown(run)
    assert output.startswith("tiny, stopped; the command that began it resumes it: ")
    assert "step 120 after 0:24, about 1:12 left · last checkpoint at step 120" in output
    assert "training loss         0.5  █▁" in output
    assert "held out, bits/dim         3.5  ▁█" in output
    assert "best held out        3.25  at step 60" in output
    assert "learning rate        0.25" in output
    assert "overfitting: " in output
    assert "final" not in output
    run.append_metrics({"step": 150, "seconds": 30.0, "loss": 0.4})
    assert "overfitting: " in shown(run)  # until another evaluation
    run.append_metrics(RECORDS[1] | {"step": 160, "bits_per_dim": 3.0, "final_bits_per_dim": 3.125})
    output = shown(run)
    assert "overfitting: " not in output
    assert "best held out           3  at step 160" in output
    assert "final, more noise levels       3.125  at step 160" in output
    run.append_metrics({"step": 170, "final_bits_per_dim": 3.0625, "final_stderr": 0.125})
    assert "final, more noise levels      3.0625  ± 0.12  at step 170" in shown(run)


def test_the_process_that_holds_the_lock(tmp_path):
    """A process id in the file is no proof: the process may have been killed and the id given to another."""
    run = started(tmp_path / "run", {"max_steps": 480})
    for number in (os.getpid(), 1):
        (run.folder / "lock").touch()
        (run.folder / "lock.pid").write_text(f"{number}\n")
        assert run.training_pid is None
        assert "tiny, stopped; " in shown(run)
    with run.exclusive():
        assert run.training_pid == str(os.getpid())
        assert f"training, process {os.getpid()}" in shown(run)
        assert run.training_pid == str(os.getpid())  # reading it has not released it
    assert run.training_pid is None


def test_the_time_left_of_a_run_by_the_clock(tmp_path):
    run = started(tmp_path / "run", {"minutes": 2.0}, RECORDS[:3])
    with run.exclusive():
        output = shown(run)
    assert f"training, process {os.getpid()}" in output
    assert "step 100 after 0:20, about 1:40 left · no checkpoint yet" in output
    assert "overfitting: " not in output
    run.metrics.write_text(run.metrics.read_text() + '{"step": 150, "lo')  # an incomplete line
    assert shown(run).partition("step")[2] == output.partition("step")[2]


def test_odd_lines_are_not_shown(tmp_path, call):
    run = started(tmp_path / "run", {"max_steps": 10**15}, RECORDS)
    whole = shown(run)
    lines = [b"\xff", b"{}", b"[1]", b'{"step": "x"}', b'{"step": 130, "loss": "low"}', b'{"step": 1e999}', b"[" * 9**5]
    lines += [b'{"step": 1, "seconds": 1e99}', b'{"step": 1, "bits_per_dim": {}}', b'{"seconds": 3}']
    run.metrics.write_bytes(run.metrics.read_bytes() + b"\n".join(lines))
    assert shown(run) == whole
    assert call("watch", run.folder, "--once", "--tensorboard", tmp_path / "board").code in (0, 2)  # 2: not installed
    run.metrics.write_bytes(b'{"step": 1, "seconds": 1e10}\n')
    assert "step 1 after" in shown(run)
    g, original = random.Random(0), run.metrics.read_bytes()
    run.metrics.unlink()
    for record in RECORDS:
        run.append_metrics(record)
    original = run.metrics.read_bytes()
    for _ in range(300):
        content = bytearray(original)
        content[g.randrange(len(content))] ^= 1 << g.randrange(8)
        run.metrics.write_bytes(content)
        assert "stopped" in shown(run)


def test_a_finished_run_and_one_without_steps(tmp_path, capsys):
    run = started(tmp_path / "run", {"max_steps": 120}, RECORDS)
    run.finish()
    assert main(["watch", str(run.folder)]) == 0  # ends without Ctrl-C
    output = capsys.readouterr().out
    assert "finished" in output
    assert "left" not in output
    assert output.endswith("\n")
    fresh = started(tmp_path / "fresh", {"max_steps": 120})
    before = {f: f.stat().st_mtime_ns for f in fresh.folder.rglob("*")}
    assert main(["watch", str(fresh.folder), "--once"]) == 0
    assert "step 0 after 0:00 · no checkpoint yet" in capsys.readouterr().out
    assert before == {f: f.stat().st_mtime_ns for f in fresh.folder.rglob("*")}  # nothing is changed
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 4
    assert "there is no run in this folder" in capsys.readouterr().err


def test_the_display_ends_with_the_run_or_ctrl_c(tmp_path, monkeypatch, capsys):
    run, naps = started(tmp_path / "run", {"max_steps": 120}, RECORDS[:1]), []

    def sleep(seconds):
        naps.append(seconds)
        run.append_metrics(RECORDS[len(naps)])
        if len(naps) == 3:
            run.finish()

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["watch", str(run.folder), "--every", "7"]) == 0
    assert main(["watch", str(run.folder), "--every", "nan"]) == 2
    assert naps == [7.0] * 3
    assert "step 120" in capsys.readouterr().out

    def interrupt(_):
        raise KeyboardInterrupt

    going = started(tmp_path / "going", {"max_steps": 120}, RECORDS[:1])
    monkeypatch.setattr(command.time, "sleep", interrupt)
    assert main(["watch", str(going.folder)]) == 0
    capsys.readouterr()
    assert main(["watch", str(going.folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["finished"], said["records"]) == (False, RECORDS[:1])


def test_tensorboard_gets_the_records_of_the_run(tmp_path, monkeypatch, capsys):
    run = started(tmp_path / "run", {"max_steps": 120}, RECORDS)
    run.finish()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["watch", str(run.folder), "--tensorboard", str(tmp_path / "board")]) == 2
    assert "pip install 'undiffuse[tensorboard]'" in capsys.readouterr().err
    monkeypatch.undo()
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the extra `tensorboard`",
    )
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "board"):
        assert main(["watch", str(run.folder), "--once", "--tensorboard", str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error[OUT] --tensorboard {folder}: is not a folder that can be written (")
        assert said.count("\n") == 1
    for _ in range(2):  # the second time replaces what the first one wrote
        assert main(["watch", str(run.folder), "--tensorboard", str(tmp_path / "board")]) == 0
    read = accumulator.EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == sorted({key for r in RECORDS for key in r} - {"step"})
    for name in ("loss", "bits_per_dim", "overfit"):
        points = [(e.step, e.value) for e in read.Scalars(name)]
        assert points == [(r["step"], float(r[name])) for r in RECORDS if name in r]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]) == RECORDS[0]


def test_a_run_that_is_removed_while_it_is_watched(tmp_path, call, monkeypatch):
    run = Run(tmp_path / "run")
    run.open(Config(), DATA)
    monkeypatch.setattr("time.sleep", lambda seconds: run.folder.rename(tmp_path / "elsewhere"))
    code, _, err = call("watch", run.folder)
    assert (code, err) == (
        4,
        f"error[NOT_FOUND] {run.folder}: there is no run in this folder. Give the folder of a run.\n",
    )

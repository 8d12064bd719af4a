"""The demo's floor of steps, with a tiny recipe and a clock that only the work moves."""

import functools
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import SlowMachine, data, recipe

from undiffuse.cli import demo
from undiffuse.cli.demo import MAX_MINUTES, MINUTES, extend_to_floor, train
from undiffuse.runtime.own_output import is_marked_picture
from undiffuse.training import diffusion_task
from undiffuse.training.run_folder import Run
from undiffuse.training.train_state import verify_checkpoint


@pytest.mark.parametrize(("seconds", "longer"), [(2.0, False), (3.0, True), (15.0, True)])
def test_a_slow_machine_trains_for_longer(tmp_path, monkeypatch, seconds, longer):
    """Steps of 2 s make the sixty; of 3 s make them in a longer run; of 15 s not in six minutes, the most."""

    monkeypatch.setattr(demo, "MIN_STEPS", 60)
    monkeypatch.setattr(diffusion_task, "FINAL_STEPS", 5)
    tiny = recipe(max_steps=None, previews=8, snapshots=0, batch=2, conditional=False, minutes=1.0)
    monkeypatch.setattr("undiffuse.model.presets.get", lambda name: tiny)
    machine, items, run = SlowMachine(monkeypatch, step=seconds, call=seconds / 6), data(), Run(tmp_path)
    fit = functools.partial(diffusion_task.fit, clock=machine)
    monkeypatch.setattr(diffusion_task, "fit", lambda task, data, run, device, init, quiet, force: fit(task, data, run))
    began, text = machine.now, io.StringIO()
    console = Console(file=text, width=300)
    train(items, run, MINUTES, console)
    first = verify_checkpoint(max(run.checkpoints.glob("step-*"))).step
    extend_to_floor(items, run, console)
    steps, minutes = verify_checkpoint(max(run.checkpoints.glob("step-*"))).step, (machine.now - began) / 60
    assert run.finished
    assert minutes <= MAX_MINUTES * 1.05
    said = re.findall(r"(\d+) steps in 2.5 minutes are too few on this machine: training goes on for", text.getvalue())
    assert [int(number) for number in said] == [first] * longer
    assert (steps > first) == longer
    assert (steps >= 60) == (seconds < 15)
    assert minutes > MAX_MINUTES - 0.3 or seconds < 15
    extend_to_floor(items, run, console)  # the command, repeated
    assert verify_checkpoint(max(run.checkpoints.glob("step-*"))).step == steps


def test_a_run_of_given_steps_is_not_extended(tmp_path):
    """The demo's folder may hold one that `train --steps` has made."""
    items, run = data(), Run(tmp_path)
    diffusion_task.fit_diffusion(recipe(max_steps=1, previews=0), items, tmp_path, device="cpu", quiet=True)
    extend_to_floor(items, run, Console(file=io.StringIO()))
    assert run.record["config"]["train"]["max_steps"] == 1


@pytest.mark.release
def test_every_file_that_the_demo_names_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = io.StringIO()
    demo.demo(Path("run"), 0.3, Console(file=text, width=300))
    named = re.findall(r"^(?:model: )?(\S+\.(?:png|html|safetensors))\b", text.getvalue(), re.M)
    assert len(named) == 6
    assert all((tmp_path / name).is_file() for name in named)
    assert all(map(is_marked_picture, Path("run").glob("pictures/*.png")))

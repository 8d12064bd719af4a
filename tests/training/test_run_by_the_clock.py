"""Runs by the clock on machines of any speed: what is recorded, how long evaluations take, and when a run ends.

The clock is a `SlowMachine`, which only the work moves: nothing waits.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import SlowMachine, checkpoint_hashes, data, quick_looks, recipe, stopping_at

from undiffuse.training import fit as loop
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.fit import fit
from undiffuse.training.monitor import Monitor
from undiffuse.training.nonfinite import UnreadSteps
from undiffuse.training.posthoc_ema import EMASnapshots
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run

DATA = data(40)


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):

    monkeypatch.setattr("undiffuse.training.diffusion_task.FINAL_STEPS", 20)


@pytest.fixture
def lines(monkeypatch):
    printed = []
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: printed.append(line))
    return printed


def by_the_clock(minutes, **settings):
    return recipe(max_steps=None, **({"minutes": minutes, "previews": 8, "snapshots": 0} | settings))


def train(folder, config, clock, items=DATA):
    fit(DiffusionTask(config), items, Run(folder), device="cpu", quiet=True, clock=clock)
    return Run(folder)


def test_rates_are_those_of_the_steps_alone(tmp_path, monkeypatch):
    """Twelve items in half a second, a fifth of it waiting, whatever evaluations and checkpoints cost."""
    machine = SlowMachine(monkeypatch, step=0.4, call=0.01, save=7.0)
    real = loop.Batches.__call__

    def waits(batches, step):
        machine.now += 0.1
        batches.waited += 0.1
        return real(batches, step)

    monkeypatch.setattr(loop.Batches, "__call__", waits)
    run = train(tmp_path, recipe(max_steps=120, previews=7, snapshots=0), machine)
    records = [r for r in run.read_metrics() if "loss" in r]
    assert [r["step"] for r in records] == [50, 100, 120]
    assert [r["items_per_second"] for r in records] == [24.0] * 3
    assert [r["data_share"] for r in records] == pytest.approx([0.2] * 3)
    assert sum("bits_per_dim" in r for r in run.read_metrics()) == 7


@pytest.mark.parametrize(
    ("minutes", "call", "save", "evaluations"),
    [(1, 0.001, 0.0, 3), (1, 0.02, 0.1, 3), (1, 0.1, 0.5, 1), (1, 0.4, 0.5, 1), (4, 0.05, 0.1, 2), (4, 0.2, 1.0, 1)],
)
def test_evaluations_take_their_share_and_the_run_its_minutes(tmp_path, monkeypatch, minutes, call, save, evaluations):
    """From a machine with time for everything to one on which an evaluation of full size takes four minutes.

    A step of twelve items takes as long as 36 network calls, or a second on the fastest machine.
    """
    machine = SlowMachine(monkeypatch, step=max(36 * call, 1.0), call=call, save=save)
    began, in_evaluations, real = machine.now, [], Monitor._evaluate

    def evaluate(monitor, *arguments, **options):
        at = machine.now
        real(monitor, *arguments, **options)
        in_evaluations.append(machine.now - at)

    monkeypatch.setattr(Monitor, "_evaluate", evaluate)
    run = train(tmp_path, by_the_clock(minutes), machine)
    allowed = max(5.0, 3.0 * minutes)
    assert abs(machine.now - began - 60 * minutes) <= allowed
    assert sum(in_evaluations) <= allowed
    measured = [r for r in run.read_metrics() if "bits_per_dim" in r]
    assert len(in_evaluations) >= evaluations
    assert measured or call >= 0.1  # on those a single item takes a second
    for r in measured:
        assert 2 <= r["items"] <= 11
        assert 2 <= r["mc_samples"] <= 8
    assert run.finished


@pytest.mark.parametrize("what", ["snapshots", "waits"])
def test_the_time_of_snapshots_and_of_waits_for_a_gpu_is_part_of_the_run(tmp_path, monkeypatch, what):
    """A snapshot takes four seconds, or each reading of queued steps two, which its record has too."""
    machine = SlowMachine(monkeypatch, step=0.5)
    began, where = (
        machine.now,
        (EMASnapshots, "write_if_due") if what == "snapshots" else (UnreadSteps, "require_finite"),
    )
    real, due = getattr(*where), EMASnapshots.is_due

    def slow(self, progress, *arguments):
        machine.now += 4.0 * due(self, progress, arguments[0]) if what == "snapshots" else 2.0
        return real(self, progress, *arguments)

    monkeypatch.setattr(*where, slow)
    run = train(tmp_path, by_the_clock(2, snapshots=4 if what == "snapshots" else 0), machine)
    assert abs(machine.now - began - 120) <= 6
    last = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    assert abs(machine.now - began - json.loads((last / "progress.json").read_text())["seconds"]) <= 6
    rates = [r["items_per_second"] for r in run.read_metrics() if "loss" in r]
    if what == "waits":
        assert rates[0] == round(50 * 12 / (50 * 0.5 + 2.0), 1)


def test_a_machine_that_slows_down_in_an_evaluation_makes_up_for_it(tmp_path, monkeypatch):
    """Network calls take eight times as long from the second evaluation on; later ones are smaller, or left out."""
    machine = SlowMachine(monkeypatch, step=1.0, call=0.005)
    began, spent, real = machine.now, [], Monitor._evaluate

    def evaluate(monitor, *arguments, **options):
        machine.call, at = 0.005 if not spent else 0.04, machine.now
        real(monitor, *arguments, **options)
        spent.append(machine.now - at)

    monkeypatch.setattr(Monitor, "_evaluate", evaluate)
    train(tmp_path, by_the_clock(2), machine)
    assert sum(spent) <= 6.0 * 1.1  # the guess was wrong once
    assert abs(machine.now - began - 120) <= 6


def test_a_small_evaluation_says_how_small_it_is(tmp_path, monkeypatch, lines):
    machine = SlowMachine(monkeypatch, step=1.0, call=0.02)
    run = train(tmp_path, by_the_clock(1), machine, data(200))
    first = next(r for r in run.read_metrics() if "bits_per_dim" in r)
    assert first["items"] < 40
    assert any(f"bits/dim ({first['items']} items, {first['mc_samples']} noise levels)" in line for line in lines)


def test_an_evaluation_of_full_size_is_the_same_by_steps_and_by_the_clock(tmp_path, monkeypatch):
    """Nothing that the clock decides is part of an evaluation for which there is time."""
    monkeypatch.setattr("undiffuse.training.monitor.FORWARD_PASSES", 1e9)  # evaluations take no time, as they do here
    machine = SlowMachine(monkeypatch, step=6.0)
    clock = train(tmp_path / "clock", by_the_clock(1, decay=0.0), machine)
    steps = clock.read_metrics()[-1]["step"]
    counted = train(tmp_path / "steps", recipe(max_steps=steps, previews=1, snapshots=0, decay=0.0), machine)
    one, other = (r.read_metrics()[-1] for r in (clock, counted))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert "final_bits_per_dim" in one


def test_the_number_of_draws_does_not_change_training(tmp_path, monkeypatch):
    """The same steps on a machine with time for full evaluations and on one without."""
    weights, measured = [], []
    for name, call in (("fast", 1e-6), ("slow", 0.02)):
        with pytest.MonkeyPatch.context() as patch:
            machine = SlowMachine(patch, step=1.5, call=call)
            patch.setattr(Progress, "fraction", lambda progress, settings: min(progress.step / 40, 1.0))
            patch.setattr(loop, "plan_lr_decay", lambda p, _: vars(p).update(last_step=40))
            patch.setattr(loop, "lr_factor", lambda *_: 1.0)
            run = train(tmp_path / name, by_the_clock(1), machine)
        weights.append(checkpoint_hashes(run.folder, 40))
        measured.append([(r["items"], r["mc_samples"]) for r in run.read_metrics() if "items" in r])
    assert weights[0] == weights[1]
    assert measured[0] != measured[1]


@pytest.mark.parametrize("previews", [4, 0])
def test_a_run_that_is_stopped_often_ends_in_time(tmp_path, monkeypatch, previews):
    machine = SlowMachine(monkeypatch, step=1.0, call=0.001, save=0.1)
    began = machine.now
    for step in (5, 11, 40):
        with stopping_at(step):
            train(tmp_path, by_the_clock(1, previews=previews), machine)
    train(tmp_path, by_the_clock(1, previews=previews), machine)
    assert abs(machine.now - began - 60) <= 5


@pytest.mark.parametrize("again", [False, True])
def test_an_evaluation_due_at_a_stop_is_made_after_it(tmp_path, monkeypatch, again):
    """The curve of a stopped run is that of an uninterrupted one, also where the stop is in the same step."""
    config = recipe(max_steps=8, previews=4, snapshots=0)
    machine = SlowMachine(monkeypatch, step=1.0)
    whole = train(tmp_path / "whole", config, machine)
    with stopping_at(4):
        train(tmp_path / "stopped", config, machine)
    if again:  # stopped after that evaluation, with no step between
        with stopping_at(0):
            train(tmp_path / "stopped", config, machine)
    stopped = train(tmp_path / "stopped", config, machine)
    curves = [
        [(r["step"], r["bits_per_dim"]) for r in run.read_metrics() if "bits_per_dim" in r] for run in (whole, stopped)
    ]
    assert [step for step, _ in curves[0]] == [2, 4, 6, 8]
    assert curves[0] == curves[1]


def test_losses_before_a_last_step_that_is_skipped_are_recorded(tmp_path, monkeypatch):
    real = loop.find_nonfinite
    monkeypatch.setattr(
        loop, "find_nonfinite", lambda losses, norms: "nan" if next(steps) == 7 else real(losses, norms)
    )
    monkeypatch.setattr(loop, "skip_step", lambda *_: "skipped")
    steps = iter(range(8))
    with quick_looks():
        run = train(tmp_path, recipe(max_steps=8, previews=1, snapshots=0), SlowMachine(monkeypatch, step=0.5))
    (record,) = (r for r in run.read_metrics() if "loss" in r)
    assert record["step"] == 8
    assert np.isfinite([record["loss"], record["gradient_norm"]]).all()
    assert record["items_per_second"] == 24.0


def test_a_run_that_hardly_trained_says_so(tmp_path, monkeypatch, lines):
    """Fewer items than an epoch, or a bound that is not below the cost of independent values."""
    few = train(tmp_path / "few", by_the_clock(1, lr=1e-6), SlowMachine(monkeypatch, step=1.0), data(2000))
    assert few.finished
    hints = [line.strip() for line in lines if "hardly trained: " in line]
    assert hints[-1].startswith("hardly trained: 57 steps saw 684 of 1,199 training items. Give more --minutes")
    assert any("hardly trained: values drawn independently cost only " in hint for hint in hints)
    del lines[:]
    monkeypatch.setattr("undiffuse.training.diffusion_task.shared_values", lambda *_: 99.0)
    train(tmp_path / "enough", by_the_clock(1), SlowMachine(monkeypatch, step=1.0))
    assert not any("hardly" in line for line in lines), lines
    del lines[:]
    train(tmp_path / "steps", recipe(max_steps=1, previews=0), SlowMachine(monkeypatch, step=3.0), data(400))
    assert not any("hardly" in line for line in lines)  # its number of items was chosen in steps
    monkeypatch.setattr("undiffuse.training.diffusion_task.shared_values", lambda *_: 0.5)
    train(tmp_path / "again", recipe(max_steps=1, previews=0), SlowMachine(monkeypatch, step=3.0), data(400))
    hint = "hardly trained: values drawn independently cost only 0.500 bits/dim. Give more --steps (--extend continues"
    assert sum(hint in line for line in lines) == 1


@pytest.mark.parametrize(("step", "shown"), [(60, ["2.0"]), (80, []), (110, ["1.5"])])
def test_a_loss_is_printed_by_the_next_evaluation_alone(step, shown):
    """Also in the line of a resumed run, whose records are those of the run."""
    records = [{"step": 50, "loss": 2.0}, {"step": 60, "bits_per_dim": 3.0}, {"step": 80, "bits_per_dim": 3.0}]
    records += [{"step": 100, "loss": 1.5}, {"step": 110, "bits_per_dim": 3.0}]
    seen = SimpleNamespace(records=[r for r in records if r["step"] <= step], progress=Progress(step=step))
    assert Monitor._measured(seen, "loss", "{}") == shown


def test_setting_up_is_part_of_the_time(tmp_path, monkeypatch):
    machine = SlowMachine(monkeypatch, step=1.0)
    began, real = machine.now, loop.build_model

    def build(*arguments):
        machine.now += 20
        return real(*arguments)

    monkeypatch.setattr(loop, "build_model", build)
    run = train(tmp_path, by_the_clock(1, previews=0), machine)
    assert abs(machine.now - began - 60) <= 5
    assert run.read_metrics()[-1]["step"] == pytest.approx(60 - 20 - 2.5, abs=1)


@pytest.mark.parametrize("setup", [0, 10])
def test_an_evaluation_at_the_start_of_a_resumed_run_has_a_limit(tmp_path, monkeypatch, setup):
    """The pace is that of the last step before the stop, since none has been made yet. Setting up takes none of it."""
    machine = SlowMachine(monkeypatch, step=1.0, call=0.03)
    spent, real = [], Monitor._evaluate

    def evaluate(monitor, *arguments, **options):
        at = machine.now
        real(monitor, *arguments, **options)
        spent.append(machine.now - at)

    monkeypatch.setattr(Monitor, "_evaluate", evaluate)
    with stopping_at(30):  # in the middle, where an evaluation is due
        train(tmp_path, by_the_clock(1, previews=2), machine)
    assert spent == []
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *a: (setattr(machine, "now", machine.now + setup), build(*a))[1])
    train(tmp_path, by_the_clock(1, previews=2), machine)
    assert len(spent) == 2
    assert 0 < spent[0] <= 2.5

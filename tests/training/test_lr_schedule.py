"""The learning rate over a run: warmup, plateau and decay."""

import math

import pytest

from undiffuse.model.config import TrainConfig
from undiffuse.training.lr_schedule import lr_factor, plan_lr_decay
from undiffuse.training.progress import Progress, measuring_allowance, training_seconds


def lr_factors(settings, seconds_per_step=1.0, max_steps=10_000):
    """The factor of every step of a run, and its progress at the end."""
    progress, factors = Progress(), []
    plan_lr_decay(progress, settings)
    while not progress.done and progress.step < max_steps:
        factors.append(lr_factor(progress, settings))
        progress.step += 1
        progress.seconds += seconds_per_step
        plan_lr_decay(progress, settings)
    return factors, progress


def test_a_run_of_given_steps():
    factors, progress = lr_factors(TrainConfig(max_steps=100, warmup=10, decay=0.4))
    assert (progress.step, progress.decay_from, progress.last_step) == (100, 60, 100)
    assert factors[:10] == pytest.approx([k / 10 for k in range(1, 11)])  # full at the tenth step
    assert factors[10:61] == [1.0] * 51
    assert factors[60:] == pytest.approx([(100 - k) / 40 for k in range(60, 100)])  # the 101st would be 0
    assert lr_factor(progress, TrainConfig(max_steps=100, warmup=10, decay=0.4)) == 0.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 0, "decay": 0.0}, [1.0] * 8),
        ({"warmup": 4, "decay": 0.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"warmup": 0, "decay": 1.0}, [k / 8 for k in range(8, 0, -1)]),
        ({"warmup": 8, "decay": 1.0}, [min(k, 9 - k) / 8 for k in range(1, 9)]),  # warmup and decay meet
        ({"warmup": 100, "decay": 0.0}, [k / 100 for k in range(1, 9)]),
    ],
)
def test_short_runs(settings, expected):
    assert lr_factors(TrainConfig(max_steps=8, **settings))[0] == pytest.approx(expected)


def test_a_run_of_given_minutes():
    """One second a step, two minutes of which three seconds are for the last measurement, decay 0.25."""
    settings = TrainConfig(minutes=2.0, warmup=10, decay=0.25)
    factors, progress = lr_factors(settings)
    assert (progress.decay_from, progress.last_step, progress.step) == (88, 117, 117)
    assert factors[10:88] == [1.0] * 78
    assert factors[88:] == pytest.approx([(117 - k) / (0.25 * 117) for k in range(88, 117)])


@pytest.mark.parametrize("slower", [0.25, 4.0])
def test_a_machine_that_changes_its_speed_ends_in_time(slower):
    """The speed changes by a factor of four when the decay has begun; the rate still falls to 0, at the end."""
    settings = TrainConfig(minutes=2.0, warmup=0, decay=0.3)
    progress, factors = Progress(), []
    plan_lr_decay(progress, settings)
    while not progress.done:
        factors.append(lr_factor(progress, settings))
        progress.step_seconds = 1.0 if progress.seconds < 90 else slower
        progress.step, progress.seconds = progress.step + 1, progress.seconds + progress.step_seconds
        plan_lr_decay(progress, settings)
    assert abs(progress.seconds - 117) <= slower / 2
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 1.5 * slower / (0.3 * 117)


def test_a_plan_by_the_clock():
    """A step more is made where it ends nearer to the time than now; ``late`` has no time left after one step."""
    settings = TrainConfig(minutes=2.0, decay=0.25)
    progress = Progress(step=100, seconds=90.0, step_seconds=4.0)
    plan_lr_decay(progress, settings)
    assert (progress.decay_from, progress.last_step) == (100, None)
    progress.step, progress.seconds = 107, 114.9
    plan_lr_decay(progress, settings)
    assert (progress.decay_from, progress.last_step) == (100, None)
    progress.step, progress.seconds = 108, 115.1
    plan_lr_decay(progress, settings)
    assert (progress.decay_from, progress.last_step) == (100, 108)
    plan_lr_decay(progress, TrainConfig(minutes=3.0, decay=0.25))
    assert (progress.decay_from, progress.last_step) == (None, None)  # a longer run
    late = Progress(step=5, seconds=1e4)
    plan_lr_decay(late, settings)
    assert late.done
    none = Progress(seconds=1e4)
    plan_lr_decay(none, settings)
    assert not none.done  # one step at least
    endless = Progress(step=50, seconds=50.0)
    plan_lr_decay(endless, TrainConfig())
    assert endless.last_step is None


def test_the_time_for_measurements():
    """5 % or 5 s, of a very short run a quarter; half of it is for the last one. Runs of given steps have no limit."""
    for minutes, seconds in ((10, 30), (1, 5), (100, 300), (0.1, 1.5)):
        settings = TrainConfig(minutes=minutes)
        assert measuring_allowance(settings) == pytest.approx(seconds)
        assert training_seconds(settings) == pytest.approx(60 * minutes - seconds / 2)
    settings = TrainConfig(max_steps=9)
    assert measuring_allowance(settings) == training_seconds(settings) == math.inf


def test_the_fraction_that_is_done():
    """By steps once the last one is planned, else by the clock; the larger one where both are given."""
    by_steps, by_clock = TrainConfig(max_steps=10), TrainConfig(minutes=1.0)
    assert Progress(step=4, last_step=10).fraction(by_steps) == 0.4
    assert Progress(step=4, seconds=15.0).fraction(by_clock) == 0.25
    assert Progress(step=4, seconds=75.0).fraction(by_clock) == 1.0
    assert Progress(step=4, seconds=15.0, last_step=8).fraction(by_clock) == 0.5
    assert Progress(step=4, seconds=45.0, last_step=8).fraction(by_clock) == 0.75
    assert Progress(step=4).fraction(by_steps) == 0.0
    assert [Progress(step=k, last_step=4).done for k in (3, 4, 5)] == [False, True, True]

"""The learning rate over a run: warmup, plateau and decay."""

import pytest

from undiffuse.model.config import TrainConfig
from undiffuse.training.lr_schedule import lr_factor, plan_lr_decay
from undiffuse.training.progress import Progress


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
    """One second a step, two minutes, decay 0.25: the decay starts at 90 s and takes the remaining 30 s."""
    settings = TrainConfig(minutes=2.0, warmup=10, decay=0.25)
    factors, progress = lr_factors(settings)
    assert (progress.decay_from, progress.last_step, progress.step) == (90, 120, 120)
    assert factors[10:91] == [1.0] * 81
    assert factors[90:] == pytest.approx([(120 - k) / 30 for k in range(90, 120)])


def test_a_plan_is_made_once():
    settings = TrainConfig(minutes=2.0, decay=0.25)
    progress = Progress(step=100, seconds=90.0)
    plan_lr_decay(progress, settings)
    plan = (progress.decay_from, progress.last_step)
    assert plan == (100, 100 + round(30 * 100 / 90))
    progress.step, progress.seconds = 105, 1000.0
    plan_lr_decay(progress, settings)
    assert (progress.decay_from, progress.last_step) == plan
    late = Progress(step=5, seconds=1e4)  # the time is over: one more step
    plan_lr_decay(late, settings)
    assert (late.decay_from, late.last_step) == (5, 6)
    early = Progress(step=50, seconds=50.0)
    plan_lr_decay(early, settings)
    assert early.last_step is None
    endless = Progress(step=50, seconds=50.0)
    plan_lr_decay(endless, TrainConfig())
    assert endless.last_step is None


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

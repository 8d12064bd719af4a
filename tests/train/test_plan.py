"""When the rate rises and falls, and which items and numbers a step has: functions of few numbers, no model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.config import TrainConfig
from undiffuse.data import from_array
from undiffuse.errors import ConfigError
from undiffuse.randomness import generator
from undiffuse.train.batch import batch_order, global_batch, shares
from undiffuse.train.loop import plan, precision_of, rate
from undiffuse.train.state import Progress


def rates(settings, seconds_a_step=1.0, most=10_000):
    """The rate of every step of a run, and its progress at the end."""
    progress, seen = Progress(), []
    plan(progress, settings)
    while (progress.last_step is None or progress.step < progress.last_step) and progress.step < most:
        seen.append(rate(progress, settings))
        progress.step += 1
        progress.seconds += seconds_a_step
        plan(progress, settings)
    return seen, progress


def test_so_many_steps():
    seen, progress = rates(TrainConfig(steps=100, warmup=10, decay=0.4))
    assert (progress.step, progress.decay_from, progress.last_step) == (100, 60, 100)
    assert seen[:10] == pytest.approx([k / 10 for k in range(1, 11)])  # rises, full at the tenth step
    assert seen[10:61] == [1.0] * 51
    assert seen[60:] == pytest.approx([(100 - k) / 40 for k in range(60, 100)])  # and the 101st would be 0
    assert rate(progress, TrainConfig(steps=100, warmup=10, decay=0.4)) == 0.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 0, "decay": 0.0}, [1.0] * 8),
        ({"warmup": 4, "decay": 0.0}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"warmup": 0, "decay": 1.0}, [k / 8 for k in range(8, 0, -1)]),
        ({"warmup": 8, "decay": 1.0}, [min(k, 9 - k) / 8 for k in range(1, 9)]),  # rise and fall meet
        ({"warmup": 100, "decay": 0.0}, [k / 100 for k in range(1, 9)]),
    ],
)
def test_short_runs(settings, expected):
    assert rates(TrainConfig(steps=8, **settings))[0] == pytest.approx(expected)


def test_so_many_minutes():
    """One second a step, two minutes, decay 0.25: the fall begins at 90 s and takes the 30 s that are left."""
    settings = TrainConfig(minutes=2.0, warmup=10, decay=0.25)
    seen, progress = rates(settings)
    assert (progress.decay_from, progress.last_step, progress.step) == (90, 120, 120)
    assert seen[10:91] == [1.0] * 81
    assert seen[90:] == pytest.approx([(120 - k) / 30 for k in range(90, 120)])


def test_a_plan_once_made_stays():
    settings = TrainConfig(minutes=2.0, decay=0.25)
    progress = Progress(step=100, seconds=90.0)
    plan(progress, settings)
    made = (progress.decay_from, progress.last_step)
    assert made == (100, 100 + round(30 * 100 / 90))
    progress.step, progress.seconds = 105, 1000.0
    plan(progress, settings)
    assert (progress.decay_from, progress.last_step) == made
    late = Progress(step=5, seconds=1e4)  # the clock had run out before: one more step
    plan(late, settings)
    assert (late.decay_from, late.last_step) == (5, 6)
    unknown = Progress(step=50, seconds=50.0)
    plan(unknown, settings)
    assert unknown.last_step is None
    endless = Progress(step=50, seconds=50.0)
    plan(endless, TrainConfig())
    assert endless.last_step is None


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**40))
def test_each_item_once_an_epoch(n, batch, seed):
    steps = -(-3 * n // batch)  # three epochs, the last batch running over
    laid = np.concatenate([batch_order(n, batch, seed, step) for step in range(steps)])
    assert laid.shape == (steps * batch,)
    for epoch in range(3):
        assert sorted(laid[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = [tuple(batch_order(20, 20, seed, step)) for seed in range(3) for step in range(3)]
    assert len(set(orders)) == 9
    assert (batch_order(20, 20, 0, 2) == batch_order(20, 20, 0, 2)).all()
    far = batch_order(1797, 128, 0, 10**6)
    assert far.shape == (128,)
    assert far.max() < 1797


DATA = from_array(np.arange(40 * 16, dtype=np.uint16).reshape(40, 1, 4, 4), levels=1000)


def test_a_batch_is_a_function_of_seed_and_step():
    settings, items = TrainConfig(batch=12, seed=3), np.arange(5, 38)
    torch.manual_seed(0)
    values, u, eps, z, cond = global_batch(DATA, items, settings, 7)
    assert cond is None
    torch.manual_seed(1)
    for a, b in zip((values, u, eps, z), global_batch(DATA, items, settings, 7)[:4], strict=True):
        assert torch.equal(a, b)
    others = [
        global_batch(DATA, items, settings, 8),
        global_batch(DATA, items, TrainConfig(batch=12, seed=4), 7),
    ]
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip((values, u, eps, z), other[:4], strict=True))
    chosen = values[:, 0, 0, 0].int() // 16
    assert chosen.tolist() == sorted(items[batch_order(33, 12, 3, 7)].tolist())  # in the order of the file
    assert values.dtype == torch.uint16
    assert not torch.equal(eps, z)
    assert eps.dtype == torch.float32


TOLD = from_array(DATA.values, np.arange(40) % 4, levels=1000, cond=np.arange(120.0).reshape(40, 3))
SURE = TrainConfig(batch=12, seed=3, conditional=True, condition_dropout=0.0)


def test_each_item_is_told_what_is_its_own():
    for step in (0, 3, 7):  # the last of an epoch and the first of the next among them
        values, *_, cond = global_batch(TOLD, np.arange(5, 38), SURE, step)
        chosen = values[:, 0, 0, 0].int() // 16
        assert torch.equal(cond.label, chosen % 4)
        assert torch.equal(cond.vector, torch.arange(120.0).view(40, 3)[chosen])
        assert cond.tokens is None


def test_what_is_told_changes_no_other_number():
    for settings in (SURE, replace(SURE, condition_dropout=0.5, flip=True)):
        plain = global_batch(TOLD, np.arange(40), replace(settings, conditional=False), 7)
        told = global_batch(TOLD, np.arange(40), settings, 7)
        assert all(torch.equal(a, b) for a, b in zip(plain[:4], told[:4], strict=True))
        assert (plain[4], told[4] is None) == (None, False)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_items_is_told_nothing(share):
    """Of 400 steps of 40 items, |z| < 5 (false alarm below 1e-6); a share of 0.13 in place of 0.1 is 12 deviations off.

    All that is told of an item goes together, and who is told nothing changes from step to step.
    """
    settings = TrainConfig(batch=40, conditional=True, condition_dropout=share)
    dropped = []
    for step in range(400):
        cond = global_batch(TOLD, np.arange(40), settings, step)[4]
        dropped.append(cond.label < 0)
        others = (torch.rand(40, generator=generator(0, name, step)) < share for name in ("train", "dropout"))
        assert not any(torch.equal(other, dropped[-1]) for other in others if share == 0.5)
        assert torch.equal(cond.vector.isnan().all(1), dropped[-1])
        assert torch.equal(cond.vector.isnan().any(1), dropped[-1])
    dropped = torch.stack(dropped).double()
    assert abs(dropped.mean() - share) < 5 * math.sqrt(share * (1 - share) / dropped.numel())
    for other in (dropped.mean(0), dropped.mean(1)):  # neither an item's nor a step's share is far off
        assert (other - share).abs().max() < 6.5 * math.sqrt(share * (1 - share) / (dropped.numel() / len(other)))
    assert global_batch(TOLD, np.arange(40), replace(settings, condition_dropout=1.0), 0)[4].label.max() == -1
    assert global_batch(TOLD, np.arange(40), replace(settings, condition_dropout=0.0), 0)[4].label.min() == 0


def test_times_cover_evenly_and_do_not_follow_the_items():
    settings = TrainConfig(batch=12)
    ranks = []
    for step in range(20):
        u = global_batch(DATA, np.arange(40), settings, step)[1]
        assert u.dtype == torch.float64
        assert ((u >= 0) & (u < 1)).all()
        gaps = u.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((11,), 1 / 12, dtype=torch.float64), rtol=0, atol=1e-12)
        ranks.append(u.argsort().tolist())
    assert len({tuple(r) for r in ranks}) == 20
    offsets = torch.stack([global_batch(DATA, np.arange(40), settings, s)[1].min() * 12 for s in range(60)])
    assert abs(float(offsets.mean()) - 0.5) < 4.9 * math.sqrt(1 / 12 / 60)


def test_mirrors_are_drawn_after_all_else():
    plain, flipped = (global_batch(DATA, np.arange(40), TrainConfig(batch=40, flip=flip), 0) for flip in (False, True))
    for a, b in zip(plain[1:4], flipped[1:4], strict=True):
        assert torch.equal(a, b)
    same = (plain[0] == flipped[0]).flatten(1).all(1)
    mirrored = (plain[0].int().flip(-1) == flipped[0].int()).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 5 < int(mirrored.sum()) < 35


@pytest.mark.parametrize(("batch", "processes", "accumulate"), [(12, 1, 1), (12, 1, 3), (12, 2, 3), (12, 4, 1)])
def test_shares_tile_the_batch(batch, processes, accumulate):
    settings = TrainConfig(batch=batch, accumulate=accumulate)
    parts = [part for index in range(processes) for part in shares(settings, processes, index)]
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    assert len({part.stop - part.start for part in parts}) == 1
    assert len(parts) == processes * accumulate


def test_shares_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"^error\[BATCH\] train.batch = 12: 5 processes times accumulate = 1"):
        shares(TrainConfig(batch=12), 5, 0)


def test_precision_is_made_definite():
    cpu = torch.device("cpu")
    assert precision_of("float32", cpu) == "float32"
    assert precision_of("bfloat16", cpu) == "bfloat16"
    assert precision_of("auto", cpu) in ("float32", "bfloat16")

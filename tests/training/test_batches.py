"""The batch of a step: items, noise and conditions as functions of (seed, step), divided over processes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import equal_numbers, global_batch

from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError
from undiffuse.model.config import TrainConfig
from undiffuse.process.seeded_noise import generator
from undiffuse.training.batches import batch_order, micro_batches


def test_epochs_and_seeds_differ():
    orders = [tuple(batch_order(20, 20, seed, step)) for seed in range(3) for step in range(3)]
    assert len(set(orders)) == 9
    assert (batch_order(20, 20, 0, 2) == batch_order(20, 20, 0, 2)).all()
    far = batch_order(1797, 128, 0, 10**6)
    assert far.shape == (128,)
    assert far.max() < 1797


DATA = from_array(np.arange(40 * 16, dtype=np.uint16).reshape(40, 1, 4, 4), num_values=1000)


def test_a_batch_is_a_function_of_seed_and_step():
    settings, items = TrainConfig(batch=12, seed=3), np.arange(5, 38)
    torch.manual_seed(0)
    batch = global_batch(DATA, items, settings, 7)
    assert batch.cond is None
    torch.manual_seed(1)
    assert equal_numbers(batch, global_batch(DATA, items, settings, 7)) == [True] * 5
    for other in (global_batch(DATA, items, settings, 8), global_batch(DATA, items, replace(settings, seed=4), 7)):
        assert equal_numbers(batch, other) == [False] * 5
    chosen = batch.values[:, 0, 0, 0].int() // 16
    assert chosen.tolist() == sorted(items[batch_order(33, 12, 3, 7)].tolist())  # in the order of the data
    assert batch.values.dtype == torch.uint16
    assert not torch.equal(batch.eps, batch.z)
    assert (batch.eps.dtype, batch.eps.shape) == (torch.float32, (12, 1, 4, 4))
    assert not torch.equal(batch.u, batch.r)


def test_the_noise_of_an_item_is_a_function_of_its_number_in_the_run():
    """Whatever part of the batch a process takes, and however large the batch is."""
    settings, cpu = TrainConfig(batch=12, seed=3), torch.device("cpu")
    whole = global_batch(DATA, np.arange(40), settings, 2)
    assert whole.numbers == range(24, 36)
    parts = [whole.take(part, cpu) for part in micro_batches(replace(settings, accumulate=3), 1, 0)]
    half = [global_batch(DATA, np.arange(40), replace(settings, batch=6), step) for step in (4, 5)]
    for name in ("eps", "z"):
        noise = getattr(whole, name)
        assert all(torch.equal(torch.cat([getattr(part, name) for part in them]), noise) for them in (parts, half))
        assert torch.equal(getattr(whole, name), noise)


LABELLED = from_array(DATA.values, np.arange(40) % 4, num_values=1000, cond=np.arange(120.0).reshape(40, 3))
CERTAIN = TrainConfig(batch=12, seed=3, conditional=True, condition_dropout=0.0)


def test_each_item_has_its_own_condition():
    for step in (0, 3, 7):  # one across two epochs
        batch = global_batch(LABELLED, np.arange(5, 38), CERTAIN, step)
        chosen, cond = batch.values[:, 0, 0, 0].int() // 16, batch.cond
        assert torch.equal(cond.label, chosen % 4)
        assert torch.equal(cond.vector, torch.arange(120.0).view(40, 3)[chosen])
        assert cond.tokens is None


def test_conditions_do_not_change_the_noise():
    for settings in (CERTAIN, replace(CERTAIN, condition_dropout=0.5, flip=True)):
        plain = global_batch(LABELLED, np.arange(40), replace(settings, conditional=False), 7)
        conditional = global_batch(LABELLED, np.arange(40), settings, 7)
        assert equal_numbers(plain, conditional) == [True] * 5
        assert (plain.cond, conditional.cond is None) == (None, False)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_conditions_are_dropped_for_a_fraction_of_the_items(fraction):
    """Of 400 steps of 40 items, |z| < 5 (false alarm below 1e-6); 0.13 in place of 0.1 is 12 deviations off.

    Label and vector of an item are dropped together, for other items in each step.
    """
    settings = TrainConfig(batch=40, conditional=True, condition_dropout=fraction)
    dropped = []
    for step in range(400):
        cond = global_batch(LABELLED, np.arange(40), settings, step).cond
        dropped.append(cond.label < 0)
        others = (torch.rand(40, generator=generator(0, name, step)) < fraction for name in ("train", "dropout"))
        assert not any(torch.equal(other, dropped[-1]) for other in others if fraction == 0.5)
        assert torch.equal(cond.vector.isnan().all(1), dropped[-1])
        assert torch.equal(cond.vector.isnan().any(1), dropped[-1])
    dropped = torch.stack(dropped).double()
    assert abs(dropped.mean() - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / dropped.numel())
    for other in (dropped.mean(0), dropped.mean(1)):  # for each item and each step
        assert (other - fraction).abs().max() < 6.5 * math.sqrt(
            fraction * (1 - fraction) / (dropped.numel() / len(other))
        )
    assert global_batch(LABELLED, np.arange(40), replace(settings, condition_dropout=1.0), 0).cond.label.max() == -1
    assert global_batch(LABELLED, np.arange(40), replace(settings, condition_dropout=0.0), 0).cond.label.min() == 0


def test_of_labels_and_captions_each_is_dropped_alone_too():
    """Both p, else the label p, else the caption p; of 6,000 items, |z| < 5.5 (false alarm of each below 4e-8)."""
    data, p = replace(DATA, labels=np.arange(40) % 3, classes=("a", "b", "c"), captions=(("x",),) * 40), 0.25
    settings, seen = TrainConfig(batch=40, conditional=True, condition_dropout=p), []
    for step in range(150):
        cond = global_batch(data, np.arange(40), settings, step).cond
        seen.append(2 * (cond.label < 0) + (cond.text == 0).all(1))
    counts, share = torch.bincount(torch.cat(seen), minlength=4).tolist(), (1 - p) * p
    for count, expected in zip(counts, [(1 - p) * (1 - 2 * p), share, share, p], strict=True):
        assert abs(count / 6000 - expected) < 5.5 * math.sqrt(expected * (1 - expected) / 6000)
    kept = global_batch(data, np.arange(40), replace(settings, condition_dropout=0.0), 0).cond
    assert (int(kept.label.min()), bool((kept.text == 0).all(1).any())) == (0, False)


def test_times_are_evenly_spaced_and_independent_of_the_items():
    settings = TrainConfig(batch=12)
    ranks = []
    for step in range(20):
        u = global_batch(DATA, np.arange(40), settings, step).u
        assert u.dtype == torch.float64
        assert ((u >= 0) & (u < 1)).all()
        gaps = u.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full((11,), 1 / 12, dtype=torch.float64), rtol=0, atol=1e-12)
        ranks.append(u.argsort().tolist())
    assert len({tuple(r) for r in ranks}) == 20
    offsets = torch.stack([global_batch(DATA, np.arange(40), settings, s).u.min() * 12 for s in range(60)])
    assert abs(float(offsets.mean()) - 0.5) < 4.9 * math.sqrt(1 / 12 / 60)


def test_flips_do_not_change_the_noise():
    plain, flipped = (global_batch(DATA, np.arange(40), TrainConfig(batch=40, flip=flip), 0) for flip in (False, True))
    assert equal_numbers(plain, flipped) == [False, *[True] * 4]
    same = (plain.values == flipped.values).flatten(1).all(1)
    mirrored = (plain.values.int().flip(-1) == flipped.values.int()).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 5 < int(mirrored.sum()) < 35


@pytest.mark.parametrize(("batch", "processes", "accumulate"), [(12, 1, 1), (12, 1, 3), (12, 2, 3), (12, 4, 1)])
def test_micro_batches_tile_the_batch(batch, processes, accumulate):
    settings = TrainConfig(batch=batch, accumulate=accumulate)
    parts = [part for index in range(processes) for part in micro_batches(settings, processes, index)]
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    assert len({part.stop - part.start for part in parts}) == 1
    assert len(parts) == processes * accumulate


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"^error\[BATCH\] train.batch = 12: 5 processes times accumulate = 1"):
        micro_batches(TrainConfig(batch=12), 5, 0)

"""Mirrored and translated items: which ones, how often, and that nothing else changes."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import equal_numbers, global_batch

from undiffuse.data.from_array import from_array
from undiffuse.data.lazy_array import LazyArray
from undiffuse.errors import ConfigError, DataError
from undiffuse.model.config import TrainConfig
from undiffuse.training import batches as batches_module
from undiffuse.training.augmentation import augment, check_augmentation
from undiffuse.training.batches import Batches, values_of

BATCH = 4000
PLAIN = TrainConfig(batch=BATCH, seed=5)
ITEM = np.random.default_rng(0).integers(0, 65536, (1, 2, 4, 6)).astype(np.uint16)
SAME = np.repeat(ITEM, BATCH, 0)


def kinds(settings, step=3):
    """{bytes of an item: how often it occurs} among 4,000 equal items after augmentation."""
    augmented = augment(SAME, settings, step)
    assert (augmented.dtype, augmented.shape) == (SAME.dtype, SAME.shape)
    items, counts = np.unique(augmented.reshape(BATCH, -1), axis=0, return_counts=True)
    return {row.tobytes(): int(n) for row, n in zip(items, counts, strict=True)}


def expected(*values):
    return {np.ascontiguousarray(value).tobytes() for value in values}


def test_items_are_unchanged_by_default():
    assert augment(SAME, PLAIN, 3) is SAME


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"flip": True}, expected(ITEM, ITEM[..., ::-1])),
        ({"flip_vertical": True}, expected(ITEM, ITEM[..., ::-1, :])),
        (
            {"flip": True, "flip_vertical": True},
            expected(ITEM, ITEM[..., ::-1], ITEM[..., ::-1, :], ITEM[..., ::-1, ::-1]),
        ),
        (
            {"crop": 2},
            expected(
                *(
                    np.pad(ITEM, ((0, 0), (0, 0), (2, 2), (2, 2)), "reflect")[..., i : i + 4, j : j + 6]
                    for i in range(5)
                    for j in range(5)
                )
            ),
        ),
    ],
)
def test_all_variants_of_an_item_are_equally_likely(settings, wanted):
    """|z| < 5 for each (false alarm below 1e-6); a frequency off by 2/5 is over 5 deviations with 25 variants."""
    counts = kinds(replace(PLAIN, **settings))
    assert set(counts) == wanted
    share = 1 / len(wanted)
    assert all(abs(n - BATCH * share) < 5 * np.sqrt(BATCH * share * (1 - share)) for n in counts.values())
    assert kinds(replace(PLAIN, **settings)) == counts  # a function of seed and step
    assert kinds(replace(PLAIN, **settings), step=4) != counts
    assert kinds(replace(PLAIN, seed=6, **settings)) != counts


@pytest.mark.parametrize("shape", [(1, 5), (2, 4, 6), (1, 4, 5, 6)])
def test_sequences_images_and_volumes_are_translated(shape):
    values = np.random.default_rng(1).normal(size=(50, *shape)).astype(np.float32)
    moved = augment(values, replace(PLAIN, batch=50, crop=2), 0)
    dims = len(shape) - 1
    padded = np.pad(values, ((0, 0), (0, 0), *[(2, 2)] * dims), "reflect")
    for item, other in zip(moved, padded, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(other, shape)
        assert (windows == item).all(tuple(range(-dims - 1, 0))).sum() == 1
    assert (moved != values).any()


def test_augmentation_that_does_not_fit_the_items_is_refused():
    for name in ("flip", "flip_vertical"):
        settings = TrainConfig(**{name: True})
        check_augmentation(settings, (3, 8, 8))
        for shape in ((5,), (1, 8), (1, 8, 8, 8)):
            with pytest.raises(ConfigError, match=rf"error\[FLIP\] train.{name}: only images"):
                check_augmentation(settings, shape)
    check_augmentation(TrainConfig(crop=3), (1, 4, 9))
    check_augmentation(TrainConfig(), (5,))
    for shape, size in (((1, 3, 9), "3x9"), ((5,), "none")):
        with pytest.raises(ConfigError, match=rf"error\[CROP\] train.crop = 3: items of size {size} cannot"):
            check_augmentation(TrainConfig(crop=3), shape)
    with pytest.raises(ConfigError, match=r"train.crop = -1"):
        TrainConfig(crop=-1)


def test_augmentation_does_not_change_the_noise():
    data = from_array(SAME[:40] + np.arange(40, dtype=np.uint16)[:, None, None, None] % 7)
    plain = TrainConfig(batch=8, seed=1)
    for settings in (replace(plain, flip=True), replace(plain, crop=1)):
        ours, theirs = (global_batch(data, np.arange(40), s, 2) for s in (plain, settings))
        assert equal_numbers(ours, theirs) == [False, *[True] * 4]


def test_prefetched_batches_are_those_of_their_steps_in_any_order():
    data, settings = from_array(SAME[:40]), TrainConfig(batch=8, seed=1, flip=True)
    with Batches(data, np.arange(40), settings, time.perf_counter, values_of(data)) as batches:
        for step in (0, 1, 2, 7, 7, 3):
            assert all(equal_numbers(batches(step), global_batch(data, np.arange(40), settings, step)))
        assert batches.waited > 0


@pytest.mark.parametrize("thread_safe", [False, True])
def test_data_that_no_other_thread_may_read_are_read_by_this_one(thread_safe):
    values, settings, readers = from_array(SAME[:40]).values, replace(PLAIN, batch=8), []

    def read(indices):
        readers.append(threading.get_ident())
        return values[indices]

    data = replace(from_array(SAME[:40]), values=LazyArray(values.shape, values.dtype, read, thread_safe))
    with Batches(data, np.arange(40), settings, itertools.count().__next__, values_of(data)) as batches:
        for step in (0, 1):
            assert all(equal_numbers(batches(step), global_batch(data, np.arange(40), settings, step)))
        assert batches.waited == 2  # one tick of the clock each
    if thread_safe:
        assert len(set(readers)) == 2
    else:
        assert readers == [threading.get_ident()] * 4


def test_the_next_batch_is_prefetched_and_its_error_raised_at_its_step(monkeypatch):
    requested = []

    def global_batch(data, items, settings, step, read):
        requested.append(step)
        if step == 2:
            raise DataError("CHANGED_DURING_RUN", "x", "was changed", "Train again")
        return step

    class Immediate(ThreadPoolExecutor):
        def submit(self, *args):
            future = super().submit(*args)
            future.exception()
            return future

    monkeypatch.setattr(batches_module, "global_batch", global_batch)
    monkeypatch.setattr(batches_module, "ThreadPoolExecutor", Immediate)
    with Batches(SimpleNamespace(values=None), None, None, time.perf_counter, None) as batches:
        assert [batches(0), requested[:]] == [0, [0, 1]]
        assert [batches(1), requested[:]] == [1, [0, 1, 2]]
        with pytest.raises(DataError, match="was changed"):
            batches(2)

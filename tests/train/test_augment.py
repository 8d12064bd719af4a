"""Mirrored and moved items: what every one of them is, how often, and that nothing else sees them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from undiffuse.config import TrainConfig
from undiffuse.data import from_array
from undiffuse.errors import ConfigError, DataError
from undiffuse.train import batch as batches_of
from undiffuse.train.augment import augmented, check
from undiffuse.train.batch import batches, global_batch

BATCH = 4000
PLAIN = TrainConfig(batch=BATCH, seed=5)
ITEM = np.random.default_rng(0).integers(0, 65536, (1, 2, 4, 6)).astype(np.uint16)
SAME = np.repeat(ITEM, BATCH, 0)


def kinds(settings, step=3):
    """{the bytes of an item: how often it is seen}, of 4,000 equal ones."""
    seen = augmented(SAME, settings, step)
    assert (seen.dtype, seen.shape) == (SAME.dtype, SAME.shape)
    found, counts = np.unique(seen.reshape(BATCH, -1), axis=0, return_counts=True)
    return {row.tobytes(): int(n) for row, n in zip(found, counts, strict=True)}


def expected(*values):
    return {np.ascontiguousarray(value).tobytes() for value in values}


def test_nothing_is_done_unless_asked_for():
    assert augmented(SAME, PLAIN, 3) is SAME


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
def test_every_way_of_seeing_an_item_is_as_likely(settings, wanted):
    """|z| < 5 for each (false alarm below 1e-6 a kind); a share off by 2/5 is over 5 deviations at 25 kinds."""
    found = kinds(replace(PLAIN, **settings))
    assert set(found) == wanted
    share = 1 / len(wanted)
    assert all(abs(n - BATCH * share) < 5 * np.sqrt(BATCH * share * (1 - share)) for n in found.values())
    assert kinds(replace(PLAIN, **settings)) == found  # a function of seed and step
    assert kinds(replace(PLAIN, **settings), step=4) != found
    assert kinds(replace(PLAIN, seed=6, **settings)) != found


@pytest.mark.parametrize("shape", [(1, 5), (2, 4, 6), (1, 4, 5, 6)])
def test_items_of_any_dimensions_move(shape):
    values = np.random.default_rng(1).normal(size=(50, *shape)).astype(np.float32)
    moved = augmented(values, replace(PLAIN, batch=50, crop=2), 0)
    dims = len(shape) - 1
    padded = np.pad(values, ((0, 0), (0, 0), *[(2, 2)] * dims), "reflect")
    for item, other in zip(moved, padded, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(other, shape)
        assert (windows == item).all(tuple(range(-dims - 1, 0))).sum() == 1
    assert (moved != values).any()


def test_what_cannot_be_mirrored_or_moved_is_refused():
    for name in ("flip", "flip_vertical"):
        settings = TrainConfig(**{name: True})
        check(settings, (3, 8, 8))
        for shape in ((5,), (1, 8), (1, 8, 8, 8)):
            with pytest.raises(ConfigError, match=rf"error\[FLIP\] train.{name}: only images"):
                check(settings, shape)
    check(TrainConfig(crop=3), (1, 4, 9))
    check(TrainConfig(), (5,))
    for shape, size in (((1, 3, 9), "3x9"), ((5,), "none")):
        with pytest.raises(ConfigError, match=rf"error\[CROP\] train.crop = 3: items of size {size} cannot"):
            check(TrainConfig(crop=3), shape)
    with pytest.raises(ConfigError, match=r"train.crop = -1"):
        TrainConfig(crop=-1)


def test_training_sees_them_and_no_other_number_changes():
    data = from_array(SAME[:40] + np.arange(40, dtype=np.uint16)[:, None, None, None] % 7)
    plain = TrainConfig(batch=8, seed=1)
    for settings in (replace(plain, flip=True), replace(plain, crop=1)):
        ours, theirs = (global_batch(data, np.arange(40), s, 2) for s in (plain, settings))
        assert not torch.equal(ours[0].int(), theirs[0].int())
        assert all(torch.equal(a, b) for a, b in zip(ours[1:4], theirs[1:4], strict=True))


def test_batches_are_those_of_their_steps_however_they_are_asked_for():
    data, settings = from_array(SAME[:40]), TrainConfig(batch=8, seed=1, flip=True)
    with batches(data, np.arange(40), settings) as made:
        for step in (0, 1, 2, 7, 7, 3):
            for a, b in zip(made(step)[:4], global_batch(data, np.arange(40), settings, step)[:4], strict=True):
                assert torch.equal(a, b)
        assert made.waited > 0


def test_the_next_batch_is_made_meanwhile_and_its_error_comes_with_it(monkeypatch):
    asked = []

    def made(data, items, settings, step):
        asked.append(step)
        if step == 2:
            raise DataError("CHANGED_DURING_RUN", "x", "was changed", "Train again")
        return step

    class AtOnce(ThreadPoolExecutor):
        def submit(self, *args):
            future = super().submit(*args)
            future.exception()
            return future

    monkeypatch.setattr(batches_of, "global_batch", made)
    with AtOnce(1) as pool:
        batch = batches_of.Batches(pool, SimpleNamespace(values=None), None, None)
        assert [batch(0), asked[:]] == [0, [0, 1]]
        assert [batch(1), asked[:]] == [1, [0, 1, 2]]
        with pytest.raises(DataError, match="was changed"):
            batch(2)

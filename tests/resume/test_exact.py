"""A run that is stopped anywhere and goes on makes, bit for bit, what it makes without a stop.

Weights, averages (the model's and the profiles'), the optimiser's moments, eight samples and a likelihood, for every
step to stop at, with and without accumulation, in batches that divide the items and in odd ones, in float32 and under
bfloat16 autocast, with dropout, mirroring and labels of which some are not told. Items are read by the process that
trains, so there are no workers whose number could matter. Whole: `pytest -m release tests/resume`.
"""

import functools
import random

import pytest
from tiny_run import STEPS, data, held, made, quick_looks, recipe, stopping_at, train

from undiffuse.train import loop, state
from undiffuse.train.watch import Watch

SIZES = {"even": (12, 40), "odd": (9, 31)}
"""Batch and items: of the latter four fifths are trained on, so that epochs end within batches."""
CASES = [
    (accumulate, size, precision) for accumulate in (1, 3) for size in SIZES for precision in ("float32", "bfloat16")
]


def set_up(accumulate, size, precision):
    batch, items = SIZES[size]
    return recipe(accumulate=accumulate, batch=batch, precision=precision), data(items)


def outcome(folder, items):
    return held(folder) | made(folder, items)


@functools.cache
def straight(case, place):
    config, items = set_up(*case)
    with quick_looks():
        return outcome(train(config, place / "-".join(map(str, case)), items), items)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


def mismatches(case, steps, folder, place):
    """Which runs, stopped once after each of the ``steps``, do not end as one that was never stopped."""
    config, items = set_up(*case)
    different = []
    with quick_looks():
        for k in steps:
            with stopping_at(k):
                train(config, folder / str(k), items)
            train(config, folder / str(k), items)
            if outcome(folder / str(k), items) != straight(case, place):
                different.append(k)
    return different


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_three_stops(case, tmp_path, place):
    """24 cases; the steps differ from setting to setting, so that together they are spread over the run."""
    i = CASES.index(case)
    assert mismatches(case, [(5 * i) % 13, 13 + (3 * i) % 14, STEPS - i], tmp_path, place) == []


@pytest.mark.release
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_stop(case, tmp_path, place):
    """328 cases: 41 steps to stop at, 0 to 40, and 8 settings."""
    different = mismatches(case, range(STEPS + 1), tmp_path, place)
    print(f"A1 {'-'.join(map(str, case))}: {STEPS + 1} stops, {len(different)} mismatches")
    assert different == []


def chain(case, stops, folder, place):
    config, items = set_up(*case)
    with quick_looks():
        for k in stops:
            with stopping_at(k):
                train(config, folder, items)
        train(config, folder, items)
    assert outcome(folder, items) == straight(case, place)


def test_ten_stops_of_one_run(tmp_path, place):
    chain(CASES[-1], sorted(random.Random(0).sample(range(1, STEPS + 1), 10)), tmp_path, place)


@pytest.mark.release
def test_chains_of_stops(tmp_path, place):
    for i in range(24):
        chain(CASES[i % 8], sorted(random.Random(i).sample(range(1, STEPS + 1), 10)), tmp_path / str(i), place)
    print("A1: 24 chains of 10 stops, 0 mismatches")


def test_what_can_differ_does(tmp_path, place):
    """The power of these tests: a step that is done twice, or another seed, changes every hash."""
    config, items = set_up(*CASES[0])
    known = straight(CASES[0], place)
    with quick_looks():
        other = outcome(train(recipe(seed=5), tmp_path / "seed", items), items)
        with stopping_at(7):
            train(config, tmp_path / "twice", items)
        with pytest.MonkeyPatch.context() as patch:
            real = Watch.__post_init__

            def forgetful(watch):
                watch.progress.step -= 1
                real(watch)

            patch.setattr(Watch, "__post_init__", forgetful)
            twice = outcome(train(config, tmp_path / "twice", items), items)
    assert known.keys() == {"network", "average", "optimiser", "memory", "samples", "nll", "model"}
    for name in known:
        assert other[name] != known[name]
        assert twice[name] != known[name] or name == "samples"  # which may round to the same levels


def test_looks_and_snapshots_change_nothing(tmp_path, place):
    """How often the run is looked at, saved and its averages are written down: one outcome."""
    items = data(40)
    known = straight(CASES[0], place)
    for previews, snapshots, minutes in ((0, 2, 10), (1, 5, 1e-9), (7, 2, 10), (STEPS, 1, 1e-9), (0, 0, 1e-3)):
        folder = tmp_path / f"{previews}-{snapshots}"
        settings = {"previews": previews, "snapshots": snapshots or 2, "save_minutes": minutes}
        with quick_looks():
            found = outcome(train(recipe(**settings), folder, items), items)
        assert found == known, settings


def test_a_checkpoint_is_written_when_it_is_time(tmp_path, monkeypatch):
    """Every third step of 20 s each, where one is asked for every minute; and at the end."""
    steps, real = [], state.write
    monkeypatch.setattr(
        state, "write", lambda folder, at, *rest, **more: (steps.append(at.step), real(folder, at, *rest, **more))
    )
    monkeypatch.setattr(loop, "agree", lambda _, progress: setattr(progress, "seconds", 20.0 * progress.step))
    with quick_looks():
        train(recipe(10, previews=0, save_minutes=1.0), tmp_path / "minute", data(40))
        assert steps == [3, 6, 9, 10]
        steps.clear()
        train(recipe(10, previews=2, save_minutes=100.0), tmp_path / "looks", data(40))
        assert steps == [5, 10]
        steps.clear()
        train(recipe(10, previews=2, save_minutes=1.0), tmp_path / "both", data(40))
        assert steps == [3, 5, 8, 10]

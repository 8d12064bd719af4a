"""A run that is stopped at any step and resumed equals the uninterrupted run to the bit.

Compared are weights, averages (the model's and those for snapshots), moments, eight samples and a likelihood; with and
without accumulation, with batches that divide the items and others, in float32 and bfloat16 autocast, with dropout,
mirror images and dropped labels. For every step to stop at: `pytest -m release tests/resume`.
"""

import functools
import random
from dataclasses import replace

import pytest
from tiny_run import STEPS, checkpoint_hashes, data, model_hashes, quick_looks, recipe, stopping_at, train

from undiffuse.training import fit as loop
from undiffuse.training import train_state as state
from undiffuse.training.monitor import Monitor

SIZES = {"even": (12, 40), "odd": (9, 31)}
"""Batch and items, of which four fifths are trained on: epochs end within batches."""
CASES = [
    (accumulate, size, precision) for accumulate in (1, 3) for size in SIZES for precision in ("float32", "bfloat16")
]


def set_up(accumulate, size, precision):
    batch, items = SIZES[size]
    return recipe(accumulate=accumulate, batch=batch, precision=precision), data(items)


def outcome(folder, items):
    return checkpoint_hashes(folder) | model_hashes(folder, items)


@functools.cache
def straight(case, place):
    config, items = set_up(*case)
    with quick_looks():
        return outcome(train(config, place / "-".join(map(str, case)), items), items)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("straight")


def mismatches(case, steps, folder, place):
    """The ``steps`` for which a run that is stopped after them does not end as the uninterrupted one."""
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
def test_a_stopped_run_resumes_to_the_bit(case, tmp_path, place):
    """Other steps for each setting, so that together they are spread over the run."""
    i = CASES.index(case)
    assert mismatches(case, [(5 * i) % 19, 19 + (3 * i) % 22], tmp_path, place) == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_channels_last_weights_resumes_to_the_bit(optimizer, tmp_path):
    """Layer norms make the weights of convolutions channels-last, and so their averages and moments."""
    config, items = recipe(max_steps=6, optimizer=optimizer), data(40)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (), "patch": 2, "norm": "layer"}
    config = replace(config, model=replace(config.model, network=network))
    with quick_looks():
        straight = checkpoint_hashes(train(config, tmp_path / "straight", items), 6)
        with stopping_at(3):
            train(config, tmp_path / "stopped", items)
        assert checkpoint_hashes(train(config, tmp_path / "stopped", items), 6) == straight


@pytest.mark.release
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_run_stopped_at_every_step_resumes_to_the_bit(case, tmp_path, place):
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


def test_ten_stops_of_one_run_change_nothing(tmp_path, place):
    chain(CASES[-1], sorted(random.Random(0).sample(range(1, STEPS + 1), 10)), tmp_path, place)


@pytest.mark.release
def test_chains_of_ten_stops_change_nothing(tmp_path, place):
    for i in range(24):
        chain(CASES[i % 8], sorted(random.Random(i).sample(range(1, STEPS + 1), 10)), tmp_path / str(i), place)
    print("A1: 24 chains of 10 stops, 0 mismatches")


def test_another_seed_or_a_repeated_step_changes_every_hash(tmp_path, place):
    """The power of these tests."""
    config, items = set_up(*CASES[0])
    expected = straight(CASES[0], place)
    with quick_looks():
        other = outcome(train(recipe(seed=5), tmp_path / "seed", items), items)
        with stopping_at(7):
            train(config, tmp_path / "twice", items)
        with pytest.MonkeyPatch.context() as patch:
            real = Monitor.__enter__

            def forgetful(monitor):
                monitor.progress.step -= 1
                return real(monitor)

            patch.setattr(Monitor, "__enter__", forgetful)
            twice = outcome(train(config, tmp_path / "twice", items), items)
    assert expected.keys() == {"network", "average", "optimizer", "extra", "samples", "nll", "model"}
    for name in expected:
        assert other[name] != expected[name]
        assert twice[name] != expected[name] or name == "samples"  # samples may round to the same values


def test_evaluations_checkpoints_and_snapshots_change_nothing(tmp_path, place):
    """One outcome for any number of evaluations, checkpoints and snapshots."""
    items = data(40)
    expected = straight(CASES[0], place)
    for previews, snapshots, minutes in ((0, 2, 10), (1, 5, 1e-9), (7, 2, 10), (STEPS, 1, 1e-9), (0, 0, 1e-3)):
        folder = tmp_path / f"{previews}-{snapshots}"
        settings = {"previews": previews, "snapshots": snapshots or 2, "save_minutes": minutes}
        with quick_looks():
            actual = outcome(train(recipe(**settings), folder, items), items)
        assert actual == expected, settings


def test_checkpoints_are_written_on_time(tmp_path, monkeypatch):
    """Every third step of 20 s each with one checkpoint a minute; at evaluations, and at the end."""
    steps, real = [], state.TrainState.save
    monkeypatch.setattr(
        state.TrainState, "save", lambda self, folder, at: (steps.append(at.step), real(self, folder, at))
    )
    monkeypatch.setattr(
        loop, "broadcast_progress", lambda _, progress: setattr(progress, "seconds", 20.0 * progress.step)
    )
    cases = {
        "minutes": ({"previews": 0, "save_minutes": 1.0}, [3, 6, 9, 10]),
        "evaluations": ({"previews": 2, "save_minutes": 100.0}, [5, 10]),
        "both": ({"previews": 2, "save_minutes": 1.0}, [3, 5, 8, 10]),
    }
    for name, (settings, expected) in cases.items():
        steps.clear()
        with quick_looks():
            train(recipe(10, **settings), tmp_path / name, data(40))
        assert steps == expected

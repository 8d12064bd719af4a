"""Repeated runs are identical to the bit with equal threads, and nearly so with another number."""

import pytest
import torch
from tiny_run import checkpoint_hashes, data, model_hashes, quick_looks, recipe, train

from undiffuse.model.checkpoint import load

STEPS = 6


def repeats(folder, threads, times):
    """The hashes of ``times`` runs with so many threads, and the weights of the last."""
    items, before, outcomes = data(), torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with quick_looks():
            for i in range(times):
                place = train(recipe(STEPS), folder / f"{threads}-{i}", items)
                outcomes.append(checkpoint_hashes(place, STEPS) | model_hashes(place, items))
    finally:
        torch.set_num_threads(before)
    return outcomes, load(place).state_dict()


def all_equal(folder, times):
    one, first = repeats(folder, 1, times)
    two, second = repeats(folder, 2, times)
    assert all(outcome == one[0] for outcome in one)
    assert all(outcome == two[0] for outcome in two)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-5)


def test_two_runs_are_identical(tmp_path):
    all_equal(tmp_path, 2)


@pytest.mark.release
def test_twenty_runs_are_identical(tmp_path):
    all_equal(tmp_path, 20)
    print("D7: 20 repeats with 1 and with 2 threads: one sha256 each, within 1e-5 of each other")

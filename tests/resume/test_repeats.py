"""The same run again is the same run: bit for bit at equal threads, nearly so at others."""

import pytest
import torch
from tiny_run import STEPS, data, held, made, quick_looks, recipe, train

from undiffuse.checkpoint import load


def repeats(folder, threads, times):
    """The outcomes of a run with so many threads, and its model."""
    items, before, found = data(), torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with quick_looks():
            for i in range(times):
                place = train(recipe(), folder / f"{threads}-{i}", items)
                found.append(held(place, STEPS) | made(place, items))
    finally:
        torch.set_num_threads(before)
    return found, load(place).state_dict()


def all_equal(folder, times):
    one, first = repeats(folder, 1, times)
    two, second = repeats(folder, 2, times)
    assert all(outcome == one[0] for outcome in one)
    assert all(outcome == two[0] for outcome in two)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-5)


def test_three_times(tmp_path):
    all_equal(tmp_path, 3)


@pytest.mark.release
def test_twenty_times(tmp_path):
    all_equal(tmp_path, 20)
    print("D7: 20 repeats with 1 and with 2 threads: one sha256 each, within 1e-5 of each other")

"""From any step, each item occurs once in an epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undiffuse.training.batches import batch_order


def check(n, batch, seed, first):
    """Each item occurs exactly once in each of three epochs after step ``first``."""
    steps = range(first, first + -(-3 * n // batch) + 1)
    items = np.concatenate([batch_order(n, batch, seed, step) for step in steps])
    assert all(len(batch_order(n, batch, seed, step)) == batch for step in steps)
    begin = -(-first * batch // n) * n - first * batch  # items until the next epoch
    for epoch in range((len(items) - begin) // n):
        part = items[begin + epoch * n : begin + (epoch + 1) * n]
        assert sorted(part.tolist()) == list(range(n))


CASES = st.tuples(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**63 - 1), st.integers(0, 400))


@settings(max_examples=100)
@given(CASES)
def test_each_item_occurs_once_an_epoch(case):
    check(*case)


@pytest.mark.release
@settings(max_examples=2000)
@given(CASES)
def test_each_item_occurs_once_an_epoch_in_many_cases(case):
    check(*case)


def test_epochs_and_seeds_differ():
    one = [batch_order(20, 20, 0, epoch).tolist() for epoch in range(5)]
    assert len({tuple(order) for order in one}) == 5
    assert batch_order(20, 20, 1, 0).tolist() != one[0]

from dataclasses import fields

import pytest
import torch

from undiffuse.conditioning import Condition

NAMES = [f.name for f in fields(Condition)]


def everything(B=3):
    """A condition of which every field tells something."""
    torch.manual_seed(B)
    return Condition(
        label=torch.arange(1, B + 1),
        vector=torch.randn(B, 4),
        tokens=torch.randn(B, 5, 2),
        mask=torch.ones(B, 5, dtype=torch.bool),
        image=torch.randn(B, 1, 2, 2),
        image_level=torch.randn(B),
    )


def same(a, b):
    return all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in NAMES)
    )


def test_null_tells_nothing_in_the_same_shapes():
    null = everything().null()
    assert null.label.tolist() == [-1, -1, -1]
    for name in NAMES:
        value, was = getattr(null, name), getattr(everything(), name)
        assert (value.shape, value.dtype) == (was.shape, was.dtype)
        assert name == "label" or not value.any()
    assert Condition(vector=torch.ones(2, 3)).null().label is None
    assert same(Condition().null(), Condition())


def test_drop_is_null_where_the_mask_says():
    cond, null = everything(), everything().null()
    dropped = cond.drop(torch.tensor([False, True, False]))
    for name in NAMES:
        value = getattr(dropped, name)
        assert torch.equal(value[[0, 2]], getattr(cond, name)[[0, 2]])
        assert torch.equal(value[1], getattr(null, name)[1])
        assert value.dtype == getattr(cond, name).dtype
    assert same(cond.drop(torch.zeros(3, dtype=torch.bool)), cond)
    only = Condition(label=torch.tensor([7, 8])).drop(torch.tensor([True, False]))
    assert only.label.tolist() == [-1, 8]
    assert only.image is None


def test_cat_puts_the_other_behind_and_take_gets_both_back():
    a, b = everything(3), everything(2)
    both = a.cat(b)
    assert same(both.take(slice(0, 3)), a)
    assert same(both.take(torch.tensor([3, 4])), b)
    assert same(Condition().cat(Condition()), Condition())
    assert same(Condition(label=a.label).cat(Condition(label=b.label)), Condition(label=torch.tensor([1, 2, 3, 1, 2])))


@pytest.mark.parametrize("swapped", [False, True])
def test_cat_refuses_conditions_that_tell_different_things(swapped):
    pair = [Condition(label=torch.zeros(2)), Condition(label=torch.zeros(2), vector=torch.zeros(2, 1))]
    with pytest.raises(ValueError, match="conditions to join must tell the same things; only one has 'vector'"):
        pair[swapped].cat(pair[not swapped])


def test_to_moves_all_that_is_there():
    moved = everything().to("meta")
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}
    assert Condition(label=torch.zeros(1)).to("meta").vector is None

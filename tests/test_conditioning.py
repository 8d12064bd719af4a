from dataclasses import fields

import pytest
import torch

from undiffuse.conditioning import Condition
from undiffuse.errors import ConfigError

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
        (x is None and y is None) or (x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in NAMES)
    )


def test_null_tells_nothing_in_the_same_shapes():
    null = everything().null()
    assert null.label.tolist() == [-1, -1, -1]
    for name in NAMES:
        value, was = getattr(null, name), getattr(everything(), name)
        assert (value.shape, value.dtype) == (was.shape, was.dtype)
        assert name in ("label", "vector") or not value.any()
    assert null.vector.isnan().all()
    assert Condition(vector=torch.ones(2, 3)).null().label is None
    assert same(Condition().null(), Condition())


def test_drop_is_null_where_the_mask_says():
    cond, null = everything(), everything().null()
    dropped = cond.drop(torch.tensor([False, True, False]))
    for name in NAMES:
        value = getattr(dropped, name)
        assert torch.equal(value[[0, 2]], getattr(cond, name)[[0, 2]])
        torch.testing.assert_close(value[1], getattr(null, name)[1], equal_nan=True, rtol=0, atol=0)
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


def test_every_token_counts_unless_told_otherwise():
    cond = Condition(tokens=torch.randn(2, 3, 4))
    assert cond.mask.tolist() == [[True] * 3] * 2
    assert not cond.null().mask.any()


NETWORK = {"kind": "unet", "classes": 3, "vector": 4, "tokens": 2}


def test_what_a_network_hears():
    cond = Condition(label=torch.tensor([-1, 2]), vector=torch.ones(2, 4), tokens=torch.ones(2, 5, 2))
    assert cond.heard_by(NETWORK, 2) is cond
    assert Condition().heard_by({}, 7) == Condition()
    Condition(label=torch.empty(0, dtype=torch.int64)).heard_by(NETWORK, 0)


@pytest.mark.parametrize(
    ("name", "value", "network", "words"),
    [
        ("label", torch.tensor([0, 0]), {"kind": "unet"}, "label: the model was trained without it"),
        ("label", torch.tensor([0, 0]), NETWORK | {"classes": 0}, "label: the model was trained without it"),
        ("image", torch.zeros(2, 1, 2, 2), NETWORK, "image: the model was trained without it"),
        ("label", torch.tensor([0, 3]), NETWORK, r"it runs from 0 to 3. Labels are 0 to 2, or -1 for none"),
        ("label", torch.tensor([-2, 2]), NETWORK, r"it runs from -2 to 2. Labels"),
        ("label", torch.tensor([0]), NETWORK, r"its shape is \(1,\), not \(2,\). Give one for each item"),
        ("label", torch.tensor([[0, 0]]), NETWORK, r"its shape is \(1, 2\), not \(2,\)"),
        ("vector", torch.zeros(2, 3), NETWORK, r"its shape is \(2, 3\), not \(2, 4\)"),
        ("vector", torch.zeros(3, 4), NETWORK, r"its shape is \(3, 4\), not \(2, 4\)"),
        ("tokens", torch.zeros(2, 5, 3), NETWORK, r"its shape is \(2, 5, 3\), not \(2, 5, 2\)"),
        ("tokens", torch.zeros(1, 5, 2), NETWORK, r"its shape is \(1, 5, 2\), not \(2, 5, 2\)"),
    ],
)
def test_what_a_network_does_not_hear_is_refused(name, value, network, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Condition(**{name: value}).heard_by(network, 2)
    assert caught.value.where == f"condition.{name}"


def test_a_mask_must_fit_its_tokens():
    with pytest.raises(ConfigError, match=r"tokens: its shape is \(2, 5, 2\), not \(2, 4, 2\)"):
        Condition(tokens=torch.zeros(2, 5, 2), mask=torch.ones(2, 4, dtype=torch.bool)).heard_by(NETWORK, 2)
    with pytest.raises(ConfigError, match=r"mask: its shape is \(1, 5\), not \(2, 5\)"):
        Condition(tokens=torch.zeros(2, 5, 2), mask=torch.ones(1, 5, dtype=torch.bool)).heard_by(NETWORK, 2)

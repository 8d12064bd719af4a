from dataclasses import fields

import pytest
import torch

from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import VectorEmbedding

NAMES = [f.name for f in fields(Condition)]


def full_condition(B=3):
    """A condition with a value in every field."""
    torch.manual_seed(B)
    return Condition(
        label=torch.arange(1, B + 1),
        vector=torch.randn(B, 4),
        tokens=torch.randn(B, 5, 2),
        mask=torch.ones(B, 5, dtype=torch.bool),
        image=torch.randn(B, 1, 2, 2),
        image_level=torch.randn(B),
        end_time=torch.rand(B),
        text=torch.randint(1, 257, (B, 6)),
    )


def same(a, b):
    return all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in NAMES)
    )


def test_null_has_the_same_shapes():
    null = full_condition().null()
    assert null.label.tolist() == [-1, -1, -1]
    for name in NAMES:
        value, given = getattr(null, name), getattr(full_condition(), name)
        assert (value.shape, value.dtype) == (given.shape, given.dtype)
        assert name in ("label", "vector", "image", "image_level", "end_time") or not value.any()
    for name in ("image", "image_level", "end_time"):  # what is to be enlarged, and where a flow map goes, stays
        assert torch.equal(getattr(null, name), getattr(full_condition(), name))
    assert null.vector.isnan().all()
    assert Condition(vector=torch.ones(2, 3)).null().label is None
    assert same(Condition().null(), Condition())


def test_without_a_vector_every_weight_gets_a_gradient():
    """Several processes exchange the gradients of all weights, and wait for one that is missing."""
    embedding = VectorEmbedding(3, 4)
    assert torch.equal(embedding(None), embedding.null)
    embedding(None).sum().backward()
    assert [parameter.grad is not None for parameter in embedding.parameters()] == [True] * 5
    assert torch.equal(embedding.null.grad, torch.ones(1, 4))


def test_drop_is_null_where_the_mask_is_true():
    cond, null = full_condition(), full_condition().null()
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


def test_cat_appends_and_take_selects():
    a, b = full_condition(3), full_condition(2)
    both = a.cat(b)
    assert same(both.take(slice(0, 3)), a)
    assert same(both.take(torch.tensor([3, 4])), b)
    assert same(Condition().cat(Condition()), Condition())
    assert same(Condition(label=a.label).cat(Condition(label=b.label)), Condition(label=torch.tensor([1, 2, 3, 1, 2])))


@pytest.mark.parametrize("swapped", [False, True])
def test_cat_refuses_conditions_with_different_fields(swapped):
    pair = [
        Condition(label=torch.zeros(2, dtype=torch.int64)),
        Condition(label=torch.zeros(2, dtype=torch.int64), vector=torch.zeros(2, 1)),
    ]
    with pytest.raises(ValueError, match="conditions to join must have the same fields; only one has 'vector'"):
        pair[swapped].cat(pair[not swapped])


def test_to_moves_every_field_that_is_set():
    moved = full_condition().to("meta")
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}
    assert Condition(label=torch.zeros(1, dtype=torch.int64)).to("meta").vector is None


def test_every_token_counts_by_default():
    cond = Condition(tokens=torch.randn(2, 3, 4))
    assert cond.mask.tolist() == [[True] * 3] * 2
    assert not cond.null().mask.any()


SIZES = {"classes": 3, "vector": 4, "tokens": 2}


def test_a_condition_of_the_right_sizes_is_returned_as_it_is():
    cond = Condition(label=torch.tensor([-1, 2]), vector=torch.ones(2, 4), tokens=torch.ones(2, 5, 2))
    assert cond.validate_for(SIZES, 2) is cond
    assert Condition().validate_for({}, 7) == Condition()
    Condition(label=torch.empty(0, dtype=torch.int64)).validate_for(SIZES, 0)


@pytest.mark.parametrize(
    ("name", "value", "sizes", "cause"),
    [
        ("label", torch.tensor([0, 0]), {}, "label: the model was trained without it"),
        ("label", torch.tensor([0, 0]), SIZES | {"classes": 0}, "label: the model was trained without it"),
        ("image", torch.zeros(2, 1, 2, 2), SIZES, "image: the model was trained without it"),
        ("label", torch.tensor([0, 3]), SIZES, r"it ranges from 0 to 3. Labels are 0 to 2, or -1 for none"),
        ("label", torch.tensor([-2, 2]), SIZES, r"it ranges from -2 to 2. Labels"),
        ("label", torch.tensor([0]), SIZES, r"its shape is \(1,\), not \(2,\). Give one for each item"),
        ("label", torch.tensor([[0, 0]]), SIZES, r"its shape is \(1, 2\), not \(2,\)"),
        ("vector", torch.zeros(2, 3), SIZES, r"its shape is \(2, 3\), not \(2, 4\)"),
        ("vector", torch.zeros(3, 4), SIZES, r"its shape is \(3, 4\), not \(2, 4\)"),
        ("tokens", torch.zeros(2, 5, 3), SIZES, r"its shape is \(2, 5, 3\), not \(2, 5, 2\)"),
        ("tokens", torch.zeros(1, 5, 2), SIZES, r"its shape is \(1, 5, 2\), not \(2, 5, 2\)"),
    ],
)
def test_a_condition_that_the_network_does_not_accept_is_refused(name, value, sizes, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        Condition(**{name: value}).validate_for(sizes, 2)
    assert caught.value.where == f"condition.{name}"


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"image": torch.zeros(1, 3, 2, 2)}, r"image: its shape is \(1, 3, 2, 2\), not \(2, 3, 2, 2\)"),
        ({"image": torch.zeros(2, 1, 2, 2)}, r"image: its shape is \(2, 1, 2, 2\), not \(2, 3, 2, 2\)"),
        ({"image": torch.full((2, 3, 2), torch.nan)}, r"image: it is not a floating-point image, or holds NaN"),
        ({"image": torch.zeros(2, 3, 2, dtype=torch.uint8), "image_level": torch.zeros(2)}, r"image: it is not a"),
        ({"image": torch.zeros(2, 3, 2), "image_level": torch.zeros(2, 1)}, r"image_level: its shape is \(2, 1\)"),
        ({"image": torch.zeros(2, 3, 2), "image_level": torch.full((2,), torch.nan)}, r"image_level: some are NaN"),
        ({"image_level": torch.zeros(2)}, r"image_level: there is no image"),
    ],
)
def test_an_image_must_fit_its_items(fields, cause):
    with pytest.raises(ConfigError, match=cause):
        Condition(**fields).validate_for({"image": 3}, 2)
    Condition(image=torch.zeros(2, 3, 9, 5)).validate_for({"image": 3}, 2)


def test_a_mask_must_fit_its_tokens():
    with pytest.raises(ConfigError, match=r"tokens: its shape is \(2, 5, 2\), not \(2, 4, 2\)"):
        Condition(tokens=torch.zeros(2, 5, 2), mask=torch.ones(2, 4, dtype=torch.bool)).validate_for(SIZES, 2)
    with pytest.raises(ConfigError, match=r"mask: its shape is \(1, 5\), not \(2, 5\)"):
        Condition(tokens=torch.zeros(2, 5, 2), mask=torch.ones(1, 5, dtype=torch.bool)).validate_for(SIZES, 2)


def test_cat_of_sequences_of_other_lengths_pads_the_shorter():
    one = Condition(text=torch.ones(1, 2, dtype=torch.int32), tokens=torch.ones(1, 3, 4))
    two = Condition(text=torch.full((2, 4), 5), tokens=torch.ones(2, 1, 4))
    for both, lengths in ((one.cat(two), [(2, 3), (4, 1), (4, 1)]), (two.cat(one), [(4, 1), (4, 1), (2, 3)])):
        assert both.text.dtype == torch.int64
        assert [tuple(row) for row in zip((both.text > 0).sum(1), both.mask.sum(1), strict=True)] == lengths
        assert both.tokens.shape == (3, 3, 4)
        assert not both.tokens[~both.mask].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.ones(2, 5, dtype=torch.int64), "its prompts have up to 5 bytes, and the model takes 4"),
        (torch.full((2, 4), 257), "it ranges from 257 to 257"),
        (torch.full((2, 4), -1), "it ranges from -1 to -1"),
        (torch.ones(3, 4, dtype=torch.int64), r"its shape is \(3, 4\), not \(2, 4\)"),
        (torch.ones(2, dtype=torch.int64), r"its shape is \(2,\), not \(2, 4\)"),
    ],
)
def test_text_must_fit_the_network(text, message):
    with pytest.raises(ConfigError, match=f"text: {message}"):
        Condition(text=text).validate_for({"text": 4}, 2)
    Condition(text=torch.zeros(2, 0, dtype=torch.int64)).validate_for({"text": 4}, 2)
    with pytest.raises(ConfigError, match="not whole numbers"):
        Condition(text=torch.ones(2, 4))

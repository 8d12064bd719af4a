"""What holds for every network: conditions change the output, items do not mix, dtypes are kept."""

import math
from dataclasses import replace

import pytest
import torch
from network_cases import CASES, condition, inputs, noise, randomized
from torch import nn

from undiffuse.networks import registry
from undiffuse.networks.attention import CrossAttention
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import sinusoids
from undiffuse.networks.mlp import MLP
from undiffuse.networks.registry import BUILT_IN

cases = pytest.mark.parametrize("case", CASES)
conditional_cases = pytest.mark.parametrize("case", ["all-conditions", "all-conditions-dit", "all-conditions-mlp"])


def test_every_kind_has_a_case():
    assert {kind for _, kind in BUILT_IN} <= {type(make()) for make in CASES.values()}


@cases
def test_the_output_is_zero_at_initialization(case):
    assert (CASES[case]()(inputs(case), torch.rand(4)) == 0).all()


@cases
def test_time_changes_the_output_on_every_scale(case):
    network, x = randomized(CASES[case]()), inputs(case, 1)
    for one, other in [(3999.0, 4000.0), (0.0, 1.0), (-20.0, -19.5), (12.0, 12.1), (-1.2, -1.1)]:
        a, b = network(x, torch.tensor(one)), network(x, torch.tensor(other))
        assert (a - b).abs().max() > 1e-4 * a.abs().max()


@cases
def test_a_scalar_time_is_the_time_of_every_item(case):
    network, x = randomized(CASES[case]().double()), inputs(case).double()
    torch.testing.assert_close(network(x, torch.tensor(7.0)), network(x, torch.full((4,), 7.0)))


@cases
def test_labels_change_the_output_and_the_null_label_equals_no_label(case):
    network, x, time = randomized(CASES[case]().double()), inputs(case).double(), torch.tensor(1.0)
    outputs = [network(x, time, Condition(label=torch.full((4,), label))) for label in (-1, 0, 1, 2)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(network(x, time), outputs[0])
    torch.testing.assert_close(network(x, time, Condition()), outputs[0])


@conditional_cases
def test_vectors_and_tokens_change_the_output(case):
    network, x, time = randomized(CASES[case]()), inputs(case), torch.tensor(1.0)
    before = network(x, time, condition())
    for name in ("vector", "tokens"):
        changed = network(x, time, replace(condition(), **{name: getattr(condition(), name).flip(-1)}))
        difference = (changed - before).flatten(1).abs().amax(1)
        null = 1 if name == "vector" else 0  # the item with a null vector, or with all tokens masked
        assert difference[null] == 0, name
        assert difference[torch.arange(4) != null].min() > 1e-3, name


@conditional_cases
def test_a_masked_token_has_no_effect_whatever_its_values(case):
    network, x, time = randomized(CASES[case]()), inputs(case), torch.tensor(1.0)
    cond, before = condition(), network(x, time, condition())
    for garbage in (7.0, 1e30, math.nan, math.inf):
        cond.tokens[~cond.mask] = garbage
        assert torch.equal(network(x, time, cond), before)
    masked = torch.zeros(4, 2, dtype=torch.bool)
    tokens, mask = torch.cat([condition().tokens, noise(4, 2, 5)], 1), torch.cat([cond.mask, masked], 1)
    longer = replace(condition(), tokens=tokens, mask=mask)
    torch.testing.assert_close(network(x, time, longer), before, rtol=1e-5, atol=1e-5)
    cond.mask[3, 0] = False  # power: a token that counted
    assert (network(x, time, cond) - before)[3].abs().max() > 1e-3


@conditional_cases
def test_scaled_and_shifted_tokens_have_the_same_effect(case):
    network, x, time = randomized(CASES[case]()), inputs(case), torch.tensor(1.0)
    scaled = replace(condition(), tokens=1000 * condition().tokens + 7)
    torch.testing.assert_close(network(x, time, scaled), network(x, time, condition()), rtol=1e-2, atol=1e-2)


@conditional_cases
def test_no_condition_equals_the_null_condition_of_each_kind(case):
    network, x, time = randomized(CASES[case]()), inputs(case), torch.tensor(1.0)
    null = network(x, time, condition().null())
    for cond in (None, Condition(), Condition(label=torch.full((4,), -1)), Condition(tokens=torch.zeros(4, 0, 5))):
        torch.testing.assert_close(network(x, time, cond), null, rtol=1e-5, atol=1e-5)
    zeros = Condition(label=torch.full((4,), -1), vector=torch.zeros(4, 4), tokens=torch.zeros(4, 1, 5))
    assert (network(x, time, zeros) - null).flatten(1).abs().amax(1).min() > 1e-3  # zeros are not null


@conditional_cases
def test_cross_attention_adds_nothing_at_initialization(case, monkeypatch):
    network, x, time = CASES[case](), inputs(case), torch.rand(4)
    end = network.proj_out if hasattr(network, "proj_out") else network.conv_out
    nn.init.normal_(end.weight)
    before = network(x, time, condition())
    monkeypatch.setattr(CrossAttention, "forward", lambda layer, h, *tokens: h)
    assert torch.equal(network(x, time, condition()), before)
    assert before.abs().max() > 0.1


@conditional_cases
def test_vectors_are_standardized_by_the_moments_of_the_data(case):
    network, x, time = randomized(CASES[case]()), inputs(case), torch.tensor(1.0)
    before = network(x, time, condition())
    mean, std = torch.tensor([1e3, -2.0, 0.0, 5.0]), torch.tensor([10.0, 0.1, 1.0, 2.0])
    network.embed.vector.init_moments(mean, std)
    moved = replace(condition(), vector=mean + std * condition().vector)
    torch.testing.assert_close(network(x, time, moved), before, rtol=1e-3, atol=1e-3)
    assert {"embed.vector.mean", "embed.vector.std"} <= set(network.state_dict())


def test_a_network_without_classes_ignores_labels():
    network, x = randomized(MLP(2, width=16, depth=2)), noise(2, 2)
    labelled = network(x, torch.tensor(1.0), Condition(label=torch.tensor([0, 9])))
    assert torch.equal(labelled, network(x, torch.tensor(1.0)))


@cases
def test_gradients_reach_every_parameter(case):
    network, x = randomized(CASES[case]()), inputs(case)
    network(x, torch.rand(4), condition()).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@cases
def test_items_do_not_affect_each_other(case):
    network, x, time = randomized(CASES[case]().double()), inputs(case).double(), torch.tensor([0.0, 1.0, 10.0, 999.0])
    together = network(x, time, condition())
    alone = [network(x[i : i + 1], time[i : i + 1], condition().take(slice(i, i + 1))) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)


@cases
def test_dropout_is_for_training_only(case):
    network, x, time = randomized(CASES[case](dropout=0.5)), inputs(case), torch.tensor(1.0)
    assert torch.equal(network(x, time), network(x, time))
    network.train()
    assert not torch.equal(network(x, time), network(x, time))


@cases
def test_float64_throughout(case):
    network = randomized(CASES[case]().double())
    assert network(inputs(case).double(), torch.rand(4, dtype=torch.float64), condition()).dtype == torch.float64


@cases
def test_bfloat16_autocast_keeps_999_and_1000_apart_and_returns_float32(case):
    network, x, times = randomized(CASES[case]()), inputs(case), torch.tensor([999.0, 1000.0])
    exact = network.embed(times, None)
    with torch.autocast("cpu", torch.bfloat16):
        embedding = network.embed(times, None)
        a, b = (network(x, time) for time in times)
    assert a.dtype == torch.float32
    assert (a - b).abs().max() > 0.02
    assert torch.equal(embedding, exact)


def test_sinusoids_are_those_of_ho_also_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        computed = sinusoids(torch.tensor([0.0, 999.0]), 8)
    angle = torch.tensor([0.0, 999.0]).double()[:, None] * 10_000.0 ** (-torch.arange(4).double() / 3)
    torch.testing.assert_close(computed.double(), torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", "dit", "mlp"])
def test_a_second_time_has_an_embedding_of_its_own_in_every_kind(kind):
    """It was taken for the setting ``image`` of the embedding of the MLP, so that the end time had no effect."""
    embed = registry.build(kind, channels=2, two_times=True).embed
    assert embed.end is not None
    assert embed.image_level is None

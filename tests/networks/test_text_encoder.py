"""The transformer over bytes: its null prompt, its mask, the order of bytes, its formula."""

import math
from dataclasses import replace

import pytest
import torch
from network_cases import SMALL, noise, randomized
from torch.nn import functional as F

from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import sinusoids
from undiffuse.networks.mlp import MLP
from undiffuse.networks.text_encoder import TEXT_HEADS, TEXT_WIDTH, TextEncoder
from undiffuse.networks.unet import UNet

NETWORKS = {
    "unet": lambda **more: UNet(2, **SMALL, text=12, **more),
    "mlp": lambda **more: MLP(2, width=16, depth=2, text=12, **more),
}


def text(*prompts: str, length: int = 12) -> torch.Tensor:
    rows = [[b + 1 for b in prompt.encode()] for prompt in prompts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def network(kind: str, **more):
    return randomized(NETWORKS[kind](**more)).double()


def inputs(kind: str, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = noise(n, 2, dtype=torch.float64) if kind == "mlp" else noise(n, 2, 5, 6, dtype=torch.float64)
    return x, torch.linspace(-2, 3, n)


def test_it_has_the_size_that_the_docs_state():
    encoder = TextEncoder(16, 8)
    assert (encoder.byte.embedding_dim, len(encoder.layers), encoder.layers[0].heads) == (128, 2, 4)


@pytest.mark.parametrize("more", [{}, {"classes": 3, "vector": 4, "tokens": 5}], ids=["text", "all"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_null_prompt_is_no_prompt(kind, more):
    model, (x, time) = network(kind, **more), inputs(kind)
    prompt = Condition(text=text("a disc", "b"))
    nulls = [None, Condition(), prompt.null(), prompt.drop(torch.ones(2, dtype=torch.bool))]
    nulls += [
        Condition(text=torch.zeros(2, 1, dtype=torch.int64)),
        Condition(text=torch.zeros(2, 0, dtype=torch.int64)),
    ]
    with torch.no_grad():
        expected, *others = [model(x, time, cond) for cond in nulls]
        for other in others:
            torch.testing.assert_close(other, expected)
        changed = model(x, time, prompt)
        half = model(x, time, prompt.drop(torch.tensor([False, True])))
    assert (changed - expected).abs().amax(tuple(range(1, x.ndim))).min() > 1e-3
    torch.testing.assert_close(half, torch.stack([changed[0], expected[1]]))


@pytest.mark.parametrize("kind", NETWORKS)
def test_padding_changes_nothing_and_the_order_of_bytes_does(kind):
    model, (x, time) = network(kind), inputs(kind)
    with torch.no_grad():
        short = model(x, time, Condition(text=text("red dog", "dog red", length=7)))
        padded = model(x, time, Condition(text=text("red dog", "dog red", length=12)))
        torch.testing.assert_close(padded, short)
        same_x = x[:1].expand_as(x), time[:1].expand_as(time)
        ordered = model(*same_x, Condition(text=text("red dog", "dog red")))
    assert (ordered[0] - ordered[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", NETWORKS)
def test_text_acts_through_the_pooled_vector_and_through_attention(kind, monkeypatch):
    model, (x, time) = network(kind), inputs(kind)
    one, two = Condition(text=text("a disc", "b")), Condition(text=text("a box", "c"))

    def difference() -> float:
        with torch.no_grad():
            return float((model(x, time, one) - model(x, time, two)).abs().max())

    assert difference() > 1e-4
    pooled, tokens = model.text.pooled.weight.clone(), model.text.tokens.weight.clone()
    for only in (pooled, tokens):
        with torch.no_grad():
            model.text.pooled.weight.copy_(pooled if only is pooled else 0 * pooled)
            model.text.tokens.weight.copy_(tokens if only is tokens else 0 * tokens)
        assert difference() > 1e-4


def test_the_encoder_by_formula():
    encoder = randomized(TextEncoder(6, 5)).double()
    prompts = text("ab", "")
    with torch.no_grad():
        pooled, tokens, mask = encoder(Condition(text=prompts), torch.zeros(2, 3, dtype=torch.float64))
        positions = sinusoids(torch.arange(2), TEXT_WIDTH).double()
        h = torch.cat([encoder.start_token, encoder.byte(torch.tensor([98, 99])) + positions])
        expected, null = encoder.norm(layers(encoder, h)), encoder.norm(layers(encoder, encoder.null_token))
    assert mask[:, 0, 0].tolist() == [[True] * 3 + [False] * 10, [True] + [False] * 12]
    torch.testing.assert_close(pooled, encoder.pooled(torch.cat([expected[:1], null])))
    torch.testing.assert_close(tokens[0, :3], encoder.tokens(expected))
    torch.testing.assert_close(tokens[1, :1], encoder.tokens(null))


def layers(encoder: TextEncoder, h: torch.Tensor) -> torch.Tensor:
    for layer in encoder.layers:
        q, k, v = layer.qkv(layer.norm1(h)).chunk(3, -1)
        heads = []
        for a, b, c in zip(*(part.chunk(TEXT_HEADS, -1) for part in (q, k, v)), strict=True):
            heads.append((a @ b.T / math.sqrt(TEXT_WIDTH // TEXT_HEADS)).softmax(-1) @ c)
        h = h + layer.proj(torch.cat(heads, -1))
        h = h + layer.fc2(F.silu(layer.fc1(layer.norm2(h))))
    return h


def test_a_new_network_ignores_the_prompt():
    model, (x, time) = UNet(2, **SMALL, text=12), inputs("unet")
    torch.testing.assert_close(model(x.float(), time, Condition(text=text("a", "b"))), torch.zeros(2, 2, 5, 6))


def test_an_encoder_for_a_classifier_has_the_text():
    model, (x, time) = network("unet"), inputs("unet")
    encoder, cond = model.encoder(), Condition(text=text("a", "b"))
    assert not torch.equal(encoder(x, time, cond), encoder(x, time, replace(cond, text=text("c", "d"))))

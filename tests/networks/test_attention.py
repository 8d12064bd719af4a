import pytest
import torch
from network_cases import noise, randomized, softmax_attention

from undiffuse.networks.attention import EXPLICIT_POSITIONS, Attention, CrossAttention, attend


def test_attention_is_the_softmax_formula():
    layer = randomized(Attention(16, heads=2).double())
    h = noise(3, 16, 2, 5, dtype=torch.float64)
    tokens = layer.norm(h).flatten(2).mT
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.qkv(tokens).chunk(3, -1))
    mixed = layer.proj(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(h), h + mixed.mT.reshape(h.shape))


@pytest.mark.parametrize("item", range(3))
def test_cross_attention_is_the_softmax_formula_over_the_unmasked_tokens(item):
    layer = randomized(CrossAttention(16, 5, heads=2).double())
    h, tokens = noise(3, 16, 2, 5, dtype=torch.float64), noise(3, 4, 5, seed=2, dtype=torch.float64)
    q = layer.q(layer.norm(h).flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.kv(tokens).chunk(2, -1))
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [True] * 4])
    kept = mask[item]
    mixed = softmax_attention(q[item], k[item][:, kept], v[item][:, kept]).transpose(0, 1).flatten(1)
    expected = h[item] + layer.proj(mixed).mT.reshape(h[item].shape)
    torch.testing.assert_close(layer(h, tokens, mask[:, None, None])[item], expected)


@pytest.mark.parametrize("keys", [9, EXPLICIT_POSITIONS + 1])
def test_attention_in_bfloat16_computes_the_softmax_in_float32(keys):
    """Logits of up to 48 would be rounded by 0.13 in bfloat16, and their weights be 13 % off."""
    q, k, v = noise(3, 2, 2, keys, 8).bfloat16()
    q = 8 * q
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, k, v)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), softmax_attention(q.float(), k.float(), v.float()), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("keys", [9, EXPLICIT_POSITIONS + 1])
def test_attention_in_bfloat16_ignores_masked_keys(keys):
    q, k, v = noise(3, 2, 2, keys, 8).bfloat16()
    mask = torch.arange(keys) < keys - 4
    y = attend(q, k, v, mask[None, None, None])
    expected = softmax_attention(q.float(), k[:, :, mask].float(), v[:, :, mask].float())
    torch.testing.assert_close(y, expected.bfloat16(), atol=0.01, rtol=0.02)

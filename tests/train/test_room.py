"""Memory is counted before it is asked for: what operations made and is still held, in forward and backward passes."""

import pytest
import torch
from torch import nn

from undiffuse.codec import Identity, Pixels
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig, TrainConfig
from undiffuse.diffusion import Diffusion
from undiffuse.train.parallel import recompute
from undiffuse.train.room import Held, activations

UNET = {"kind": "unet", "widths": (8, 8), "blocks": 1, "attention": ()}


def test_what_is_held_at_once_is_counted_once():
    x = torch.zeros(1000)  # 4,000 bytes, made outside
    with Held() as held:
        y = x + 1
        assert held.now == 4000
        y.mul_(2)
        z = y[:500].view(20, 25)
        w = torch.cat([y, y])
        assert (held.now, held.most) == (12_000, 12_000)
        del w
        assert held.now == 4000
        del y
        assert held.now == 4000  # z looks at it
        del z
        assert held.now == 0
        (x.double() * 3).sum()
    assert held.most == 16_000  # both in float64
    with Held(7999), pytest.raises(MemoryError):
        x.double()
    with Held(8000):
        x.double()


def test_a_backward_pass_counts():
    """x → tanh → tanh: both results are kept, and the backward pass holds two gradients at once."""
    x, given = torch.zeros(1000, requires_grad=True), torch.ones(1000)
    with Held() as held:
        torch.autograd.grad(x.tanh().tanh(), x, given)
    assert held.most == 4 * 4000
    assert held.now == 0


@pytest.mark.parametrize(
    ("network", "shape", "codec"),
    [
        (UNET, (1, 8, 8), Pixels(5)),
        (UNET | {"classes": 3}, (2, 8), Identity()),
        ({"kind": "mlp", "width": 16, "depth": 2}, (3,), Identity()),
    ],
)
def test_a_pass_takes_so_much_for_each_item(network, shape, codec):
    model = Diffusion(ModelConfig(network=network), shape, codec)
    state, weights = torch.random.get_rng_state(), [p.clone() for p in model.parameters()]
    each = activations(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(model.parameters(), weights, strict=True))
    n = 16
    noise = torch.randn(n, *shape)
    values, u = codec.decode(noise), torch.rand(n)
    cond = Condition(label=torch.zeros(n, dtype=torch.int64)) if "classes" in network else None
    with Held() as held:
        model.loss(values, u, noise, noise, cond).mean().backward()
    fixed = 4 * sum(p.numel() for p in model.parameters())
    assert n * each - n * fixed <= held.most <= n * each + fixed
    assert held.most > 0.5 * n * (each - fixed)


def test_recomputing_takes_less_and_bfloat16_too():
    model = Diffusion(ModelConfig(network=UNET | {"blocks": 4}), (1, 16, 16), Identity())
    nn.init.normal_(next(model.parameters()))
    whole = activations(model)
    model.autocast = torch.bfloat16
    assert activations(model) < 0.9 * whole
    model.autocast = None
    recompute(model.network, TrainConfig(checkpointing=True))
    assert activations(model) < 0.8 * whole
    with pytest.raises(MemoryError):
        activations(model, limit=1000)

"""The memory of training, estimated before it starts: tensors that a process holds, activations of a forward pass."""

import pytest
import torch
from torch import nn

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import set_checkpointing
from undiffuse.networks.registry import build
from undiffuse.training import memory_estimate
from undiffuse.training.ema import PowerEMA
from undiffuse.training.memory_estimate import check_memory, measure_activations, memory_per_process
from undiffuse.training.optimizer import make_optimizer
from undiffuse.training.posthoc_ema import EMASnapshots

UNET = {"kind": "unet", "widths": (8, 8), "blocks": 1, "attention": ()}


class Tanh(nn.Module):
    """x → tanh(tanh(w x)): autograd keeps x, w and two results of 1,000 numbers each for an item."""

    item_shape = (1000,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def loss(self, items: int) -> torch.Tensor:
        return (self.weight * torch.ones(items, 1000)).tanh().tanh().mean(1)


def test_activations_by_hand():
    """Each storage counts once, and the weights, which the process holds anyway, do not count."""
    model = Tanh()
    for items in (1, 2, 5):
        assert measure_activations(model, model.loss, items) == items * 3 * 4000
    assert measure_activations(model, model.loss, 1, limit=12_000) == 12_000
    assert measure_activations(model, model.loss, 1, limit=11_999) == 12_000  # limit + 1: the pass was not finished
    assert measure_activations(model, lambda n: model.loss(n)[:, None].expand(n, 9).sum(1), 1) == 12_000  # views


def test_what_does_not_grow_with_the_items_counts_once():
    model = Tanh()

    def loss(items):
        return model.loss(items) * model.weight.exp().mean()  # 4,000 bytes more, whatever the batch, and a scalar

    one, ten = (measure_activations(model, loss, n) for n in (1, 10))
    assert ten - one == 9 * (12_000 + 4)
    assert one == 12_000 + 4000 + 4 + 4


def loss_of(model, network=UNET):
    def loss(items):
        noise = torch.zeros(items, *model.item_shape)
        cond = Condition(label=torch.zeros(items, dtype=torch.int64)) if "classes" in network else None
        return model.loss(model.transform.to_data(noise), torch.full((items,), 0.5), noise, noise, cond)

    return loss


def saved_bytes(loss, model, items):
    """Bytes of what autograd keeps for a pass, counted from the graph by storage."""
    storages, own = {}, {p.data_ptr() for p in model.parameters()}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = loss(items)
    assert losses.shape == (items,)
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize(
    ("network", "shape", "transform"),
    [
        (UNET, (1, 8, 8), IntegerLevels(5)),
        (UNET | {"classes": 3}, (2, 8), Identity()),
        ({"kind": "mlp", "width": 16, "depth": 2}, (3,), Identity()),
    ],
)
def test_three_items_predict_the_activations_of_a_batch(network, shape, transform):
    model = Diffusion(ModelConfig(network=network), shape, transform)
    loss = loss_of(model, network)
    state, weights = torch.random.get_rng_state(), [p.clone() for p in model.parameters()]
    estimate = measure_activations(model, loss, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, was) for p, was in zip(model.parameters(), weights, strict=True))
    assert estimate == pytest.approx(saved_bytes(loss, model, 16), rel=0.02)


def test_checkpointing_and_bfloat16_take_less():
    model = Diffusion(ModelConfig(network=UNET | {"blocks": 4}), (1, 16, 16), Identity())
    nn.init.normal_(next(model.parameters()))
    whole = measure_activations(model, loss_of(model), 8)
    model.autocast = torch.bfloat16
    assert measure_activations(model, loss_of(model), 8) < 0.9 * whole
    model.autocast = None
    set_checkpointing(model.network, True)
    assert measure_activations(model, loss_of(model), 8) < 0.8 * whole


def test_the_check_refuses_exactly_what_does_not_fit(monkeypatch):
    model, other = Tanh(), Tanh()
    for settings, weights, items, processes, others in (
        (TrainConfig(batch=1), 7, 1, 1, ()),
        (TrainConfig(batch=1, ema=0.1), 7, 1, 1, ()),
        (TrainConfig(batch=1, ema=0.07), 8, 1, 1, ()),
        (TrainConfig(batch=1, snapshots=0), 6, 1, 1, ()),
        (TrainConfig(batch=1), 9, 1, 1, (other, Tanh(), other)),
        (TrainConfig(batch=600, accumulate=3), 7, 200, 1, ()),
        (TrainConfig(batch=600, accumulate=3), 7, 100, 2, ()),
    ):
        need = 4000 * weights + 1000 * settings.batch + (8000 + 12_000) * items
        monkeypatch.setattr(memory_estimate, "available_memory", lambda need=need: need)
        check_memory(model, Tanh.loss, settings, processes, others)
        monkeypatch.setattr(memory_estimate, "available_memory", lambda need=need: need - 1)
        with pytest.raises(ConfigError, match=r"needs at least .* may be used here\. Give a smaller") as caught:
            check_memory(model, Tanh.loss, settings, processes, others)
        assert caught.value.where == ("model.network" if items == 1 else f"train.batch = {settings.batch:,}")


@pytest.mark.parametrize(("length", "snapshots", "averages"), [(0.05, 4, 2), (0.07, 4, 3), (0.05, 0, 1)])
def test_memory_per_process_is_that_of_its_tensors(tmp_path, length, snapshots, averages):
    network, ema_model = nn.Linear(30, 50), nn.Linear(30, 50)
    optimizer = torch.optim.AdamW(network.parameters())
    ema = PowerEMA(network, length)
    others = EMASnapshots(network, ema, length, snapshots, tmp_path)
    network(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    tensors = [*network.parameters(), *ema_model.parameters(), *(p.grad for p in network.parameters())]
    tensors += [*ema.mean.values(), *others.state.values()]
    tensors += [t for moments in optimizer.state.values() for t in moments.values() if t.ndim]
    parameters = sum(p.numel() for p in network.parameters())
    assert memory_per_process(parameters, averages=averages) == sum(t.nbytes for t in tensors)


def test_memory_with_muon_is_that_of_its_moments(monkeypatch):
    network = build("dit", channels=1, width=8, depth=2, heads=2, patch=2)
    settings = TrainConfig(optimizer="muon", batch=1)
    optimizer = make_optimizer([{"params": list(network.parameters())}], network, settings)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    model, items = nn.Module(), []
    model.network, model.item_shape = network, (1, 2, 2)
    n = sum(p.numel() for p in network.parameters())
    monkeypatch.setattr(memory_estimate, "measure_activations", lambda *arguments: items.append(arguments[-1]) or 0)
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 10**9)
    check_memory(model, lambda m, n: torch.zeros(n), settings)
    assert items == [10**9 - (4 * n * 5 + moments)]

"""Muon beside AdamW: the orthogonalization against the SVD, a step by hand, resuming, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from network_cases import noise
from tiny_run import checkpoint_hashes, data, quick_looks, recipe, stopping_at, train
from torch import nn

from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.model.config import TrainConfig, replace_train
from undiffuse.networks.registry import build
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training import fit as loop
from undiffuse.training.optimizer import Muon, block_matrices, make_optimizer, orthogonalize

f64 = torch.float64
MUON = TrainConfig(optimizer="muon", lr=0.01, betas=(0.9, 0.99))
DIT = {"kind": "dit", "patch": 2, "width": 8, "depth": 1, "heads": 2}


def polynomial(s):
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)])
def test_orthogonalization_is_that_of_the_svd(shape):
    matrix = noise(*shape, dtype=f64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag(polynomial(s / s.norm())) @ vh)
    torch.testing.assert_close(orthogonalize(1e5 * matrix), orthogonalize(matrix))
    polar = u @ vh
    assert (orthogonalize(matrix) * polar).sum() / (orthogonalize(matrix).norm() * polar.norm()) > 0.95


def test_singular_values_end_near_one_and_zero_stays_zero():
    s = torch.logspace(-2, 0, 10_001, dtype=f64)
    assert 0.68 < polynomial(s).min() < polynomial(s).max() < 1.14
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert orthogonalize(torch.full((3, 4), 1e-13)).norm() < 0.01  # a rounding error is no direction


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_are_in_the_precision_of_training(precision):
    """In bfloat16 of gradients with singular values over three decades: within 1.5°, and not the same numbers."""
    network, block = pair()
    network.float()
    optimizer = make_optimizer([{"params": list(network.parameters())}], network, replace(MUON, precision=precision))
    weight, before = block["linear"].weight, block["linear"].weight.detach().clone()
    weight.grad = noise(*weight.shape) * torch.logspace(0, -3, 4)
    expected = orthogonalize(weight.grad)
    optimizer.step()
    move = (before * (1 - 0.01 * 0.01) - weight.detach()) / (0.01 * 0.4 * math.sqrt(6))
    assert weight.dtype == torch.float32
    cosine = (move * expected).sum() / move.norm() / expected.norm()
    assert cosine > math.cos(math.radians(1.5))
    assert torch.allclose(move, expected, atol=1e-4) == (precision == "float32")


def pair():
    """A network of one block, a linear layer and a convolution, and its optimizer in float64."""
    block = nn.ModuleDict({"linear": nn.Linear(4, 6), "conv": nn.Conv2d(3, 5, 3), "label": nn.Embedding(3, 4)})
    network = nn.Module()
    network.blocks_, network.last = nn.ModuleList([block]), nn.Linear(2, 2)
    network = network.double()
    return network, block


def test_one_step_and_a_second_by_hand():
    network, block = pair()
    others = [p for n, p in network.named_parameters() if n not in ("blocks_.0.linear.weight", "blocks_.0.conv.weight")]
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    group = {"params": list(network.parameters()), "weight_decay": 0.1, "lr_factor": 1.0}
    optimizer = make_optimizer([group], network, MUON)
    reference = torch.optim.AdamW([{"params": twins, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.99))
    weights = {name: block[name].weight.detach().clone() for name in ("linear", "conv")}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in (1, 2):
        for i, p in enumerate(network.parameters()):
            p.grad = noise(*p.shape, seed=10 * step + i, dtype=f64)
        for one, twin in zip(others, twins, strict=True):
            twin.grad = one.grad.clone()
        for name in weights:
            g = block[name].weight.grad.clone()
            m[name] = 0.95 * m[name] + 0.05 * g
            u, s, vh = torch.linalg.svd((0.05 * g + 0.95 * m[name]).reshape(len(g), -1), full_matrices=False)
            move = (u @ torch.diag(polynomial(s / s.norm())) @ vh).reshape(g.shape)
            long = {"linear": 6, "conv": 27}[name]
            weights[name] = weights[name] - 0.01 * (0.1 * weights[name] + 0.4 * math.sqrt(long) * move)
        optimizer.step()
        reference.step()
        for name, weight in weights.items():
            torch.testing.assert_close(block[name].weight.detach(), weight, rtol=1e-9, atol=1e-12)
        for one, twin in zip(others, twins, strict=True):
            torch.testing.assert_close(one, twin, rtol=1e-12, atol=1e-14)
    assert {p for p in network.parameters() if "momentum" in optimizer.state[p]} == optimizer.matrices


def test_a_matrix_moves_as_by_the_optimizer_of_torch():
    """`torch.optim.Muon` computes in bfloat16, 8 bits, enlarged by the polynomial's slope of 3.4 a step.

    Its factor is that of the paper, 0.2, so it needs twice the rate.
    """
    _, block = pair()
    weight, twin = block["linear"].weight, nn.Parameter(block["linear"].weight.detach().float())
    theirs = torch.optim.Muon([twin], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ours = Muon([{"params": [weight], "weight_decay": 0.0}], [weight], lr=0.01)
    start = twin.detach().clone()
    for step in range(3):
        g = noise(6, 4, seed=step)
        weight.grad, twin.grad = g.double(), g
        ours.step()
        theirs.step()
    moved = (weight.detach().float() - start).norm()
    assert (weight.detach().float() - twin).norm() < 0.03 * moved


def test_matrices_are_those_of_the_blocks():
    network = build("unet", channels=1, widths=(8,), blocks=1, attention=(), classes=3, tokens=4)
    names = {id(p): n for n, p in network.named_parameters()}
    found = {names[id(p)] for p in block_matrices(network)}
    assert {"down.0.0.conv1.weight", "middle.1.qkv.weight", "up.0.0.cond.weight"} <= found
    assert found == {
        n for n, p in network.named_parameters() if p.ndim > 1 and n.split(".")[0] in ("down", "up", "middle")
    }


def muon_recipe(**settings):
    config = recipe(10, optimizer="muon", **settings)
    return replace(config, model=replace(config.model, network=DIT))


def test_a_stopped_run_resumes_to_the_bit(tmp_path):
    with quick_looks():
        train(muon_recipe(), tmp_path / "one", data())
        with stopping_at(4):
            train(muon_recipe(), tmp_path / "two", data())
        train(muon_recipe(), tmp_path / "two", data())
    assert checkpoint_hashes(tmp_path / "one", 10) == checkpoint_hashes(tmp_path / "two", 10)
    stored, _ = read_tensors(tmp_path / "one" / "checkpoints" / "step-00000010" / "optimizer.safetensors")
    assert sorted({name.split(".")[1] for name in stored}) == ["exp_avg", "exp_avg_sq", "momentum", "step"]
    assert json.loads((tmp_path / "one" / "run.json").read_text())["config"]["train"]["optimizer"] == "muon"


@pytest.mark.parametrize("first", ["adamw", "muon"])
def test_another_optimizer_is_for_force_and_starts_its_own_moments_at_zero(first, tmp_path):
    one = replace_train(muon_recipe(), optimizer=first)
    other = replace_train(one, optimizer={"adamw": "muon", "muon": "adamw"}[first])
    with quick_looks():
        with stopping_at(4):
            train(one, tmp_path, data())
        with pytest.raises(ConfigError, match=r"train\.optimizer"):
            train(other, tmp_path, data())
        train(other, tmp_path, data(), force=True)
    stored, _ = read_tensors(tmp_path / "checkpoints" / "step-00000010" / "optimizer.safetensors")
    by_parameter = {}
    for name in stored:
        by_parameter.setdefault(name.split(".")[0], set()).add(name.split(".")[1])
    kinds = {frozenset(names) for names in by_parameter.values()}
    adamw = frozenset({"step", "exp_avg", "exp_avg_sq"})
    assert kinds == ({adamw} if first == "muon" else {adamw, frozenset({"momentum"})})


def test_a_nan_in_a_gradient_stops_the_run_before_the_weights_move(tmp_path, monkeypatch):
    def poisoned(accelerator, model):
        block_matrices(model.network)[0].grad[0, 0] = math.nan

    monkeypatch.setattr(loop, "average_other_gradients", poisoned)
    with quick_looks(), pytest.raises(NonFiniteError, match="gradient of step 1 is"):
        train(muon_recipe(), tmp_path / "stop", data())
    with quick_looks(), pytest.raises(NonFiniteError, match="of step 6 is"):
        train(muon_recipe(on_nonfinite="skip"), tmp_path / "skip", data())


def test_a_network_without_blocks_is_left_to_adamw(tmp_path):
    with quick_looks():
        for name in ("muon", "adamw"):
            train(recipe(3, optimizer=name), tmp_path / name, data())
    one, other = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("muon", "adamw"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"train.optimizer = 'sgd': must be adamw or muon"):
        TrainConfig(optimizer="sgd")

"""Times that follow the loss, a learned variance and the whole bound, from the model to the loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.checkpoint import read_tensors
from undiffuse.codec import Identity, Pixels
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.diffusion import Diffusion
from undiffuse.errors import CheckpointError
from undiffuse.process.times import RECENT, LossAware
from undiffuse.randomness import ItemNoise
from undiffuse.train import fit, loop, state
from undiffuse.train.batch import Batches
from undiffuse.train.watch import Watch

T = 4
NET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
MODEL = ModelConfig(
    network=NET,
    schedule={"name": "linear_log_snr", "high": 6.0},
    times={"name": "loss_aware"},
    loss="bound",
    variance="learned",
    steps=T,
)
DATA = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), levels=5, name="tiny")


def model(codec=None, scale=0.1, **settings) -> Diffusion:
    torch.manual_seed(0)
    built = Diffusion(replace(MODEL, **settings), (1, 4, 4), codec or Pixels(5))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=scale)
    return built.eval()


def numbers(n=5):
    g = torch.Generator().manual_seed(3)
    return torch.randint(5, (n, 1, 4, 4), generator=g, dtype=torch.uint8), torch.randn(n, 1, 4, 4, generator=g)


MOMENTS = torch.tensor([16.0, 1.0, 0.25, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["bound", "hybrid"])
def test_each_item_is_weighed_by_the_inverse_of_its_probability(loss):
    """Σ_k p_k loss_k is the mean over uniform steps, for every item and its gradient, whatever was observed."""
    values, eps = numbers()
    plain, aware = model(times={"name": "steps"}, loss=loss), model(loss=loss)
    aware.times = LossAware(T, 0.1, MOMENTS[:, None].repeat(1, RECENT))
    p = aware.times.probabilities()
    assert float(p.max() / p.min()) > 4
    starts = p.cumsum(0) - p / 2
    uniform = sum(plain.loss(values, torch.full((5,), (k + 0.5) / T), eps) for k in range(T)) / T
    each = [aware.loss(values, starts[k].expand(5), eps) for k in range(T)]
    torch.testing.assert_close(sum(float(p[k]) * each[k] for k in range(T)), uniform, rtol=1e-5, atol=1e-6)
    for k in range(T):  # an item's own: T times its term, over T p
        raw = plain.loss(values, torch.full((5,), (k + 0.5) / T), eps)
        torch.testing.assert_close(each[k], raw / float(T * p[k]), rtol=1e-5, atol=1e-6)


def test_what_is_observed_are_the_losses_before_they_are_weighed():
    values, eps = numbers()
    aware, plain = model(), model(times={"name": "steps"})
    aware.times = LossAware(T, 0.1, MOMENTS[:, None].repeat(1, RECENT))
    u = torch.tensor([0.01, 0.3, 0.6, 0.99, 0.02], dtype=torch.float64)
    k = (aware.times.sample(u) * T).round().long()
    before = aware.memory["times"]
    aware.observe(u, aware.loss(values, u, eps))
    raw = plain.loss(values, (k - 0.5) / T, eps).detach().double()
    expected = before.clone()
    for step, loss in zip(k.tolist(), raw, strict=True):
        expected[step - 1] = torch.cat([expected[step - 1, 1:], loss[None] ** 2])
    torch.testing.assert_close(aware.memory["times"], expected, rtol=1e-5, atol=0)
    assert (before == MOMENTS[:, None]).all()
    plain.observe(u, raw)
    assert plain.memory == {}


def test_the_variance_learns_from_the_bound_and_the_mean_does_not_in_the_hybrid_loss():
    values, eps = numbers()
    u = torch.linspace(0.05, 0.95, 5)
    rows = []
    for loss, times in (("hybrid", "steps"), ("bound", "steps")):
        one = model(loss=loss, times={"name": times})
        one.loss(values, u, eps).mean().backward()
        rows.append(one.network.leave.weight.grad.flatten(1))
    hybrid, bound = rows
    torch.testing.assert_close(hybrid[1], 0.001 * bound[1], rtol=1e-4, atol=1e-9)
    assert bound[1].abs().max() > 0
    assert bound[0].abs().max() > 0
    simple = model(variance="small", loss="matching", weight={"name": "simple"}, target={"name": "eps"})
    whole = model(loss="hybrid", times={"name": "steps"}, target={"name": "eps"})
    with torch.no_grad():
        for one, other in zip(simple.network.parameters(), whole.network.parameters(), strict=True):
            one.copy_(other[: len(one)])
    for one in (simple, whole):
        one.loss(values, (u * T).floor() / T + 0.5 / T, eps).mean().backward()
    torch.testing.assert_close(
        whole.network.leave.weight.grad[:1], simple.network.leave.weight.grad, rtol=1e-5, atol=1e-8
    )


class Double(Identity):
    def encode(self, values, dtype=torch.float64):
        return values.to(dtype)


@pytest.mark.parametrize("loss", ["bound", "full_bound"])
def test_the_gradient_of_the_bound_is_that_of_finite_differences(loss):
    one = model(Double(), loss=loss, times={"name": "steps"}).double()
    values, eps = (v.double() for v in numbers(2))
    weight = one.network.leave.weight
    u = torch.tensor([0.1, 0.9])
    (gradient,) = torch.autograd.grad(one.loss(values / 5, u, eps).mean(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for h in (1e-4, -1e-4):
        with torch.no_grad():
            weight.add_(h * direction)
            ends.append(float(one.loss(values / 5, u, eps).mean()))
            weight.sub_(h * direction)
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)


def test_the_full_bound_as_a_loss_is_the_bound_that_is_measured():
    """With the same ε for every step; so it is the mean of T times a uniform step's, but for the ends."""
    values, eps = numbers()
    for schedule in (MODEL.schedule, {"name": "linear", "T": T, "first": 0.01, "last": 0.3}):
        one, single = (model(loss=loss, schedule=schedule, times={"name": "steps"}) for loss in ("full_bound", "bound"))
        whole = one.loss(values, torch.zeros(5), eps)
        steps = sum(single.loss(values, torch.full((5,), (k + 0.5) / T), eps) for k in range(T)) / T
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ItemNoise, "__call__", lambda noise, draws: eps[None])
            bound = one.nll(values)
        torch.testing.assert_close(whole.double(), bound.total / 16, rtol=1e-4, atol=1e-4)
        ends = bound.prior + (bound.decoder if schedule is MODEL.schedule else 0)
        torch.testing.assert_close(whole - steps, ends / 16, rtol=1e-3, atol=1e-3, check_dtype=False)
        whole.mean().backward()
        assert all(p.grad is not None for p in one.network.parameters())


# --- the loop ---------------------------------------------------------------------------------------------------------

STEPS = 6
CONFIG = Config(
    MODEL,
    TrainConfig(
        batch=24, steps=STEPS, warmup=1, lr=0.01, precision="float32", held_out=0.2, snapshots=0, previews=2, seed=4
    ),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs that end without their last look."""
    monkeypatch.setattr(Watch, "finish", lambda watch: None)
    monkeypatch.setattr(Watch, "look", lambda watch: None)


def train(config, out):
    return fit(config, DATA, out, device="cpu", quiet=True)


def held(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    return {(f.name, key): v for f in sorted(place.glob("*.safetensors")) for key, v in read_tensors(f)[0].items()}


@pytest.fixture
def stop(monkeypatch):
    """stop(k) ends a run after step k, its state written."""
    at, real = [None], Watch.due
    monkeypatch.setattr(Watch, "due", lambda watch: watch.progress.step == at[0] or real(watch))
    real_write = state.write

    def write(folder, progress, *parts, **settings):
        real_write(folder, progress, *parts, **settings)
        if progress.step == at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(state, "write", write)

    def until(k, config, folder):
        at[0] = k
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)
        at[0] = None

    return until


def test_three_steps_and_three_more_are_six(tmp_path, stop, monkeypatch):
    """Bit for bit, the density of times included, which has followed the losses for some steps by then."""
    seen, real = [], Batches.__call__

    def batch(batches, step):
        made = real(batches, step)
        seen.append(made[1])
        return made

    monkeypatch.setattr(Batches, "__call__", batch)
    stop(STEPS, CONFIG, tmp_path / "whole")
    stop(3, CONFIG, tmp_path / "parts")
    stop(STEPS, CONFIG, tmp_path / "parts")
    whole, parts = (held(tmp_path / name, STEPS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    history = whole["memory.safetensors", "times"]
    assert history.shape == (T, RECENT)
    p = LossAware(T, 0.001, history).probabilities()
    assert float(p.max() / p.min()) > 1.5  # not uniform any more
    assert bool((held(tmp_path / "parts", 3)["memory.safetensors", "times"] != history).any())
    assert len(seen) == 2 * STEPS


def test_the_history_is_that_of_the_whole_batch_however_it_is_cut(tmp_path, stop):
    histories = []
    for accumulate in (1, 4):
        stop(2, replace_train(CONFIG, accumulate=accumulate), tmp_path / str(accumulate))
        histories.append(held(tmp_path / str(accumulate), 2)["memory.safetensors", "times"])
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-6)
    assert (histories[0] >= 0).all()


def test_a_checkpoint_of_other_times_is_refused(tmp_path, stop):
    stop(2, CONFIG, tmp_path)
    model = Diffusion(replace(MODEL, times={"name": "loss_aware", "strata": 2}), (1, 4, 4), Pixels(5))
    average = loop.Average(model, 0.05)
    optimiser = torch.optim.AdamW(model.network.parameters())
    with pytest.raises(CheckpointError, match=r"'times' has the shape \(4, 10\), not \(2, 10\)"):
        state.read_latest(tmp_path / "checkpoints", model, average, optimiser, model.memory)
    (tmp_path / "checkpoints" / "step-00000002" / "memory.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"memory.safetensors"):
        state.read_latest(tmp_path / "checkpoints", model, average, optimiser, model.memory)


def test_a_uniform_density_leaves_no_memory(tmp_path, stop):
    config = replace(CONFIG, model=replace(MODEL, times={"name": "steps"}))
    stop(2, config, tmp_path)
    assert not (tmp_path / "checkpoints" / "step-00000002" / "memory.safetensors").exists()

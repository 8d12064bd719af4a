"""Loss-aware times, a learned variance and the full bound, from the model to the training loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import CheckpointError
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.process.time_sampling import HISTORY_LENGTH, LossAwareSteps
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training import train_state as state
from undiffuse.training.batches import Batches
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.ema import PowerEMA
from undiffuse.training.monitor import Monitor

T = 4
NET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
MODEL = ModelConfig(
    network=NET,
    schedule={"name": "linear_log_snr", "high": 6.0},
    times={"name": "loss_aware"},
    loss="bound",
    variance="learned",
    chain_length=T,
)
DATA = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), num_values=5, name="tiny")


def model(codec=None, scale=0.1, **settings) -> Diffusion:
    torch.manual_seed(0)
    built = Diffusion(replace(MODEL, **settings), (1, 4, 4), codec or IntegerLevels(5))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=scale)
    return built.eval()


def numbers(n=5):
    g = torch.Generator().manual_seed(3)
    return torch.randint(5, (n, 1, 4, 4), generator=g, dtype=torch.uint8), torch.randn(n, 1, 4, 4, generator=g)


MOMENTS = torch.tensor([16.0, 1.0, 0.25, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", ["bound", "hybrid"])
def test_losses_are_weighted_by_inverse_probabilities(loss):
    """Σ_k p_k loss_k is the mean over uniform steps for every item, whatever losses were observed."""
    values, eps = numbers()
    plain, aware = model(times={"name": "steps"}, loss=loss), model(loss=loss)
    aware.times = LossAwareSteps(T, 0.1, MOMENTS[:, None].repeat(1, HISTORY_LENGTH))
    p = aware.times.probabilities()
    assert float(p.max() / p.min()) > 4
    starts = p.cumsum(0) - p / 2
    uniform = sum(plain.loss(values, torch.full((5,), (k + 0.5) / T), eps) for k in range(T)) / T
    each = [aware.loss(values, starts[k].expand(5), eps) for k in range(T)]
    torch.testing.assert_close(sum(float(p[k]) * each[k] for k in range(T)), uniform, rtol=1e-5, atol=1e-6)
    for k in range(T):  # each term over T p
        raw = plain.loss(values, torch.full((5,), (k + 0.5) / T), eps)
        torch.testing.assert_close(each[k], raw / float(T * p[k]), rtol=1e-5, atol=1e-6)


def test_the_time_sampler_observes_unweighted_losses():
    values, eps = numbers()
    aware, plain = model(), model(times={"name": "steps"})
    aware.times = LossAwareSteps(T, 0.1, MOMENTS[:, None].repeat(1, HISTORY_LENGTH))
    u = torch.tensor([0.01, 0.3, 0.6, 0.99, 0.02], dtype=torch.float64)
    k = (aware.times.sample(u) * T).round().long()
    before = aware.time_sampler_state["times"]
    aware.update_time_sampler(u, aware.loss(values, u, eps))
    raw = plain.loss(values, (k - 0.5) / T, eps).detach().double()
    expected = before.clone()
    for step, loss in zip(k.tolist(), raw, strict=True):
        expected[step - 1] = torch.cat([expected[step - 1, 1:], loss[None] ** 2])
    torch.testing.assert_close(aware.time_sampler_state["times"], expected, rtol=1e-5, atol=0)
    assert (before == MOMENTS[:, None]).all()
    plain.update_time_sampler(u, raw)
    assert plain.time_sampler_state == {}


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_without_it():
    values, eps = numbers()
    u = torch.linspace(0.05, 0.95, 5)
    rows = []
    for loss, times in (("hybrid", "steps"), ("bound", "steps")):
        one = model(loss=loss, times={"name": times})
        one.loss(values, u, eps).mean().backward()
        rows.append(one.network.conv_out.weight.grad.flatten(1))
    hybrid, bound = rows
    torch.testing.assert_close(hybrid[1], 0.001 * bound[1], rtol=1e-4, atol=1e-9)
    assert bound[1].abs().max() > 0
    assert bound[0].abs().max() > 0
    simple = model(variance="small", loss="weighted_mse", weight={"name": "simple"}, target={"name": "eps"})
    whole = model(loss="hybrid", times={"name": "steps"}, target={"name": "eps"})
    with torch.no_grad():
        for one, other in zip(simple.network.parameters(), whole.network.parameters(), strict=True):
            one.copy_(other[: len(one)])
    for one in (simple, whole):
        one.loss(values, (u * T).floor() / T + 0.5 / T, eps).mean().backward()
    torch.testing.assert_close(
        whole.network.conv_out.weight.grad[:1], simple.network.conv_out.weight.grad, rtol=1e-5, atol=1e-8
    )


class Double(Identity):
    def to_model(self, values, dtype=torch.float64):
        return values.to(dtype)


@pytest.mark.parametrize("loss", ["bound", "full_bound"])
def test_gradients_of_the_bound_match_finite_differences(loss):
    one = model(Double(), loss=loss, times={"name": "steps"}).double()
    values, eps = (v.double() for v in numbers(2))
    weight = one.network.conv_out.weight
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


def test_the_full_bound_as_a_loss_equals_the_evaluated_bound():
    """With the same ε at every step. It is also T times the mean term, plus the ends."""
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
        batch=24, max_steps=STEPS, warmup=1, lr=0.01, precision="float32", held_out=0.2, snapshots=0, previews=2, seed=4
    ),
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs without evaluations."""
    monkeypatch.setattr(Monitor, "finish", lambda monitor: None)
    monkeypatch.setattr(Monitor, "evaluate_now", lambda monitor: None)


def train(config, out):
    return fit_diffusion(config, DATA, out, device="cpu", quiet=True)


def checkpoint_tensors(folder, step):
    place = folder / "checkpoints" / f"step-{step:08d}"
    return {(f.name, key): v for f in sorted(place.glob("*.safetensors")) for key, v in read_tensors(f)[0].items()}


@pytest.fixture
def stop(monkeypatch):
    """stop(k, config, folder) ends a run after step k, when its checkpoint is written."""
    at, real = [None], Monitor.evaluation_due
    monkeypatch.setattr(Monitor, "evaluation_due", lambda monitor: monitor.progress.step == at[0] or real(monitor))
    real_save = state.TrainState.save

    def save(self, folder, progress):
        real_save(self, folder, progress)
        if progress.step == at[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(state.TrainState, "save", save)

    def until(k, config, folder):
        at[0] = k
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)
        at[0] = None

    return until


def test_a_stopped_run_resumes_to_the_bit(tmp_path, stop, monkeypatch):
    """With the distribution of times, which depends on the losses of earlier steps."""
    steps, real = [], Batches.__call__

    def batch(batches, step):
        steps.append(step)
        return real(batches, step)

    monkeypatch.setattr(Batches, "__call__", batch)
    stop(STEPS, CONFIG, tmp_path / "whole")
    stop(3, CONFIG, tmp_path / "parts")
    stop(STEPS, CONFIG, tmp_path / "parts")
    whole, parts = (checkpoint_tensors(tmp_path / name, STEPS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    history = whole["extra.safetensors", "times"]
    assert history.shape == (T, HISTORY_LENGTH)
    p = LossAwareSteps(T, 0.001, history).probabilities()
    assert float(p.max() / p.min()) > 1.5  # not uniform any more
    assert bool((checkpoint_tensors(tmp_path / "parts", 3)["extra.safetensors", "times"] != history).any())
    assert steps == [*range(STEPS), *range(STEPS)]


def test_the_history_is_that_of_the_whole_batch_with_accumulation(tmp_path, stop):
    histories = []
    for accumulate in (1, 4):
        stop(2, replace_train(CONFIG, accumulate=accumulate), tmp_path / str(accumulate))
        histories.append(checkpoint_tensors(tmp_path / str(accumulate), 2)["extra.safetensors", "times"])
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-6)
    assert (histories[0] >= 0).all()


def test_a_checkpoint_of_other_times_is_refused(tmp_path, stop):
    stop(2, CONFIG, tmp_path)
    model = Diffusion(replace(MODEL, times={"name": "loss_aware", "strata": 2}), (1, 4, 4), IntegerLevels(5))
    optimizer = torch.optim.AdamW(model.network.parameters())
    parts = state.StateParts(model, PowerEMA(model, 0.05), optimizer, model.time_sampler_state)
    with pytest.raises(CheckpointError, match=r"'times' has the shape \(4, 10\), not \(2, 10\)"):
        state.load_latest(tmp_path / "checkpoints", parts)
    (tmp_path / "checkpoints" / "step-00000002" / "extra.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"extra.safetensors"):
        state.load_latest(tmp_path / "checkpoints", parts)


def test_uniform_times_have_no_extra_state(tmp_path, stop):
    config = replace(CONFIG, model=replace(MODEL, times={"name": "steps"}))
    stop(2, config, tmp_path)
    assert not (tmp_path / "checkpoints" / "step-00000002" / "extra.safetensors").exists()

"""Models trained and evaluated in continuous time, and their learned schedules."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_diffusion import MLP, NET, model, numbers

from undiffuse.data.transform import Identity, Standardized
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.gaussian import diffuse
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.process.seeded_noise import ItemNoise, generator
from undiffuse.sampling.sampler import Sampler

UNIFORM = {"name": "uniform", "low": 0.0}
CONTINUOUS = {"loss": "continuous", "times": UNIFORM}
LEARNED = CONTINUOUS | {"schedule": {"name": "learned", "high": 6.0, "low": -4.0, "width": 4}}


class Double(Identity):
    """The identity in float64."""

    def to_model(self, values, dtype=torch.float64):
        return values.to(dtype)


def learned(transform=None, shape=(1, 4, 4), seed=0, ends="learned", **settings) -> Diffusion:
    """A tiny model with random weights and a random learned schedule."""
    config = ModelConfig(network=MLP if len(shape) == 1 else NET, chain_length=10, **(LEARNED | settings))
    config = replace(config, schedule=config.schedule | {"ends": ends})
    torch.manual_seed(seed)
    built = Diffusion(config, shape, transform or Identity()).eval()
    with torch.no_grad():
        for parameter in built.network.parameters():
            parameter.normal_(std=0.3)
        built.schedule.log_slopes.normal_()
    return built


@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("times", [UNIFORM, {"name": "uniform"}, {"name": "logit_normal", "mean": 0.3}])
@pytest.mark.parametrize("schedule", ["linear_log_snr", "cosine", "sigmoid", "variance_exploding"])
def test_the_loss_is_half_the_rate_of_log_snr_over_the_density_of_times(schedule, times, target):
    if schedule in ("cosine", "sigmoid") and times == UNIFORM:
        times = {"name": "uniform", "low": 0.2}
    table = {"T": 10} if schedule == "cosine" else {}
    diffusion = model(loss="continuous", times=times, schedule={"name": schedule, **table}, target={"name": target})
    values, u, eps = numbers()
    at = diffusion.times.sample(u)
    t = diffusion.schedule(at)
    x_t = diffuse(values / 2 - 1, t, eps)
    error = ((eps - diffusion.denoiser()(x_t, t).eps) ** 2).mean((1, 2, 3))
    weight = -0.5 * diffusion.schedule.log_snr_rate(at) / torch.exp(diffusion.times.log_prob(at))
    torch.testing.assert_close(diffusion.loss(values, u, eps), weight.float() * error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear_log_snr", "learned"])
def test_the_loss_is_the_integrand_of_the_bound(schedule):
    """The terms of `nll` at its points with the same noise, times the number of points, per dimension."""
    diffusion = learned(ends="fixed") if schedule == "learned" else model((1, 4, 4), Identity(), **CONTINUOUS)
    values = numbers(3)[2]
    result = diffusion.nll(values, seed=5, mc_samples=4, estimate="continuous")
    offset = torch.stack([torch.rand(1, generator=generator(5, "strata", i))[0] for i in range(3)])
    noise, ends = ItemNoise(5, range(3), (1, 4, 4), "bound"), diffusion.schedule(torch.tensor([0.0, 1.0])).log_snr
    for i in range(4):
        v = (i + offset.double()) / 4
        t = diffusion.schedule.inverse(ends[0] + (ends[1] - ends[0]) * v)
        loss = diffusion.loss(values, t, noise(1)[0]).double()
        width = (ends[1] - ends[0]) / diffusion.schedule.log_snr_rate(t)
        torch.testing.assert_close(width * loss * 16 / 4, result.per_step[:, i], rtol=1e-4, atol=1e-4)


def test_learned_ends_add_the_endpoint_loss():
    diffusion, fixed = learned(), learned(ends="fixed")
    values, (_, u, eps) = numbers(4)[2], numbers(4)
    with torch.no_grad():
        added = diffusion.loss(values, u, eps) - fixed.loss(values, u, eps)
    x, z = values.double(), values.double() + math.exp(-3) * eps.double()
    top = diffusion.schedule(1.0)
    prior = 0.5 * (top.alpha**2 * x**2 + top.sigma**2 - 1 - 2 * torch.log(top.sigma))
    density = 0.5 * (math.log(2 * math.pi) - 6 + math.exp(6.0) * (x - z) ** 2)
    torch.testing.assert_close(added.double(), (prior + density).mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_network_the_ends_and_the_shape():
    """By finite differences in float64: to the ends of the mean, to the shape of the mean square without the ends."""
    diffusion, fixed = (learned(Double(), (3,), ends=ends).double() for ends in ("learned", "fixed"))
    g = torch.Generator().manual_seed(1)
    values, eps = torch.randn(2, 20, 3, generator=g, dtype=torch.float64)
    u = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    diffusion.loss(values, u, eps).mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in diffusion.parameters())

    def slope(parameter, i, function, h=1e-5):
        difference = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[i] += sign * h
                difference += sign * float(function()) / (2 * h)
                parameter.view(-1)[i] -= sign * h
        return difference

    schedule, other = diffusion.schedule, fixed.schedule
    for end in (schedule.high, schedule.low):
        expected = slope(end, 0, lambda: diffusion.loss(values, u, eps).mean())
        assert float(end.grad) == pytest.approx(expected, rel=1e-5)
    for i in range(4):
        expected = slope(other.log_slopes, i, lambda: (fixed.loss(values, u, eps) ** 2).mean())
        assert float(schedule.log_slopes.grad[i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ends", ["learned", "fixed"])
def test_the_chain_follows_the_schedule(ends):
    diffusion = learned(ends=ends)
    before = diffusion.chain
    assert [float(level.log_snr) for level in (before[-1], before[0])] == [6.0, pytest.approx(-4.0, abs=1e-14)]
    assert not before[5].log_snr.requires_grad
    values = numbers(3)[2]
    bound = diffusion.nll(values)
    assert bound.calls == 10
    with torch.no_grad():
        diffusion.schedule.log_slopes += torch.arange(4)
    assert diffusion.chain[5].log_snr != before[5].log_snr
    assert not torch.equal(diffusion.nll(values).diffusion_nats, bound.diffusion_nats)
    assert torch.isfinite(diffusion.sample(2, sampler=Sampler(num_steps=5))).all()
    assert (sum(p.requires_grad for p in diffusion.schedule.parameters())) == (3 if ends == "learned" else 1)


def test_a_cast_does_not_change_the_schedule():
    diffusion = learned()
    before = diffusion.chain
    diffusion.to(torch.bfloat16)
    assert next(diffusion.network.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(a.log_snr, b.log_snr) for a, b in zip(before, diffusion.chain, strict=True))
    assert all(torch.equal(a.alpha, b.alpha) for a, b in zip(before, copy.deepcopy(diffusion).chain, strict=True))


@pytest.mark.parametrize("ends", ["learned", "fixed"])
def test_a_checkpoint_holds_the_schedule_exactly(ends, tmp_path):
    diffusion = learned(ends=ends)
    with torch.no_grad():
        for parameter in diffusion.schedule.parameters():
            parameter += 1 / 3
    save(diffusion, tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert isinstance(again.schedule, LearnedSchedule)
    assert again.state_dict().keys() == diffusion.state_dict().keys()
    for name, tensor in diffusion.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert again.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(again.nll(numbers(2)[2]).total, diffusion.nll(numbers(2)[2]).total)
    other = learned(ends="fixed" if ends == "learned" else "learned")
    save(other, tmp_path / "other.safetensors")
    text = (tmp_path / "other.safetensors").read_bytes()
    assert text.count(b"schedule.high") == (ends == "fixed")
    wider = learned(ends=ends, schedule=LEARNED["schedule"] | {"width": 5})
    wider.config = diffusion.config
    save(wider, tmp_path / "wider.safetensors")
    with pytest.raises(CheckpointError, match=r"'schedule\.log_slopes' has the shape \(5,\), not \(4,\)"):
        load(tmp_path / "wider.safetensors")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (CONTINUOUS | {"times": {"name": "steps"}}, "the times 'steps' are steps of a chain"),
        (CONTINUOUS | {"times": {"name": "loss_aware"}}, "the times 'loss_aware' are steps of a chain"),
        (CONTINUOUS | {"schedule": {"name": "sigmoid"}}, "the weight of the continuous loss is not finite at every"),
        (CONTINUOUS | {"variance": "learned"}, "loss 'continuous' does not train variance 'learned'"),
        (
            LEARNED | {"loss": "weighted_mse"},
            "model.schedule 'learned': only the continuous loss at uniform",
        ),
        (LEARNED | {"loss": "bound"}, "model.schedule 'learned': only the continuous loss at uniform"),
        (LEARNED | {"times": {"name": "uniform"}}, "only the continuous loss at uniform times"),
        (LEARNED | {"times": {"name": "logit_normal"}}, "only the continuous loss at uniform times"),
        (LEARNED | {"schedule": {"name": "learned", "ends": "free"}}, "ends = 'free': unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, cause):
    with pytest.raises(ConfigError) as caught:
        Diffusion(ModelConfig(network=NET, chain_length=10, **settings), (1, 4, 4), Identity())
    assert cause in str(caught.value)


@pytest.mark.parametrize("schedule", ["linear_log_snr", "linear", "flow", "variance_exploding", "sigmoid"])
def test_the_continuous_bound_of_a_model(schedule):
    table = {"T": 10, "first": 0.01, "last": 0.3} if schedule == "linear" else {}
    diffusion = model(schedule={"name": schedule, **table})
    values, _, _ = numbers(7)
    counted = []
    whole = diffusion.nll(values, seed=2, mc_samples=6, estimate="continuous", progress=counted.append)
    parts = diffusion.nll(values, seed=2, mc_samples=6, estimate="continuous", progress=counted.append, batch=3)
    later = diffusion.nll(values[4:], seed=2, mc_samples=6, estimate="continuous", first=4)
    assert counted == [7, 3, 3, 1]
    for name in ("prior", "diffusion_nats", "decoder", "per_step"):
        assert torch.isfinite(getattr(whole, name)).all()
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(getattr(later, name), getattr(whole, name)[4:], rtol=1e-5, atol=1e-5)
    of_decoder = schedule == "linear"  # its last step
    assert (whole.calls, whole.per_step.shape) == (6 + of_decoder, (7, 6))
    assert diffusion.nll(values[:1], estimate="continuous").calls == 32 + of_decoder
    assert not torch.equal(diffusion.nll(values, seed=3, mc_samples=6, estimate="continuous").total, whole.total)


def test_offsets_differ_between_items_and_the_transform_counts():
    diffusion = model((2,), Identity())
    x = torch.zeros(5, 2)
    plain = diffusion.nll(x, estimate="continuous", mc_samples=1)
    assert len(set(plain.per_step.flatten().tolist())) == 5
    moved = model((2,), Standardized((0.0, 0.0), (0.5, 0.5))).nll(x, estimate="continuous", mc_samples=1)
    shift = torch.full((5,), 2 * math.log(0.5), dtype=torch.float64)
    torch.testing.assert_close(moved.total - plain.total, shift, rtol=0, atol=1e-4)

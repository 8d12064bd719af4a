"""The head for integer data against the exact mean of data with independent values."""

import math
from types import SimpleNamespace

import pytest
import torch
from oracles import EmpiricalData, MixtureData
from torch import nn

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.denoising import categorical_head as categorical_head
from undiffuse.denoising.categorical_head import LOGIT_FEATURES, CategoricalHead
from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks import registry as networks
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.gaussian import diffuse
from undiffuse.sampling.sampler import Sampler


class Constant(nn.Module):
    """A network of constant output: ``features`` for each channel, then ``more`` channels of ones."""

    def __init__(self, features: torch.Tensor, more: int = 0) -> None:
        super().__init__()
        self.said, self.more = features, more

    def forward(self, x, time, cond=None):
        body = self.said.reshape(1, -1, *[1] * (x.ndim - 2)).expand(len(x), -1, *x.shape[2:])
        return torch.cat([body, torch.ones_like(body[:, :1]).expand(-1, self.more, *body.shape[2:])], 1)


def test_what_the_head_declares():
    """The blocks of its network, and statistics that it starts from."""
    network = nn.Sequential(nn.Linear(1, 1))
    network.blocks = lambda: list(network)  # type: ignore[assignment]
    head = CategoricalHead(network, 2, 3)
    assert head.blocks() == [network[0]]
    head.init_statistics(SimpleNamespace(counts=torch.tensor([[0, 1, 5], [2, 2, 2]])))
    expected = torch.tensor([[1 / 9, 2 / 9, 6 / 9], [1 / 3] * 3])
    torch.testing.assert_close(torch.softmax(head.bias[:, 0], -1), expected)


def test_the_last_features_of_a_new_head_are_the_first_and_the_last_value():
    ends = CategoricalHead(nn.Linear(1, 1), 2, 16).weight.detach()[:, LOGIT_FEATURES - 2 :]
    assert ends.tolist() == [[[1.0, *[0.0] * 15], [*[0.0] * 15, 1.0]]] * 2


def test_the_waves_of_the_head_are_orthogonal():
    """Those of the discrete cosine transform of type II."""
    waves = CategoricalHead(nn.Linear(1, 1), 2, 16).weight.detach()[:, : LOGIT_FEATURES - 2][:, :16].double()
    expected = torch.diag(torch.tensor([16.0, *[8.0] * (waves.shape[1] - 1)], dtype=torch.float64))
    torch.testing.assert_close(waves @ waves.mT, expected.expand(2, -1, -1), atol=1e-5, rtol=0)


def headed(shape, levels, seed=0, more=0):
    """(a head over items of ``shape`` with random weights, the log-probabilities of its values)."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[0]
    features = torch.randn(channels, LOGIT_FEATURES, generator=g, dtype=torch.float64)
    head = CategoricalHead(Constant(features, more), channels, levels).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=g))
        head.bias.copy_(torch.randn(head.bias.shape, generator=g))
    logits = torch.einsum("cr,crk->ck", features, head.weight) + head.bias[:, 0]
    return head, torch.log_softmax(logits.detach(), -1)


SHAPES = [(3, 2, 4), (1, 5), (2,), (2, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("log_snr", [-4.0, 2.0, 9.0])
def test_the_mean_is_that_of_independent_values(shape, levels, log_snr):
    head, log_slopes = headed(shape, levels)
    schedule = S.LinearLogSNR()
    level = schedule(schedule.inverse(log_snr))
    transform = IntegerLevels(levels)
    g = torch.Generator().manual_seed(1)
    x = transform.to_model(torch.randint(0, levels, (6, *shape), generator=g), torch.float64)
    x_t = diffuse(x, level, torch.randn(x.shape, generator=g, dtype=torch.float64))
    at = level.broadcast_like(x_t)
    x_hat = head(x_t, level.t.expand(6), None, x_t, at.alpha, at.sigma)
    v = transform.to_model(torch.arange(levels), torch.float64)[:, None]
    for channel in range(shape[0]):
        data = MixtureData(log_slopes[channel].exp(), v, torch.zeros(levels, 1, dtype=torch.float64))
        exact = data.predict(x_t[:, channel].reshape(-1, 1), level).x
        torch.testing.assert_close(x_hat[:, channel].reshape(-1, 1), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("log_snr", [-4.0, 5.0])
def test_the_probability_of_each_value_is_that_of_bayes_rule(shape, log_snr, monkeypatch):
    head, log_slopes = headed(shape, 17, more=2)
    level = S.LinearLogSNR(high=log_snr)(0.0)
    g = torch.Generator().manual_seed(1)
    k = torch.randint(0, 17, (6, *shape), generator=g)
    v = IntegerLevels(17).to_model(torch.arange(17), torch.float64)
    x_t = diffuse(v[k], level, torch.randn(k.shape, generator=g, dtype=torch.float64))
    at = level.broadcast_like(x_t)
    result = head(x_t, level.t.expand(6), None, x_t, at.alpha, at.sigma, k)
    for channel in range(shape[0]):
        joint = log_slopes[channel] - (x_t[:, channel, ..., None] - level.alpha * v) ** 2 / (2 * level.sigma**2)
        expected = torch.log_softmax(joint, -1).gather(-1, k[:, channel, ..., None])[..., 0]
        torch.testing.assert_close(result[:, channel], expected, rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(categorical_head, "CHUNK_ELEMENTS", (1, 1))
    chunked = head(x_t, level.t.expand(6), None, x_t, at.alpha, at.sigma, k)
    torch.testing.assert_close(chunked, result, rtol=1e-12, atol=1e-12)


def test_the_probability_is_float64_around_a_network_of_lower_precision():
    head, _ = headed((2, 3), 256)
    denoise = NetworkDenoiser(head, S.LinearLogSNR(), targets.build("v"), Preconditioning(), categorical=True)
    k = torch.tensor([[[3, 200, 255], [0, 1, 254]]])
    x = IntegerLevels(256).to_model(k, torch.float64)
    level = S.LinearLogSNR()(0.0)
    z = diffuse(x, level, torch.full_like(x, 2.5))  # between two values
    exact = denoise.value_log_prob(k, z, level)
    head.float()
    for autocast in (None, torch.bfloat16):
        denoise.autocast = autocast
        result = denoise.value_log_prob(k, z, level, dtype=torch.float32)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, exact, rtol=2e-2 if autocast else 1e-5, atol=1e-6)
    assert -5 < float(exact.detach().min()) < -0.01


def test_an_untrained_head_of_equal_counts_rounds_at_the_clean_end():
    head = CategoricalHead(Constant(torch.zeros(1, LOGIT_FEATURES)), 1, 256)
    head.init_from_counts(torch.full((1, 256), 7))
    values = torch.arange(256)[:, None, None, None]
    x = IntegerLevels(256).to_model(values)
    level = S.LinearLogSNR()(0.0)
    x_t = diffuse(x, level, torch.full_like(x, 1.0))
    at = level.broadcast_like(x_t)
    x_hat = head(x_t, level.t.expand(256), None, x_t, at.alpha, at.sigma)
    torch.testing.assert_close(x_hat, x, rtol=0, atol=1e-5)  # a level is 8e-3


def test_a_value_that_the_data_lack_counts_once():
    head = CategoricalHead(Constant(torch.zeros(1, LOGIT_FEATURES)), 1, 3)
    head.init_from_counts(torch.tensor([[0, 4, 3]]))
    torch.testing.assert_close(head.bias[0, 0].exp(), torch.tensor([0.1, 0.5, 0.4]))


def test_init_from_counts_of_each_channel():
    points = torch.tensor([[0, 3], [0, 3], [1, 3], [2, 1]])
    counts = torch.stack([torch.bincount(points[:, c], minlength=4) for c in range(2)])
    head = CategoricalHead(Constant(torch.zeros(2, LOGIT_FEATURES, dtype=torch.float64)), 2, 4).double()
    head.init_from_counts(counts * 10**12)
    v = IntegerLevels(4).to_model(points, torch.float64)
    level = S.LinearLogSNR()(0.6)
    x_t = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    at = level.broadcast_like(x_t)
    x_hat = head(x_t, level.t.expand(3), None, x_t, at.alpha, at.sigma)
    for c in range(2):
        exact = EmpiricalData(v[:, c : c + 1]).predict(x_t[:, c : c + 1], level).x
        torch.testing.assert_close(x_hat[:, c : c + 1], exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.05, 0.3, 0.9])
def test_no_probability_and_no_gradient_is_denormal(dtype, sigma, monkeypatch):
    """Mean and gradients are those of the plain softmax, whose far values are denormal numbers at a low ``sigma``."""
    head = CategoricalHead(nn.Identity(), 2, 256).to(dtype)
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 64, LOGIT_FEATURES, generator=g).to(dtype).requires_grad_()
    scales = [torch.full((2, 1, 1, 1), scale, dtype=dtype) for scale in (math.sqrt(1 - sigma**2), sigma)]
    inputs = [features, torch.rand(2, 2, 64, 1, generator=g).to(dtype) * 2 - 1, *scales]
    kept = []

    def logits_of(*inputs, of=head._logits):
        logits, v = of(*inputs)
        logits.retain_grad()
        kept.append(logits)
        return logits, v

    def plain(*inputs):
        logits, v = head._logits(*inputs)
        return torch.softmax(logits, -1) @ v

    monkeypatch.setattr(head, "_logits", logits_of)
    results, denormal = [], []
    for mean in (head._mean, plain):
        x_hat = mean(*inputs)
        (1e-4 * x_hat.square().mean()).backward()
        probability = torch.softmax(kept[-1].detach(), -1)
        values = torch.stack([kept[-1].grad, probability]).abs()
        denormal.append(int(((values > 0) & (values < torch.finfo(dtype).tiny)).sum()))
        results.append([x_hat.detach(), features.grad, head.weight.grad])
        features.grad = head.weight.grad = None
    for mine, exact in zip(*results, strict=True):
        eps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine, exact, rtol=0, atol=eps * float(exact.abs().max()))
    assert denormal[0] == 0
    if sigma in (0.01, 0.05):
        assert denormal[1] > 100


def test_a_nan_stays_in_its_element():
    head, _ = headed((1, 3), 17)
    x_t = torch.tensor([[[math.nan, 0.3, 5.0]]], dtype=torch.float64)
    scale = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    assert head(x_t, torch.zeros(1), None, x_t, scale, scale).isnan().tolist() == [[[True, False, False]]]


def test_chunks_do_not_change_the_result(monkeypatch):
    head, _ = headed((3, 2, 4), 17)
    x_t = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    alpha = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    sigma = torch.sqrt(1 - alpha**2)
    whole = head(x_t, torch.zeros(5), None, x_t, alpha, sigma)
    monkeypatch.setattr(categorical_head, "CHUNK_ELEMENTS", (2 * 24 * 17, 2 * 24 * 17))
    torch.testing.assert_close(head(x_t, torch.zeros(5), None, x_t, alpha, sigma), whole, rtol=1e-13, atol=1e-13)
    parts = []
    monkeypatch.setattr(head, "_mean", lambda *inputs, mean=head._mean: parts.append(len(inputs[0])) or mean(*inputs))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(head(x_t, torch.zeros(5), None, x_t, alpha, sigma), whole, rtol=1e-13, atol=1e-13)
    assert parts == [5]  # one part, of any number of items


@pytest.mark.parametrize("name", ["x", "eps", "v", "edm", "score"])
def test_any_target_has_the_same_mean_and_the_variance_follows(name):
    head, _ = headed((2, 3), 17, more=2)
    schedule, target = S.LinearLogSNR(), targets.build(name)
    denoise = NetworkDenoiser(head, schedule, target, Preconditioning(), learned_variance=True, categorical=True)
    x_t = torch.randn(4, 2, 3, dtype=torch.float64)
    level = schedule(torch.linspace(0.1, 0.9, 4, dtype=torch.float64))
    at = level.broadcast_like(x_t)
    x, eps, var_interp = denoise(x_t, level)
    features = head(x_t, level.t, None, x_t, at.alpha, at.sigma)
    torch.testing.assert_close(x, features[:, :2], rtol=0, atol=1e-9)
    torch.testing.assert_close(at.alpha * x + at.sigma * eps, x_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(var_interp, torch.ones_like(x_t), rtol=0, atol=0)


def test_arithmetic_is_float32_under_autocast():
    head = CategoricalHead(
        networks.build("unet", channels=1, out_channels=LOGIT_FEATURES, widths=[8], blocks=1, attention=[]), 1, 256
    )
    x_t = torch.randn(2, 1, 4, 4)
    scale = torch.full((2, 1, 1, 1), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = head(x_t, torch.zeros(2), None, x_t, scale, scale)
    assert x_hat.dtype == torch.float32
    with_zero_weights = head(x_t, torch.zeros(2), None, x_t, scale, scale)  # its output is 0 in any precision
    torch.testing.assert_close(x_hat, with_zero_weights, rtol=1e-6, atol=1e-6)


NETWORK = {"kind": "unet", "widths": [8], "blocks": 1, "attention": [], "heads": 1}


@pytest.mark.parametrize("transform", [Identity(), IntegerLevels(2048)])
def test_only_integer_data_of_few_values_have_a_head(transform):
    with pytest.raises(ConfigError, match=r"output = 'categorical'.*not whole numbers of at most 1024 values"):
        Diffusion(ModelConfig(network=NETWORK, output="categorical"), (1, 4, 4), transform)
    with pytest.raises(ConfigError, match=r"output = 'logits'.*unknown"):
        Diffusion(ModelConfig(network=NETWORK, output="logits"), (1, 4, 4), transform)


def test_a_categorical_model_has_a_loss_samples_and_a_bound():
    config = ModelConfig(network=NETWORK, output="categorical", variance="learned", loss="hybrid", chain_length=5)
    model = Diffusion(config, (2, 4, 4), IntegerLevels(17))
    values = torch.randint(0, 17, (3, 2, 4, 4))
    loss = model.loss(values, torch.rand(3), torch.randn(3, 2, 4, 4))
    loss.sum().backward()
    gradients = [p.grad for p in model.network.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert model.sample(2, sampler=Sampler(num_steps=3)).shape == (2, 2, 4, 4)
    assert torch.isfinite(model.nll(values).total).all()

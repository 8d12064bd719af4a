"""The decoders at a clean end of finite log-SNR: normalized, as tight as stated, and valid in every bound."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import MixtureData
from torch import nn

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.categorical_head import LOGIT_FEATURES, CategoricalHead
from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning, Prediction
from undiffuse.errors import ConfigError
from undiffuse.likelihood import decoder as decoders
from undiffuse.likelihood.decoder import CategoricalDecoder, Density, LastStep, ValueSoftmax, clean_nll
from undiffuse.likelihood.dequantization import ForwardNoise
from undiffuse.likelihood.importance_weighting import chain_nll, iwae_bound
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.likelihood.vlb_continuous import vlb_continuous
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.clean_end import clean_end
from undiffuse.process.noise_level import broadcast_like
from undiffuse.sampling.time_grids import time_grid

tensor = partial(torch.tensor, dtype=torch.float64)
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(120))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
SHARE = tensor([0.6, 0.1, 0.3])
THREE = IntegerLevels(3)
VALUES = THREE.to_model(torch.arange(3)[:, None], torch.float64)
TABLE = DS.Tabulated([0.2, 0.3, 0.4, *[0.5] * 20])
DATA = MixtureData(SHARE, VALUES, torch.zeros(3, 1, dtype=torch.float64))


def at(log_snr):
    return S.LinearLogSNR(high=log_snr)(0.0)


def all_terms(transform, z, level):
    """log p(v given z) of every value v, (n, values), as a difference of large numbers and without a window."""
    v = transform.to_model(torch.arange(transform.num_values), torch.float64)
    return torch.log_softmax(-((z[:, None] - level.alpha * v) ** 2) / (2 * level.sigma**2), 1)


# --- the distribution proportional to N(z; alpha v, sigma²) ---------------------------------------------------------


@pytest.mark.parametrize(
    ("num_values", "bits"), [(256, 0.0101), (17, 0.0056), (65536, 0.0105)], ids=["256 values", "17", "65536"]
)
def test_its_cost_at_the_default_clean_end(num_values, bits):
    """E −log₂ p(x given z) of an interior value over z ~ q(z given x), and half of it at either edge.

    The mass of N(z/alpha, sigma²/alpha²) in the bin costs 0.0512, 0.0367 and 0.0524 bits.
    """
    transform, level = IntegerLevels(num_values), at(clean_end(num_values))
    x = transform.to_model(torch.tensor([[num_values // 2], [0], [num_values - 1]]), torch.float64)
    eps = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    weight = torch.exp(-0.5 * eps**2) / torch.exp(-0.5 * eps**2).sum()
    cost = clean_nll(x.expand(3, len(eps)), level, eps.expand(3, -1), ValueSoftmax(transform)) @ weight / math.log(2)
    assert cost.tolist() == pytest.approx([bits, bits / 2, bits / 2], abs=5e-5)
    low, high = transform.edges(x[:1])
    mass = torch.log(
        torch.special.ndtr((high - x[:1]) * level.alpha / level.sigma - eps)
        - torch.special.ndtr((low - x[:1]) * level.alpha / level.sigma - eps)
    )
    assert float(-(mass @ weight)) / math.log(2) > 4.9 * bits


@pytest.mark.parametrize("num_values", [2, 3, 17, 256])
@pytest.mark.parametrize("log_snr", [-3.0, 4.0, 9.0, 16.0])
def test_it_is_the_softmax_over_all_values(num_values, log_snr):
    transform, level = IntegerLevels(num_values), at(log_snr)
    z = torch.cat([torch.linspace(-1.6, 1.6, 301, dtype=torch.float64), tensor([-40.0, 40.0])])
    expected = all_terms(transform, z, level)
    x = transform.to_model(torch.arange(num_values)).expand(len(z), -1)
    result = ValueSoftmax(transform)(x, z[:, None].expand(-1, num_values), level)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-15 * math.exp(log_snr) + 1e-11)
    torch.testing.assert_close(torch.exp(result).sum(1), torch.ones_like(z), rtol=1e-10, atol=0)


@pytest.mark.parametrize("log_snr", [clean_end(65536), 15.0, 8.0, -2.0])
def test_a_window_of_65536_values_is_as_good_as_all(log_snr, monkeypatch):
    transform, level, terms = IntegerLevels(65536), at(log_snr), []
    log_sum = ValueSoftmax._log_sum

    def spy(self, n, *parts):
        terms.append((n, len(parts[0])))
        return log_sum(self, n, *parts)

    monkeypatch.setattr(ValueSoftmax, "_log_sum", spy)
    monkeypatch.setattr(decoders, "CHUNK_TERMS", 30_000)
    k = torch.tensor([0, 1, 32768, 65534, 65535])
    x = transform.to_model(k, torch.float64)
    z = level.alpha * x + level.sigma * tensor([0.3, -2.0, 1.1, 4.0, -0.7])
    result = ValueSoftmax(transform)(x, z, level)
    expected = all_terms(transform, z, level)[torch.arange(5), k]
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-15 * math.exp(log_snr) + 1e-11)
    assert terms[0][0] == {clean_end(65536): 5, 15.0: 327, 8.0: 10_737, -2.0: 65_536}[log_snr]
    assert all(items == 1 or n * items <= 30_000 for n, items in terms)
    assert sum(items for _, items in terms) == 5


def test_what_the_window_leaves_out_is_below_the_bound():
    """By the sum of the terms left out, for values in the middle, off the middle by half a place, and at an edge."""
    transform, count = IntegerLevels(2001), 2001
    v = transform.to_model(torch.arange(count), torch.float64)
    for log_snr in (4.0, 8.0, 12.0):
        std = math.exp(-log_snr / 2)
        reach = math.ceil(math.sqrt(2 * decoders.TAIL) * std / (2 / (count - 1)))
        for place in (0.0, 0.5e-3, -1.0, 1.0, 1.2, 0.99):
            log_terms = -((place - v) ** 2) / (2 * std**2)
            nearest = int((v - place).abs().argmin())
            outside = (torch.arange(count) - nearest).abs() > reach
            if bool(outside.any()):
                left_out = torch.logsumexp(log_terms[outside], 0) - torch.logsumexp(log_terms, 0)
                assert float(left_out) <= -decoders.TAIL + 1e-9


def test_chunks_do_not_change_it(monkeypatch):
    assert decoders.CHUNK_TERMS == 1_048_576  # 8 MB for each of its tensors
    transform, level = IntegerLevels(256), at(9.0)
    x = transform.to_model(torch.randint(256, (4, 3, 5), generator=torch.Generator().manual_seed(0)))
    z = level.alpha * x.double() + level.sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    whole = ValueSoftmax(transform)(x, z, level)
    monkeypatch.setattr(decoders, "CHUNK_TERMS", 100)
    assert torch.equal(ValueSoftmax(transform)(x, z, level), whole)
    monkeypatch.setattr(decoders, "CHUNK_TERMS", 1)
    assert torch.equal(ValueSoftmax(transform)(x, z, level), whole)


def test_its_gradient_is_that_of_all_terms():
    transform, k = IntegerLevels(64), torch.tensor([0, 20, 63])
    x, eps = transform.to_model(k, torch.float64), tensor([0.7, -1.2, 2.0])
    gradients = []
    for own in (True, False):
        schedule = S.SCHEDULES["learned"](high=7.0)
        level = schedule(0.0)
        z = (level.alpha * x + level.sigma * eps).detach().requires_grad_()
        result = ValueSoftmax(transform)(x, z, level) if own else all_terms(transform, z, level)[torch.arange(3), k]
        gradients.append(torch.autograd.grad(result.sum(), [z, schedule.high]))
    for one, other in zip(*gradients, strict=True):
        assert float(one.abs().min()) > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- all of them ------------------------------------------------------------------------------------------------------


class Uniform(nn.Module):
    def forward(self, x, time, cond=None):
        return torch.zeros(len(x), LOGIT_FEATURES, *x.shape[2:], dtype=x.dtype)


def head(share, schedule):
    """The denoiser of a head whose logits are the log-frequencies of the data, whatever the input."""
    network = CategoricalHead(Uniform(), 1, len(share)).double()
    with torch.no_grad():
        network.bias.copy_(torch.log(share)[None, None])
    return NetworkDenoiser(network, schedule, targets.build("v"), Preconditioning(), categorical=True)


class Wrong:
    """A denoiser that is none: ε̂ = tanh(1.3 x_t) − 0.2."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, level, cond=None, next_level=None):
        sigma, alpha = (broadcast_like(v, x_t) for v in (level.sigma, level.alpha))
        eps = torch.tanh(1.3 * x_t) - 0.2
        return Prediction((x_t - sigma * eps) / alpha, eps)


def decoder_of(name, schedule, denoise, share=SHARE):
    transform = IntegerLevels(len(share))
    if name == "softmax":
        return ValueSoftmax(transform)
    if name == "last step":
        return LastStep(ReverseChain(denoise, time_grid(schedule, times=[1.0, schedule.t_min, 0.0])), transform.edges)
    return CategoricalDecoder(head(share, schedule), transform)


@pytest.mark.parametrize("name", ["softmax", "categorical", "last step"])
def test_the_probabilities_of_all_values_add_up_to_one(name):
    schedule = TABLE
    level, z = schedule(schedule.t_min), torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    decode = decoder_of(name, schedule, Wrong(schedule))
    each = torch.stack([decode(v.expand(101, 1), z, level) for v in VALUES])
    torch.testing.assert_close(torch.exp(each).sum(0), torch.ones_like(z), rtol=1e-12, atol=0)
    assert (decode.calls, each.dtype) == (name != "softmax", torch.float64)


def test_the_categorical_one_is_the_posterior_of_independent_values():
    schedule = S.LinearLogSNR(high=1.0)
    level, z = schedule(0.0), torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    decode = CategoricalDecoder(head(SHARE, schedule), THREE)
    for k, v in enumerate(VALUES):
        density = torch.exp(-((z - level.alpha * VALUES.T) ** 2) / (2 * level.sigma**2)) * SHARE
        expected = torch.log(density[:, k : k + 1] / density.sum(1, keepdim=True))
        torch.testing.assert_close(decode(v.expand(41, 1), z, level), expected, rtol=1e-11, atol=1e-11)
        single = decode(v.expand(41, 1).float(), z, level)  # the network and its logits in float32, the rest not
        torch.testing.assert_close(single, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def bounds(kind, name, denoise, schedule, decode):
    """The bound of each of the three values, by quadrature over eps; ε is the same in all terms of an item."""
    x, eps = VALUES.repeat_interleave(len(NODES), 0), NODES.repeat(3)[:, None]
    noise = lambda n: eps.expand(n, -1, -1)  # noqa: E731
    if kind == "chain":
        result = vlb(
            ReverseChain(denoise, time_grid(schedule, schedule.chain_length or 60)),
            x,
            noise,
            edges=THREE.edges(x),
            decode=decode,
        )
    else:
        top, clean = S.finite_ends(schedule)
        u = torch.full((len(x),), 0.5, dtype=torch.float64)
        result = vlb_continuous(denoise, x, top, clean, noise, u, points=600, decode=decode)
    return result.total.reshape(3, -1) @ WEIGHTS


@pytest.mark.parametrize("model", ["exact", "wrong"])
@pytest.mark.parametrize("name", ["softmax", "categorical", "last step"])
@pytest.mark.parametrize("kind", ["continuous", "chain"])
def test_the_bounded_probabilities_of_three_values_add_up_to_at_most_one(kind, name, model):
    """A bound −log P(v) ≤ L(v) has Σ e^−L(v) ≤ 1, for any denoiser and noise wider than the values are apart.

    With the exact denoiser and its own distribution of the values the continuous bound is −log P(v) itself.
    """
    schedule = TABLE if name == "last step" else S.LinearLogSNR(high=2.5, low=-12.0)
    denoise = DATA.denoiser(schedule) if model == "exact" else Wrong(schedule)
    nll = bounds(kind, name, denoise, schedule, decoder_of(name, schedule, denoise))
    assert float(torch.exp(-nll).sum()) < 1 + 1e-6
    if model == "exact":
        gap = float(SHARE @ (nll + torch.log(SHARE)))
        assert gap > -1e-6
        if (kind, name) == ("continuous", "categorical"):
            torch.testing.assert_close(nll, -torch.log(SHARE), rtol=0, atol=2e-5)
        if (kind, name) == ("continuous", "softmax"):
            assert 0.03 < gap < 0.04


@pytest.mark.parametrize("name", ["softmax", "categorical", "last step"])
def test_the_flows_probabilities_of_three_values_add_up_to_one(name):
    """Σ_v ∫ p(z) P(v given z) dz = 1 by quadrature over the noise of q(z given v), for a wrong density p."""
    schedule = TABLE if name == "last step" else S.LinearLogSNR(high=2.5)
    level = schedule(schedule.t_min)
    dequantizer = ForwardNoise(level, decoder_of(name, schedule, Wrong(schedule)))
    eps = torch.linspace(-60, 60, 60_001, dtype=torch.float64)
    eps = eps[eps.abs() * level.sigma / level.alpha < 8]
    total = 0.0
    for v in VALUES:
        z, log_q = dequantizer(v.expand(len(eps), 1), lambda n: eps[None, :, None].expand(n, -1, -1))
        log_p = -0.5 * math.log(2 * math.pi * 0.3) - (z[:, 0] - 0.2) ** 2 / 0.6
        log_weight = -0.5 * eps**2 + math.log(float(eps[1] - eps[0]) / math.sqrt(2 * math.pi))
        total += float(torch.exp(log_p - log_q.detach() + log_weight).sum())
    assert total == pytest.approx(1, abs=1e-9)


def test_the_flow_of_the_exact_model_gives_the_probability_at_every_draw():
    schedule = S.LinearLogSNR(high=0.5)  # noise wider than the values are apart
    level = schedule(0.0)
    dequantizer = ForwardNoise(level, CategoricalDecoder(head(SHARE, schedule), THREE))
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, :, None]
    for v, p in zip(VALUES, SHARE, strict=True):
        z, log_q = dequantizer(v.expand(9, 1), lambda n: eps)
        log_p = DATA.log_density(level.alpha * z, level) + torch.log(level.alpha)
        torch.testing.assert_close(log_q - log_p, -torch.log(p).expand(9), rtol=1e-9, atol=1e-9)


def test_the_weight_of_a_trajectory_has_the_same_decoder():
    schedule = S.LinearLogSNR(high=2.5)
    chain, decode = (
        ReverseChain(Wrong(schedule), time_grid(schedule, 1)),
        CategoricalDecoder(head(SHARE, schedule), THREE),
    )
    noise = lambda n: torch.full((n, 3, 1), 0.4, dtype=torch.float64)  # noqa: E731
    weight = partial(chain_nll, chain, VALUES, noise, edges=THREE.edges(VALUES))
    run = iwae_bound([weight(decode=decode) for _ in range(2)])
    states = []
    spy = lambda x, z, level: states.append(z) or decode(x, z, level)  # noqa: E731
    spy.calls = 1
    again = weight(decode=spy)
    torch.testing.assert_close(run.decoder, -decode(VALUES, states[0], schedule(0.0))[:, 0])
    assert (run.calls, again.calls) == (4, 2)


def test_the_decoder_of_a_level_with_almost_no_noise_is_certain():
    level, x = S.LinearLogSNR(high=720.0)(0.0), torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64)
    nats = ValueSoftmax(IntegerLevels(17))(x, level.alpha * x, level)
    assert torch.equal(nats, torch.zeros(1, 3, dtype=torch.float64))


def test_discrete_data_need_a_decoder_where_the_chain_stays_finite():
    schedule = S.LinearLogSNR()
    chain, noise = ReverseChain(Wrong(schedule), time_grid(schedule, 2)), lambda n: torch.zeros(n, 3, 1)
    for bound in (vlb, chain_nll):
        with pytest.raises(ConfigError, match=r"^error\[DECODER\] decode: discrete data need a decoder where"):
            bound(chain, VALUES, noise, edges=THREE.edges(VALUES))


def test_the_density_of_continuous_data_by_hand():
    level = at(3.0)
    x, z = tensor([[0.3, -2.0]]), tensor([[0.1, -1.5]])
    var = math.exp(-3.0)
    expected = -0.5 * (math.log(2 * math.pi * var) + (x - z / level.alpha) ** 2 / var)
    torch.testing.assert_close(Density()(x, z, level), expected, rtol=1e-12, atol=0)
    assert Density.calls == 0

"""Dequantizers against the exact probabilities of binned densities; expectations by quadrature."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData
from scipy.integrate import quad
from scipy.stats import norm, truncnorm
from torch import nn

from undiffuse.data.transform import IntegerLevels, Standardized
from undiffuse.errors import ConfigError
from undiffuse.likelihood.decoder import ValueSoftmax
from undiffuse.likelihood.dequantization import (
    ConstantParameters,
    ForwardNoise,
    TruncatedNormal,
    UniformDequantizer,
    VariationalDequantizer,
    finite_bins,
)
from undiffuse.likelihood.importance_weighting import log_mean_exp_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.process import schedule as S
from undiffuse.sampling.time_grids import time_grid

tensor = partial(torch.tensor, dtype=torch.float64)
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
FLAT, SHARES = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(80))
FLAT, SHARES = torch.special.ndtri((FLAT + 1) / 2), SHARES / 2
DATA = MixtureData(tensor([0.5, 0.3, 0.2]), tensor([[-0.7], [0.1], [0.9]]), tensor([[0.02], [0.1], [0.004]]))


def values(L):
    return torch.arange(L) if L <= 17 else torch.tensor([0, 1, L // 7, L // 2, L - 2, L - 1])


def level(L):
    """The level at which three standard deviations of noise fill half a bin."""
    return S.LinearLogSNR(high=13.3 + 2 * math.log(L / 256))(0.0)


def log_p(z, at):
    """log p(z) of z = x_0/alpha_0, (n,)."""
    return DATA.log_density(at.alpha * z, at) + torch.log(at.alpha)


def cdf(z, at):
    std = torch.sqrt(DATA.values[:, 0] + (at.sigma / at.alpha) ** 2)
    return (DATA.weights * torch.special.ndtr((z - DATA.means[:, 0]) / std)).sum(-1)


def nll_at_nodes(dequantizer, x, log_p, nodes):
    """log q − log P(v|z) − log p(z) of each value at each node of its noise, (V, K)."""
    V, K = len(x), len(nodes)
    z, log_q = dequantizer(x.repeat_interleave(K, 0), lambda n: nodes.repeat(V)[None, :, None].expand(n, -1, -1))
    return (log_q - log_p(z)).reshape(V, K)


def setting(name, L):
    """(dequantizer, nodes, weights, the −log P(v) that it bounds)."""
    pixels, at = IntegerLevels(L), level(L)
    x = pixels.to_model(values(L)[:, None], torch.float64)
    low, high = finite_bins(pixels.edges, x)
    inside = -torch.log(cdf(high, at) - cdf(low, at))
    if name == "uniform":
        return UniformDequantizer(pixels.edges), FLAT, SHARES, inside
    if name == "variational":
        return VariationalDequantizer(pixels.edges, ConstantParameters(1)), NODES, WEIGHTS, inside
    if name == "truncated normal":
        return TruncatedNormal(pixels.edges, at), NODES, WEIGHTS, inside
    return ForwardNoise(at, ValueSoftmax(pixels)), NODES, WEIGHTS, -torch.log(probability(x, at, L))


def probability(x, at, L):
    """∫ p(z) P(v given z) dz with P(v given z) ∝ N(z; v, s²), by the trapezoid rule up to 1.5 places from v (V,).

    Beyond that P(v given z) is 0, but for the outermost values, for which it is 1 outside.
    """
    gap, s = 2 / (L - 1), at.sigma / at.alpha
    z = x + gap * torch.linspace(-1.5, 1.5, 6001, dtype=torch.float64)
    places = torch.arange(-3, 4)
    other = x[:, :, None] + gap * places
    log_q = (-((z[:, :, None] - other) ** 2) / (2 * s**2)).masked_fill(other.abs() > 1 + gap / 2, -math.inf)
    share = torch.softmax(log_q, 2)[:, :, 3]
    density = torch.exp(log_p(z.reshape(-1, 1), at)).reshape(z.shape)
    inside = torch.trapezoid(density * share, z, dim=1)
    below, above = cdf(z[:, :1], at), 1 - cdf(z[:, -1:], at)
    return inside + torch.where(x[:, 0] <= -1, below, 0.0) + torch.where(x[:, 0] >= 1, above, 0.0)


GAPS = {  # the gap of a bound if the density is flat over a bin: KL(q to the uniform distribution) in nats
    "uniform": (-1e-9, 2e-6),
    "variational": (0.0094, 0.0096),
    # log 6.04 − ½ log 2πe = 0.379, with 6.04 of its standard deviations to a bin, and 0.0073 of the decoder
    "forward noise": (0.386, 0.387),
    # 0.379 again, and 0.015: the entropy that the tails beyond 3.02 standard deviations had
    "truncated normal": (0.393, 0.396),
}


# --- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [2, 17, 256, 65536])
@pytest.mark.parametrize("name", GAPS)
def test_it_is_a_bound_and_two_samples_tighten_it(name, L):
    dequantizer, nodes, weights, exact = setting(name, L)
    x = IntegerLevels(L).to_model(values(L)[:, None], torch.float64)
    with torch.no_grad():
        each = nll_at_nodes(dequantizer, x, partial(log_p, at=level(L)), nodes)
    once = each @ weights
    pairs = log_mean_exp_nll(-torch.stack(torch.broadcast_tensors(each[:, :, None], each[:, None, :])))
    twice = torch.einsum("vij,i,j->v", pairs, weights, weights)
    assert bool((exact <= twice + 1e-9).all())
    assert bool((twice <= once + 1e-9).all())
    if L <= 17:
        assert float((once - exact).min()) > 1e-6
        assert float(torch.exp(-exact).sum()) < 1 + 1e-9
        weight = torch.exp(-each) @ weights  # the mean weight is the probability
        torch.testing.assert_close(weight, torch.exp(-exact), rtol=2e-2 if L == 2 else 1e-3, atol=0)
    if L == 65536:
        low, high = GAPS[name]
        assert bool(((once - exact)[1:-1] > low).all())
        assert bool(((once - exact)[1:-1] < high).all())


@pytest.mark.parametrize("L", [2, 17])
def test_uniform_is_the_mean_over_the_bin(L):
    pixels, at = IntegerLevels(L), level(L)
    dequantizer, nodes, weights, _ = setting("uniform", L)
    x = pixels.to_model(values(L)[:, None], torch.float64)
    got = nll_at_nodes(dequantizer, x, partial(log_p, at=at), nodes) @ weights
    width = 2 / (L - 1)
    for i in range(L):
        middle = -1 + i * width
        mean, _ = quad(lambda z: -float(log_p(tensor([[z]]), at)) / width, middle - width / 2, middle + width / 2)
        assert float(got[i]) == pytest.approx(mean - math.log(width), abs=1e-6)


def test_forward_noise_in_closed_form():
    """E log q = −½ log(2πe s²), E −log p(z) of a Gaussian, and E −log P(v|z), P(v|z) ∝ N(z; v, s²), by quadrature."""
    pixels, at = IntegerLevels(5), level(5)
    x, s = pixels.to_model(values(5)[:, None], torch.float64), float(at.sigma / at.alpha)
    data = GaussianData(tensor([0.2]), tensor([0.3]))
    got = nll_at_nodes(
        ForwardNoise(at, ValueSoftmax(pixels)),
        x,
        lambda z: data.log_density(at.alpha * z, at) + torch.log(at.alpha),
        NODES,
    )
    for i in range(5):
        v = float(x[i])
        log_q = -0.5 * math.log(2 * math.pi * math.e * s**2)
        density = 0.5 * (math.log(2 * math.pi * (0.3 + s**2)) + ((v - 0.2) ** 2 + s**2) / (0.3 + s**2))
        z = v + s * NODES.numpy()
        likelihoods = norm.pdf(z[:, None], x[:, 0].numpy(), s)
        expected = log_q + density - float(WEIGHTS.numpy() @ np.log(likelihoods[:, i] / likelihoods.sum(1)))
        assert float(got[i] @ WEIGHTS) == pytest.approx(expected, rel=1e-9)


def test_forward_noise_with_another_decoder():
    """Any P(v|z) gives a bound; the best one, P(v|z) ∝ p(v) q(z|v), gives the probability itself at each draw."""
    pixels, at, mass = IntegerLevels(2), S.LinearLogSNR(high=0.5)(0.0), tensor([0.3, 0.7])  # noise wider than the bins
    x = pixels.to_model(torch.tensor([[0], [1]]), torch.float64)
    data = MixtureData(mass, x, torch.zeros_like(x))
    log_p = lambda z: data.log_density(at.alpha * z, at) + torch.log(at.alpha)  # noqa: E731

    def decode(values, z, level):
        odds = torch.log(mass) - (z - level.alpha * x.T) ** 2 / (2 * level.sigma**2)
        return torch.log_softmax(odds, 1).gather(1, pixels.to_data(values).long())

    got = nll_at_nodes(ForwardNoise(at, decode), x, log_p, torch.linspace(-2, 2, 9, dtype=torch.float64))
    torch.testing.assert_close(got, -torch.log(mass)[:, None].expand(-1, 9), rtol=1e-9, atol=1e-9)


def test_forward_noise_suits_models_of_the_discrete_values():
    """The density has all its mass at the values, where uniform noise costs more."""
    pixels, at, mass = IntegerLevels(5), level(5), tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    x = pixels.to_model(values(5)[:, None], torch.float64)
    data = MixtureData(mass, x, torch.zeros_like(x))
    log_p = lambda z: data.log_density(at.alpha * z, at) + torch.log(at.alpha)  # noqa: E731
    own = nll_at_nodes(ForwardNoise(at, ValueSoftmax(pixels)), x, log_p, NODES) @ WEIGHTS
    torch.testing.assert_close(own, -torch.log(mass), rtol=0, atol=0.002)
    uniform = nll_at_nodes(UniformDequantizer(pixels.edges), x, log_p, FLAT) @ SHARES
    assert bool((uniform > own + 0.5).all())


# --- the learned distribution --------------------------------------------------------------------------------------


class Table(nn.Module):
    """Mean and log std of each of five values."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(tensor([[0.3, -0.2], [-1.0, 0.1], [0.0, 0.5], [2.0, -1.0], [0.7, 0.2]]))

    def forward(self, x):
        return self.rows[((x[:, 0] + 1) * 2).round().long()]


def test_the_best_learned_distribution_gives_the_probability_at_every_draw():
    """The density within each bin is itself a logit-normal."""
    pixels, table, mass = IntegerLevels(5), Table(), tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    x = pixels.to_model(values(5)[:, None], torch.float64)

    def log_p(z):
        v = (((z[:, 0] + 1) * 2).round()).long().clamp(0, 4)
        mean, log_std = table.rows[v].unbind(1)
        u = (z[:, 0] - (v / 2 - 1)) / 0.5 + 0.5
        normal = torch.distributions.Normal(mean, torch.exp(log_std))
        return torch.log(mass[v]) + normal.log_prob(torch.logit(u)) - torch.log(u * (1 - u) * 0.5)

    got = nll_at_nodes(
        VariationalDequantizer(pixels.edges, table), x, log_p, torch.linspace(-3, 3, 9, dtype=torch.float64)
    )
    torch.testing.assert_close(got, -torch.log(mass)[:, None].expand(-1, 9), rtol=1e-9, atol=1e-9)


def test_the_learned_distribution_is_trained_by_its_bound():
    """The density falls steeply in each bin: the trained distribution beats the uniform one, and both are bounds."""
    pixels, at = IntegerLevels(2), level(2)
    data = GaussianData(tensor([-2.4]), tensor([0.5]))
    log_p = lambda z: data.log_density(at.alpha * z, at) + torch.log(at.alpha)  # noqa: E731
    x = pixels.to_model(torch.tensor([[0]]), torch.float64)
    low, high = finite_bins(pixels.edges, x)
    std = float(torch.sqrt(0.5 + (at.sigma / at.alpha) ** 2))
    exact = -math.log(norm.cdf((float(high) + 2.4) / std) - norm.cdf((float(low) + 2.4) / std))
    dequantizer = VariationalDequantizer(pixels.edges, ConstantParameters(1))
    optimizer = torch.optim.LBFGS(dequantizer.parameters(), lr=0.5, max_iter=40)

    def loss():
        optimizer.zero_grad()
        value = (nll_at_nodes(dequantizer, x, log_p, NODES) @ WEIGHTS).sum()
        value.backward()
        return value

    before = float(optimizer.step(loss).detach())
    after = float(loss().detach())
    uniform = float((nll_at_nodes(UniformDequantizer(pixels.edges), x, log_p, FLAT) @ SHARES).sum())
    assert exact < after < exact + 0.03
    assert after + 0.3 < min(before, uniform)


def test_its_gradient_passes_through_a_bound_on_the_density():
    """log q + vlb(z), the loss that trains it together with a model, by central differences."""
    pixels, levels = IntegerLevels(5), time_grid(S.LinearLogSNR(high=6.0), 3)
    x = pixels.to_model(torch.tensor([[0, 3], [4, 2]]), torch.float64)
    denoise = GaussianData(tensor([0.1, -0.2]), tensor([0.3, 0.1])).denoiser(S.LinearLogSNR(high=6.0))
    chain = ReverseChain(denoise, levels)
    numbers = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dequantizer = VariationalDequantizer(pixels.edges, ConstantParameters(2))

    def value():
        z, log_q = dequantizer(x, lambda n: numbers[:1])
        return (log_q + vlb(chain, z, lambda n: numbers[1:2]).total).sum()

    value().backward()
    parameter = dequantizer.network.values
    for i in range(4):
        ahead, behind = [], []
        for sign, into in ((1, ahead), (-1, behind)):
            with torch.no_grad():
                parameter[i] += sign * 1e-5
                into.append(float(value()))
                parameter[i] -= sign * 1e-5
        assert float(parameter.grad[i]) == pytest.approx((ahead[0] - behind[0]) / 2e-5, rel=1e-6)


def test_constant_parameters_are_per_channel_and_start_close_to_uniform():
    constant = ConstantParameters(3)
    output = constant(torch.zeros(2, 3, 4, 5))
    assert output.shape == (2, 6, 4, 5)
    assert bool((output[:, :3] == 0).all())
    constant.values.data = torch.arange(6.0)
    assert bool((constant(torch.zeros(2, 3, 4)) == torch.arange(6.0)[:, None]).all())
    assert constant(torch.zeros(2, 3)).shape == (2, 6)

    def excess(std):  # KL of the logit-normal to the uniform distribution
        y = std * NODES
        return -0.5 * math.log(2 * math.pi * math.e * std**2) - float(
            WEIGHTS @ (nn.functional.logsigmoid(y) + nn.functional.logsigmoid(-y))
        )

    std = float(torch.exp(ConstantParameters(1).values[1].detach()))
    assert excess(std) < min(excess(std - 0.05), excess(std + 0.05))
    assert excess(std) == pytest.approx(0.0095, abs=1e-4)


def test_logit_normal_by_hand():
    """z = low + width sigmoid(mean + std n); log q = log N(n) − log std − log(width u(1 − u)), summed over an item."""
    rows = tensor([[0.3, -0.4], [-0.2, 0.5]])  # mean and log std of two channels
    x = tensor([[[0.0, 0.5], [1.0, -1.0]]])
    n = tensor([[[0.4, -1.0], [2.0, 0.3]]])
    network = lambda x: torch.cat([rows[:, 0], rows[:, 1]])[None, :, None].expand(1, -1, 2)  # noqa: E731
    dequantizer = VariationalDequantizer(lambda x: (x - 0.1, x + 0.3), Lambda(network))
    z, log_q = dequantizer(x, lambda k: n[None])
    total = 0.0
    for c in range(2):
        for i in range(2):
            mean, std = float(rows[c, 0]), math.exp(float(rows[c, 1]))
            u = 1 / (1 + math.exp(-(mean + std * float(n[0, c, i]))))
            assert float(z[0, c, i]) == pytest.approx(float(x[0, c, i]) - 0.1 + 0.4 * u)
            total += norm.logpdf(float(n[0, c, i])) - math.log(std) - math.log(0.4 * u * (1 - u))
    assert log_q.tolist() == pytest.approx([total])


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


# --- bins ----------------------------------------------------------------------------------------------------------


def test_infinite_edges_are_mirrored_about_the_value():
    x = torch.tensor([[0.25, -3.0]], dtype=torch.float64)
    edges = torch.tensor([[-math.inf, -3.5]]), torch.tensor([[0.75, math.inf]])
    low, high = finite_bins(lambda values: edges, x)
    assert (low.tolist(), high.tolist()) == ([[-0.25, -3.5]], [[0.75, -2.5]])


@pytest.mark.parametrize("L", [2, 17, 256, 65536])
def test_finite_bins_are_equally_wide_and_contain_all_samples(L):
    pixels = IntegerLevels(L)
    x = pixels.to_model(values(L)[:, None])  # float32, as in a model
    low, high = finite_bins(pixels.edges, x)
    assert low.dtype == torch.float64
    torch.testing.assert_close(high - low, torch.full_like(low, 2 / (L - 1)), rtol=1e-9, atol=0)
    torch.testing.assert_close((low + high) / 2, pixels.to_model(values(L)[:, None], torch.float64))
    inner = (low[1:-1], high[1:-1])
    assert all(torch.equal(a, b[1:-1]) for a, b in zip(inner, pixels.edges(x), strict=True))
    noise = lambda n: torch.tensor([-4.0, 4.0])[None, :, None].expand(n, -1, len(x))  # noqa: E731
    for dequantizer in (
        UniformDequantizer(pixels.edges),
        VariationalDequantizer(pixels.edges, ConstantParameters(len(x))),
    ):
        z, log_q = dequantizer(x.T.expand(2, -1), noise)
        assert z.dtype == log_q.dtype == torch.float64
        assert log_q.shape == (2,)
        assert bool(((z > low.T) & (z < high.T)).all())
    torch.testing.assert_close(
        UniformDequantizer(pixels.edges)(x, lambda n: torch.zeros(n, len(x), 1))[1],
        torch.full((len(x),), math.log((L - 1) / 2), dtype=torch.float64),
    )


def test_the_truncated_normal_is_a_density_on_its_bin():
    """Quantiles and log-density are those of scipy; the standard deviation is that of the noise, a quarter of a bin."""
    pixels, at = IntegerLevels(5), S.LinearLogSNR(high=2.0)(0.0)
    s = float(at.sigma / at.alpha)
    x = pixels.to_model(torch.arange(5)[:, None], torch.float64)
    low, high = (edge[:, 0].tolist() for edge in finite_bins(pixels.edges, x))
    for u in (0.01, 0.3, 0.999):
        draw = torch.full((1, 5, 1), norm.ppf(u), dtype=torch.float64)
        z, log_q = TruncatedNormal(pixels.edges, at)(x, lambda n, draw=draw: draw)
        for i in range(5):
            q = truncnorm((low[i] - x[i, 0]) / s, (high[i] - x[i, 0]) / s, loc=float(x[i, 0]), scale=s)
            assert float(z[i, 0]) == pytest.approx(q.ppf(u), rel=1e-9)
            assert float(log_q[i]) == pytest.approx(q.logpdf(float(z[i, 0])), rel=1e-9)


@pytest.mark.parametrize("make", [UniformDequantizer, lambda e: VariationalDequantizer(e, ConstantParameters(1))])
def test_missing_bins_or_noise_are_an_error(make):
    x = torch.zeros(2, 1)
    with pytest.raises(ConfigError, match=r"continuous.* Leave the dequantizer out") as error:
        make(Standardized((0.0,), (1.0,)).edges)(x, lambda n: x[None])
    assert error.value.code == "DEQUANTIZE"
    for dequantizer in (make(IntegerLevels(5).edges), ForwardNoise(level(5), ValueSoftmax(IntegerLevels(5)))):
        with pytest.raises(ConfigError, match="needs random numbers"):
            dequantizer(x, None)


def test_exactly_one_draw_is_used():
    requested = []

    def noise(draws):
        requested.append(draws)
        return torch.zeros(draws, 2, 3)

    UniformDequantizer(IntegerLevels(4).edges)(IntegerLevels(4).to_model(torch.ones(2, 3, dtype=torch.long)), noise)
    assert requested == [1]

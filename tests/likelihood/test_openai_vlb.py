"""The bound of improved-diffusion against a transcription in numpy, and its error."""

import math

import numpy as np
import pytest
import torch
from oracles import GaussianData
from scipy.stats import norm

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import Clipped, Prediction
from undiffuse.likelihood.decoder import clean_gaussian
from undiffuse.likelihood.openai_vlb import openai_log_prob, openai_vlb
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian
from undiffuse.sampling.time_grids import time_grid

VALUES = torch.tensor([[0, 255, 3, 200], [128, 90, 254, 1]])
X = IntegerLevels(256).to_model(VALUES)
DATA = GaussianData(torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.3, 0.2, 0.5, 0.1]))


def by_hand(beta, x, noises, predict, variance):
    """The script in Ho's notation: coefficients in float64, everything else in float32, as there."""
    f = np.float32
    abar = np.cumprod(1 - beta)
    previous = np.append(1.0, abar[:-1])
    small = beta * (1 - previous) / (1 - abar)
    small_log = np.log(np.append(small[1], small[1:]))
    large_log = np.log(np.append(small[1], beta[1:]))
    bits = []
    for t, eps in zip(range(len(beta) - 1, -1, -1), noises, strict=True):
        x_t = f(np.sqrt(abar[t])) * x + f(np.sqrt(1 - abar[t])) * eps
        x_hat = np.clip(predict(x_t, t), -1, 1)
        a = f(beta[t] * np.sqrt(previous[t]) / (1 - abar[t]))
        b = f((1 - previous[t]) * np.sqrt(1 - beta[t]) / (1 - abar[t]))
        true, model = a * x + b * x_t, a * x_hat + b * x_t
        log_var = f((small_log if variance == "small" else large_log)[t])
        true_log = f(small_log[t])
        kl = 0.5 * (-1 + log_var - true_log + np.exp(true_log - log_var) + (true - model) ** 2 * np.exp(-log_var))
        cdf = lambda z: f(0.5) * (f(1) + np.tanh(f(np.sqrt(2 / np.pi)) * (z + f(0.044715) * z**3)))  # noqa: E731
        std_inverse = np.exp(-f(0.5) * log_var)
        plus, minus = cdf(std_inverse * (x - model + f(1 / 255))), cdf(std_inverse * (x - model - f(1 / 255)))
        inner = np.log(np.clip(plus - minus, 1e-12, None))
        edges = np.where(x < -0.999, np.log(np.clip(plus, 1e-12, None)), np.log(np.clip(1 - minus, 1e-12, None)))
        decoder = -np.where(np.abs(x) > 0.999, edges, inner)
        bits.append((decoder if t == 0 else kl).mean(1) / np.log(2))
    mean, log_var = f(np.sqrt(abar[-1])) * x, f(np.log(1 - abar[-1]))
    prior = (0.5 * (-1 - log_var + np.exp(log_var) + mean**2)).mean(1) / np.log(2)
    return prior, np.stack(bits[::-1], 1)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_it_reproduces_the_script(variance):
    T = 12
    table = DS.linear_rescaled(T=50)
    table = DS.Tabulated(table.beta[:T])
    levels = time_grid(table)
    noises = torch.randn(T, *X.shape, generator=torch.Generator().manual_seed(0))
    exact = DATA.denoiser(table)

    def network(x_t, level, cond=None, next_level=None):
        x, eps, _ = exact(x_t.double(), level)
        return Prediction(x.float(), eps.float())

    network.schedule = table
    numbers = iter(noises.flip(0))
    ours = openai_vlb(ReverseChain(Clipped(network), levels, variance), X, lambda n: next(numbers)[None])

    def predict(x_t, t):
        return network(torch.from_numpy(x_t), table((t + 1) / T)).x.numpy()

    prior, bits = by_hand(table.beta.numpy(), X.numpy(), noises.numpy(), predict, variance)
    scale = 4 * math.log(2)
    np.testing.assert_allclose(ours.prior.numpy() / scale, prior, rtol=1e-4)
    np.testing.assert_allclose(ours.per_step.numpy() / scale, bits, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(ours.bits_per_dim(4).numpy(), prior + bits.sum(1), rtol=1e-4)
    assert ours.calls == T


@pytest.mark.parametrize(
    ("width", "sigmas", "off"), [(1, 1, 0.0), (1, 4, -0.390), (1, 5, -1.567), (0.05, 4, -0.601), (0.05, 5, -2.220)]
)
def test_its_bins_have_the_documented_error(width, sigmas, off):
    std = 2 / 255 / width
    p = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1,), 2 * math.log(std), dtype=torch.float64))
    x = torch.tensor([sigmas * std], dtype=torch.float64)
    exact = math.log(norm.sf(sigmas - width / 2) - norm.sf(sigmas + width / 2))
    assert (openai_log_prob(p, x).item() - exact) / math.log(2) == pytest.approx(
        off, abs=0.012 if sigmas == 1 else 1e-3
    )


def test_the_outermost_bins_reach_to_infinity():
    p = Gaussian(torch.zeros(2), torch.zeros(2))
    both = openai_log_prob(p, torch.tensor([-1.0, 1.0])).exp()
    torch.testing.assert_close(both, torch.full((2,), float(norm.cdf(-1 + 1 / 255))), rtol=2e-3, atol=0)


def test_no_bin_is_less_likely_than_the_clamp():
    p = Gaussian(torch.tensor([0.9, 0.9, -0.9]), torch.full((3,), 2 * math.log(0.01)))
    assert openai_log_prob(p, torch.tensor([0.0, -1.0, 1.0])).tolist() == pytest.approx([math.log(1e-12)] * 3)


def bin_mass(x, z, level):
    """log of the mass of x's bin under N(z/alpha, sigma²/alpha²), the decoder that the script would have there."""
    return clean_gaussian(z, level).bin_log_prob(IntegerLevels(256).edges(x))


bin_mass.calls = 0


def test_for_a_chain_that_stays_finite_only_the_decoder_differs():
    schedule = S.LinearLogSNR(8.0, -5.0)
    chain = ReverseChain(DATA.denoiser(schedule), time_grid(schedule, 20))
    noises = torch.randn(21, *X.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for bound, more in ((openai_vlb, {}), (vlb, {"decode": bin_mass})):
        numbers = iter(noises)
        results.append(bound(chain, X, lambda n, numbers=numbers: next(numbers)[None], **more))
    theirs, ours = results
    torch.testing.assert_close(theirs.prior, ours.prior, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.diffusion_nats, ours.diffusion_nats, rtol=1e-3, atol=0)
    torch.testing.assert_close(theirs.per_step, ours.per_step, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(theirs.decoder, ours.decoder, rtol=0.02, atol=0)
    assert not torch.allclose(theirs.decoder, ours.decoder, rtol=1e-5, atol=0)

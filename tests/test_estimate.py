"""Every way to measure a model: on a network that happens to be the exact denoiser, against what the data are."""

import math

import pytest
import torch
from oracles import GaussianData, LabelledMixture, MixtureData
from torch import nn

from undiffuse import estimate
from undiffuse.codec import Identity, Pixels, Standardised
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig
from undiffuse.denoiser import Prediction
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.likelihood import vlb

MEAN, VAR = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
GAUSSIAN = GaussianData(MEAN, VAR)
VECTOR = {"kind": "mlp", "width": 8, "depth": 1}


class Exact(Diffusion):
    """A model whose denoiser is the exact one of ``data``."""

    def denoiser(self, network: nn.Module | None = None):
        if not hasattr(self, "data"):
            return super().denoiser(network)
        schedule, data = self.schedule, self.data

        def denoise(x_t, level, cond=None, to=None):
            x, eps, _ = data.predict(x_t.double(), level, None if cond is None else cond.label)
            return Prediction(x.to(x_t), eps.to(x_t))

        denoise.schedule = schedule
        return denoise


def exact(data, codec, schedule, dims=2, **settings):
    model = Exact(ModelConfig(network=VECTOR, schedule=schedule, **settings), (dims,), codec)
    model.data = data
    return model


def test_the_three_estimates_of_continuous_data():
    codec = Standardised((1.0, 2.0), (2.0, 0.5))
    model = exact(GAUSSIAN, codec, {"name": "linear_log_snr", "high": 9.0, "low": -12.0})
    g = torch.Generator().manual_seed(0)
    x = MEAN + VAR.sqrt() * torch.randn(16, 2, generator=g, dtype=torch.float64)
    values = codec.decode(x)
    truth = -GAUSSIAN.log_density(x, model.schedule(0.0)._replace(alpha=torch.tensor(1.0), sigma=torch.tensor(0.0)))
    truth = truth + math.log(2.0 * 0.5)  # −log |det| of the codec
    ode, continuous, chain = (model.nll(values, estimate=name) for name in ("ode", "continuous", "discrete"))
    assert ode.calls > 10
    assert (ode.total - truth).abs().max() < 0.02  # sigma_0 = 0.011 blurs
    assert continuous.calls == estimate.POINTS
    assert chain.calls == 1000
    for bound in (continuous, chain):  # above by E KL(q(z_0..1|x) to the reverse process): all that is left of it
        assert abs(bound.total.mean() - truth.mean()) < 4.89 * (bound.total - truth).std() / 4 + 0.01


def test_levels_are_read_by_the_flow_from_the_noise_that_fills_their_bins():
    v = Pixels(4).encode(torch.arange(4), torch.float64)[:, None]
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    data = MixtureData(share, v, torch.zeros(4, 1, dtype=torch.float64))
    for schedule in (
        {"name": "linear_log_snr", "high": 5.0, "low": -9.0},
        {"name": "linear_log_snr", "high": 20.0, "low": -9.0},
    ):
        model = exact(data, Pixels(4), schedule, dims=1)
        values = torch.arange(4)[:, None].repeat(25, 1)
        total = model.nll(values, estimate="ode").total.reshape(25, 4).mean(0)
        # −log P up to what three standard deviations in half a bin leave out, and the mismatch of N(0, 1) at −9
        torch.testing.assert_close(total, -share.log(), rtol=0, atol=0.03)


def test_a_chain_that_ends_in_data_reads_them_by_its_last_step():
    v = Pixels(256).encode(torch.tensor([0, 128]), torch.float64)[:, None]
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    model = exact(
        MixtureData(share, v, torch.zeros(2, 1, dtype=torch.float64)), Pixels(256), {"name": "linear", "T": 1000}, 1
    )
    values = torch.tensor([[0], [128]]).repeat(200, 1)
    total = model.nll(values, estimate="ode").total.reshape(200, 2).mean(0)
    # sigma_1 = 0.01 is wider than a bin: the last step's mean is x itself, and its own variance is what is left
    levels = model.levels
    last = vlb(model.denoiser(), v.repeat(200, 1), levels[-2:], lambda n: torch.randn(n, 400, 1, dtype=torch.float64),
               edges=model.codec.edges(v.repeat(200, 1)))  # fmt: skip
    floor = last.decoder.reshape(200, 2).mean(0)
    torch.testing.assert_close(total, -share.log() + floor, rtol=0, atol=0.05)


def test_draws_tighten_the_likelihood_of_levels():
    v = Pixels(4).encode(torch.arange(4), torch.float64)[:, None]
    share = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    data = MixtureData(share, v, torch.zeros(4, 1, dtype=torch.float64))
    model = exact(data, Pixels(4), {"name": "linear_log_snr", "high": 1.0, "low": -9.0}, dims=1)
    values = torch.zeros(50, 1, dtype=torch.long)
    one, many = (model.nll(values, estimate="ode", draws=n) for n in (1, 8))
    assert many.calls > 7 * one.calls
    assert -share[0].log() - 0.01 < many.total.mean() < one.total.mean() - 0.05


@pytest.mark.parametrize("name", ["discrete", "continuous", "ode", "openai"])
def test_no_item_depends_on_its_batch(name):
    torch.manual_seed(0)
    network = {"kind": "unet", "widths": [8], "blocks": 1, "attention": [0], "heads": 1}
    model = Diffusion(
        ModelConfig(network=network, steps=6, schedule={"name": "linear_log_snr", "high": 8.0}), (1, 5, 4), Pixels(256)
    )
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    values = torch.randint(0, 256, (5, 1, 5, 4), generator=torch.Generator().manual_seed(1))
    whole = model.nll(values, estimate=name, seed=3)
    parts = model.nll(values[3:], estimate=name, seed=3, batch=1, first=3)
    assert torch.isfinite(whole.total).all()
    torch.testing.assert_close(parts.total, whole.total[3:], rtol=2e-3 if name == "ode" else 1e-5, atol=1e-4)


def test_what_there_is_not_is_refused():
    model = Diffusion(ModelConfig(network=VECTOR), (2,), Identity())
    with pytest.raises(ConfigError, match=r"'exact': no such estimate. Use one of discrete, continuous, ode, openai"):
        model.nll(torch.zeros(1, 2), estimate="exact")
    with pytest.raises(ConfigError, match="images of 256 levels only"):
        model.nll(torch.zeros(1, 2), estimate="openai")
    with pytest.raises(ConfigError, match=r"draws = 0: nothing would be measured"):
        model.nll(torch.zeros(1, 2), draws=0)


def test_the_likelihood_given_a_label_is_that_of_the_label():
    """By the flow, item by item; told nothing, it is that of all the data."""
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]])
    data = LabelledMixture(torch.tensor([0.2, 0.5, 0.3]), means, torch.full((3, 2), 0.2), torch.tensor([0, 1, 0]))
    settings = {"network": VECTOR | {"classes": 2}, "schedule": {"name": "linear_log_snr", "high": 9.0, "low": -12.0}}
    model = Exact(ModelConfig(**settings), (2,), Identity())
    model.data = data
    x, label = data.sample_labelled(12, torch.Generator().manual_seed(0))
    label[0] = -1
    clean = model.schedule(0.0)
    assert (data.log_density(x, clean, label) - data.log_density(x, clean))[1:].abs().min() > 0.05
    for told in (label, None):
        found = model.nll(x, estimate="ode", cond=None if told is None else Condition(label=told))
        truth = -data.log_density(clean.like(x).alpha * x, clean, told) - 2 * torch.log(clean.alpha)
        assert (found.total - truth).abs().max() < 0.01  # the prior's end is at log-SNR −12
    assert (found.total[0] - truth[0]).abs() < 0.01

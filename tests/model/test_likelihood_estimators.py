"""Every estimate of a model with the exact denoiser, against the likelihood of the data."""

import math

import pytest
import torch
from oracles import GaussianData, LabelledMixture, MixtureData
from torch import nn

from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.denoising.denoiser import Prediction
from undiffuse.errors import ConfigError
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.model import likelihood_estimators as estimate
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition

MEAN, VAR = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
GAUSSIAN = GaussianData(MEAN, VAR)
VECTOR = {"kind": "mlp", "width": 8, "depth": 1}


class Exact(Diffusion):
    """A model with the exact denoiser of ``data``."""

    def denoiser(self, network: nn.Module | None = None):
        if not hasattr(self, "data"):
            return super().denoiser(network)
        schedule, data = self.schedule, self.data

        def denoise(x_t, level, cond=None, next_level=None):
            x, eps, _ = data.predict(x_t.double(), level, None if cond is None else cond.label)
            return Prediction(x.to(x_t), eps.to(x_t))

        denoise.schedule = schedule
        return denoise


def exact(data, transform, schedule, dims=2, **settings):
    model = Exact(ModelConfig(network=VECTOR, schedule=schedule, **settings), (dims,), transform)
    model.data = data
    return model


def test_the_three_estimates_of_continuous_data():
    transform = Standardized((1.0, 2.0), (2.0, 0.5))
    model = exact(GAUSSIAN, transform, {"name": "linear_log_snr", "high": 9.0, "low": -12.0})
    g = torch.Generator().manual_seed(0)
    x = MEAN + VAR.sqrt() * torch.randn(16, 2, generator=g, dtype=torch.float64)
    values = transform.to_data(x)
    truth = -GAUSSIAN.log_density(x, model.schedule(0.0)._replace(alpha=torch.tensor(1.0), sigma=torch.tensor(0.0)))
    truth = truth + math.log(2.0 * 0.5)  # −log |det| of the transform
    ode, continuous, chain = (model.nll(values, estimate=name) for name in ("ode", "continuous", "discrete"))
    assert ode.calls > 10
    assert (ode.total - truth).abs().max() < 0.02  # sigma_0 = 0.011 blurs the data
    assert continuous.calls == estimate.DEFAULT_POINTS
    assert chain.calls == 1000
    for bound in (continuous, chain):  # their gap, E KL(q(z_0..1|x) to the reverse process), is below 0.01
        assert abs(bound.total.mean() - truth.mean()) < 4.89 * (bound.total - truth).std() / 4 + 0.01


def test_the_flow_dequantizes_with_the_noise_that_fills_the_bins():
    v = IntegerLevels(4).to_model(torch.arange(4), torch.float64)[:, None]
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    data = MixtureData(share, v, torch.zeros(4, 1, dtype=torch.float64))
    for schedule in (
        {"name": "linear_log_snr", "high": 5.0, "low": -9.0},
        {"name": "linear_log_snr", "high": 20.0, "low": -9.0},
    ):
        model = exact(data, IntegerLevels(4), schedule, dims=1)
        values = torch.arange(4)[:, None].repeat(25, 1)
        total = model.nll(values, estimate="ode").total.reshape(25, 4).mean(0)
        # up to the mass beyond three standard deviations, and the mismatch of N(0, 1) at log-SNR −9
        torch.testing.assert_close(total, -share.log(), rtol=0, atol=0.03)


def test_a_chain_that_ends_in_data_decodes_by_its_last_step():
    v = IntegerLevels(256).to_model(torch.tensor([0, 128]), torch.float64)[:, None]
    share = torch.tensor([0.75, 0.25], dtype=torch.float64)
    model = exact(
        MixtureData(share, v, torch.zeros(2, 1, dtype=torch.float64)),
        IntegerLevels(256),
        {"name": "linear", "T": 1000},
        1,
    )
    values = torch.tensor([[0], [128]]).repeat(200, 1)
    total = model.nll(values, estimate="ode").total.reshape(200, 2).mean(0)
    # sigma_1 = 0.01 is wider than a bin; the mean of the last step is x, so that only its variance costs
    last_step = ReverseChain(model.denoiser(), model.chain[-2:])
    x = v.repeat(200, 1)
    last = vlb(last_step, x, lambda n: torch.randn(n, 400, 1, dtype=torch.float64), edges=model.transform.edges(x))
    floor = last.decoder.reshape(200, 2).mean(0)
    torch.testing.assert_close(total, -share.log() + floor, rtol=0, atol=0.05)


def test_samples_tighten_the_flows_bound():
    v = IntegerLevels(4).to_model(torch.arange(4), torch.float64)[:, None]
    share = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    data = MixtureData(share, v, torch.zeros(4, 1, dtype=torch.float64))
    model = exact(data, IntegerLevels(4), {"name": "linear_log_snr", "high": 1.0, "low": -9.0}, dims=1)
    values = torch.zeros(50, 1, dtype=torch.long)
    one, many = (model.nll(values, estimate="ode", mc_samples=n) for n in (1, 8))
    assert many.calls > 7 * one.calls
    assert -share[0].log() - 0.01 < many.total.mean() < one.total.mean() - 0.05


@pytest.mark.parametrize("name", ["discrete", "continuous", "ode", "openai"])
def test_no_item_depends_on_its_batch(name):
    torch.manual_seed(0)
    network = {"kind": "unet", "widths": [8], "blocks": 1, "attention": [0], "heads": 1}
    model = Diffusion(
        ModelConfig(network=network, chain_length=6, schedule={"name": "linear_log_snr", "high": 8.0}),
        (1, 5, 4),
        IntegerLevels(256),
    )
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    values = torch.randint(0, 256, (5, 1, 5, 4), generator=torch.Generator().manual_seed(1))
    whole = model.nll(values, estimate=name, seed=3)
    parts = model.nll(values[3:], estimate=name, seed=3, batch=1, first=3)
    assert torch.isfinite(whole.total).all()
    torch.testing.assert_close(parts.total, whole.total[3:], rtol=2e-3 if name == "ode" else 1e-5, atol=1e-4)


def test_an_estimate_that_the_model_does_not_have_is_refused():
    model = Diffusion(ModelConfig(network=VECTOR), (2,), Identity())
    with pytest.raises(ConfigError, match=r"'exact': no such estimate. Use one of discrete, continuous, ode, openai"):
        model.nll(torch.zeros(1, 2), estimate="exact")
    with pytest.raises(ConfigError, match="only for images of 256 values"):
        model.nll(torch.zeros(1, 2), estimate="openai")
    with pytest.raises(ConfigError, match=r"mc_samples = 0: there is nothing to average"):
        model.nll(torch.zeros(1, 2), mc_samples=0)


def test_the_likelihood_given_a_label_is_that_of_the_label():
    """By the flow, item by item; without a condition it is the likelihood of all data."""
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.0]])
    data = LabelledMixture(torch.tensor([0.2, 0.5, 0.3]), means, torch.full((3, 2), 0.2), torch.tensor([0, 1, 0]))
    settings = {"network": VECTOR | {"classes": 2}, "schedule": {"name": "linear_log_snr", "high": 9.0, "low": -12.0}}
    model = Exact(ModelConfig(**settings), (2,), Identity())
    model.data = data
    x, label = data.sample_labelled(12, torch.Generator().manual_seed(0))
    label[0] = -1
    clean = model.schedule(0.0)
    assert (data.log_density(x, clean, label) - data.log_density(x, clean))[1:].abs().min() > 0.05
    for cond in (label, None):
        nll = model.nll(x, estimate="ode", cond=None if cond is None else Condition(label=cond))
        truth = -data.log_density(clean.broadcast_like(x).alpha * x, clean, cond) - 2 * torch.log(clean.alpha)
        assert (nll.total - truth).abs().max() < 0.01  # the prior's end is at log-SNR −12
    assert (nll.total[0] - truth[0]).abs() < 0.01

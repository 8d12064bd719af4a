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
from undiffuse.process.clean_end import clean_end
from undiffuse.process.gaussian import Gaussian, diffuse
from undiffuse.process.prior import prior_kl

MEAN, VAR = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.5, 0.2], dtype=torch.float64)
GAUSSIAN = GaussianData(MEAN, VAR)
UNIFORM = {"name": "uniform", "low": 0.0}
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


@pytest.mark.parametrize("schedule", [{"name": "flow"}, {"name": "linear", "T": 1000}, {"name": "sigmoid"}])
@pytest.mark.parametrize("name", ["continuous", "ode"])
def test_no_integral_goes_beyond_the_noise_that_fills_the_bins(name, schedule):
    """The exact denoiser is replaced by eps = 9 beyond that level, where a network would have to resolve the noise."""
    v = IntegerLevels(4).to_model(torch.arange(4), torch.float64)[:, None]
    share = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    model = exact(MixtureData(share, v, torch.zeros(4, 1, dtype=torch.float64)), IntegerLevels(4), schedule, dims=1)
    good, seen = model.denoiser(), []

    def denoise(x_t, level, cond=None, next_level=None):
        seen.append(float(level.log_snr.max()))
        x, eps, _ = good(x_t, level, cond)
        beyond = (level.log_snr > clean_end(4) + 1e-3).reshape(-1, 1)
        return Prediction(x, torch.where(beyond, 9.0, eps))

    denoise.schedule = model.schedule
    model.denoiser = lambda network=None: denoise
    values = torch.arange(4)[:, None].repeat(150, 1)
    total = model.nll(values, estimate=name, mc_samples=None if name == "ode" else 48).total.reshape(150, 4)
    assert max(seen) <= clean_end(4) + 1e-3
    assert max(seen) > clean_end(4) - 1.0
    error = total.std(0) / math.sqrt(150)  # at most 0.05; z < 4.89: a false alarm for one seed in 1e6
    assert ((total.mean(0) + share.log()).abs() < 4.89 * error + 0.03).all()


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


@pytest.mark.parametrize(("num_values", "bits"), [(256, 0.01006), (17, 0.00556), (65536, 0.01047)])
def test_the_default_clean_end_costs_a_hundredth_of_a_bit(num_values, bits):
    """The decoder's mean over 200,000 interior values, whatever the network; the closed form is in test_decoder.py.

    |z| < 4.89: a false alarm for one seed in 1e6. The standard error is at most 5e-4 bits, so the mass of the bins,
    which costs 0.031 bits more, would be over 60 standard errors off.
    """
    config = ModelConfig(VECTOR, {"name": "linear_log_snr", "high": clean_end(num_values)}, chain_length=2)
    model = Diffusion(config, (400,), IntegerLevels(num_values))
    values = torch.randint(1, num_values - 1, (500, 400), generator=torch.Generator().manual_seed(0))
    for name in ("discrete", "continuous"):
        each = model.nll(values, estimate=name, mc_samples=1, seed=1).decoder / (400 * math.log(2))
        error = float(each.std()) / math.sqrt(500)
        assert error < 5e-4
        assert abs(float(each.mean()) - bits) < 4.89 * error
    flow = model.nll(values[:1], estimate="ode")
    log_q = -200 * (math.log(2 * math.pi * math.e) - clean_end(num_values))  # of N(x, s²) on average, 400 elements
    log_alpha = float(torch.log(model.schedule(0.0).alpha))
    assert abs(float(flow.decoder) - log_q + 400 * log_alpha) < 4.89 * math.sqrt(200) + 400 * 0.02


def categorical(high):
    """A model of three values in one dimension whose output is their distribution, whatever the input: it is exact."""
    share = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    schedule = {"name": "linear_log_snr", "high": high, "low": -12.0}
    config = ModelConfig(network=VECTOR, schedule=schedule, output="categorical", chain_length=500)
    model = Diffusion(config, (1,), IntegerLevels(3))
    with torch.no_grad():
        for p in model.network.network.parameters():
            p.zero_()
        model.network.bias.copy_(share.log()[None, None])
    return model, share


def test_with_its_own_distribution_of_the_values_an_exact_model_has_their_probability():
    """Noise at the clean end that is almost as wide as the values are apart costs nothing, by the flow at every draw.

    The bounds over 600 draws of each value: |z| < 4.89, a false alarm for one seed in 1e6. Without the probabilities
    of the values in the decoder they would cost 0.154 nats more, over 6 standard errors.
    """
    model, share = categorical(0.5)
    values = torch.arange(3)[:, None].repeat(600, 1)
    ode = model.nll(values[:6], estimate="ode").total
    torch.testing.assert_close(ode, -share.log().repeat(2), rtol=0, atol=2e-3)  # N(0, 1) at log-SNR −12
    for name, mc_samples in (("continuous", 24), ("discrete", 24)):
        total = model.nll(values, estimate=name, mc_samples=mc_samples, seed=1).total
        gap = (total.reshape(600, 3) + share.log()) @ share
        error = float(gap.std()) / math.sqrt(600)
        assert error < 0.025
        discretization = 0.02 if name == "discrete" else 0.002  # 500 steps instead of infinitely many
        assert -4.89 * error < float(gap.mean()) < 4.89 * error + discretization


@pytest.mark.parametrize(("variance", "bits"), [("small", 1.305), ("large", 1.713)])
def test_the_continuous_bound_of_a_table_ends_with_the_chains_last_step(variance, bits):
    """The linear schedule of 1000 steps: x̂ is exact, so that only the variance of the last step costs.

    N(z/alpha, sigma²/alpha²) costs 2.40 bits there, because sigma_1 = 0.01 is wider than a bin of 256 values.
    """
    v = IntegerLevels(256).to_model(torch.tensor([20, 128]), torch.float64)[:, None]
    data = MixtureData(torch.tensor([0.75, 0.25], dtype=torch.float64), v, torch.zeros(2, 1, dtype=torch.float64))
    model = exact(data, IntegerLevels(256), {"name": "linear", "T": 1000}, 1, variance=variance)
    values = torch.tensor([[20], [128]])
    result = model.nll(values, estimate="continuous", mc_samples=3)
    std = math.exp(float(model.chain[-1].final_log_var) / 2) if variance == "small" else 0.01
    closed_form = -math.log(math.erf(1 / 255 / std / math.sqrt(2)))
    assert closed_form / math.log(2) == pytest.approx(bits, abs=2e-3)
    torch.testing.assert_close(result.decoder, torch.full((2,), closed_form).double(), rtol=1e-5, atol=0)
    assert result.calls == 4


def test_continuous_data_keep_the_density_also_on_a_table():
    model = Diffusion(ModelConfig(network=VECTOR, schedule={"name": "linear", "T": 1000}), (2,), Identity())
    clean, x = model.schedule(1e-3), torch.tensor([[0.3, -1.0]]).repeat(200, 1)
    decoder = model.nll(x, estimate="continuous", mc_samples=1).decoder
    floor = 1 + math.log(2 * math.pi) - float(clean.log_snr)  # ½ log(2πe sigma²/alpha²) of two numbers, in the mean
    assert abs(float(decoder.mean()) - floor) < 4.89 * math.sqrt(1 / 200)


@pytest.mark.parametrize("output", ["categorical", "values"])
@pytest.mark.parametrize("loss", ["full_bound", "continuous"])
def test_training_by_the_bound_has_the_decoder_of_its_measurement(loss, output):
    """Every step of a chain that stays finite at once, and the ends of a learned schedule."""

    def build(**schedule):
        config = ModelConfig(VECTOR, {"high": 1.0} | schedule, chain_length=3, loss=loss, output=output, times=UNIFORM)
        return Diffusion(config, (2,), IntegerLevels(5)).eval()

    model = build(name="linear_log_snr" if loss == "full_bound" else "learned")
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.3)
    values, eps, u = torch.tensor([[0, 3], [4, 1], [2, 2]]), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    x, clean, top = model.transform.to_model(values), model.schedule(0.0), model.schedule(1.0)
    decode = estimate.clean_decoder(model, model.denoiser(), clean)
    last = -decode(x, diffuse(x.double(), clean, eps.double()), clean).sum(1) / 2
    if loss == "full_bound":
        bound = vlb(model.reverse_chain(model.denoiser()), x, lambda n: eps[None], decode=decode)
        rest = (bound.prior + bound.diffusion_nats) / 2
    else:
        fixed = build(name="learned", ends="fixed")
        fixed.network.load_state_dict(model.network.state_dict())
        zero = torch.zeros_like(x).double()
        rest = fixed.loss(values, u, eps) + prior_kl(x.double(), top, Gaussian(zero, zero)).mean(1)
    torch.testing.assert_close(model.loss(values, u, eps).double(), rest + last, rtol=1e-4, atol=1e-5)
    assert float(last.detach().min()) > 0.1
    if output == "categorical":
        gradients = torch.autograd.grad(last.sum(), list(model.network.parameters()), allow_unused=True)
        assert any(g is not None and float(g.abs().max()) > 1e-3 for g in gradients)


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
    with pytest.raises(ConfigError, match=r"mc_samples = 0: it is not a whole number of at least 1"):
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


def test_the_estimate_of_few_calls_begins_at_the_noisiest_level_that_the_map_was_trained_from(monkeypatch):
    """The schedule "flow" reaches further: its noisiest level with a finite log-SNR has sigma/alpha above 20,000."""
    network = {**VECTOR, "two_times": True}
    config = ModelConfig(network=network, schedule={"name": "flow"}, calls=2, divergence=True)
    model, levels = Diffusion(config, (2,), Identity()), []
    real = estimate.few_call_nll
    monkeypatch.setattr(
        estimate, "few_call_nll", lambda *given, **more: levels.append(given[2]) or real(*given, **more)
    )
    model.nll(torch.zeros(1, 2), estimate="flow_map")
    assert float(levels[0][-1].sigma / levels[0][-1].alpha) == pytest.approx(80.0)

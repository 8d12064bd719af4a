"""A chain whose beta is trained with the bound: levels, gradients, and the optimum on Gaussian data."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_run
import torch
from oracles import GaussianData
from scipy.optimize import minimize
from torch import nn

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.losses import full_bound
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.discrete_schedule import LearnedChain
from undiffuse.process.noise_level import transition_frac
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.time_grids import time_grid
from undiffuse.training.diffusion_task import fit_diffusion

DATA = GaussianData(torch.tensor([0.4, -0.3]), torch.tensor([0.25, 0.09]))
MLP = {"kind": "mlp", "width": 16, "depth": 1}


def bent(T=5, seed=0, **settings) -> LearnedChain:
    """A chain with random parameters, as after training."""
    chain = LearnedChain(T, **({"first": 0.01} | settings))
    with torch.no_grad():
        chain.logits.add_(torch.randn(T - 1, generator=torch.Generator().manual_seed(seed)))
    return chain


def exact_bound(beta, variance="small") -> float:
    """(154) in plain numbers, nats per dimension: the bound of the exact denoiser of `DATA` on the chain ``beta``."""
    total = 0.0
    for m, c in zip(DATA.m.tolist(), DATA.cov.tolist(), strict=True):
        bar = np.concatenate([[1.0], np.cumprod(1 - np.asarray(beta))])
        signal = bar[-1]
        total += 0.5 * (1 - signal + signal * (m * m + c) - 1 - math.log(1 - signal))
        for k in range(1, len(bar)):
            missed = c * (1 - bar[k]) / (bar[k] * c + 1 - bar[k])  # E (x - x̂)²
            if k == 1:
                v = beta[1] * (1 - bar[1]) / (1 - bar[2]) if variance == "small" else beta[0]
                total += 0.5 * (math.log(2 * math.pi * v) + missed / v)
                continue
            small, B2 = beta[k - 1] * (1 - bar[k - 1]) / (1 - bar[k]), bar[k - 1] * (beta[k - 1] / (1 - bar[k])) ** 2
            v = small if variance == "small" else beta[k - 1]
            total += 0.5 * (small / v - 1 - math.log(small / v) + B2 * missed / v)
    return total / len(DATA.m)


def bound(schedule, variance="small"):
    """The loss whose mean over x and noise is exact: every term is quadratic in them, and these have the moments."""
    signs = torch.cartesian_prod(torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0])).double()
    x, eps = DATA.m + DATA.cov.sqrt() * signs[:, :1], signs[:, 1:].expand(4, 2)
    chain = ReverseChain(DATA.denoiser(schedule), time_grid(schedule), variance)
    return full_bound(chain, x, lambda _: eps[None]).mean()


def test_levels_are_those_of_the_table_of_its_beta():
    chain = bent(7)
    beta = chain.beta.detach()
    table, t = DS.Tabulated(beta), torch.linspace(0, 1, 15, dtype=torch.float64)
    assert float(beta[0]) == pytest.approx(0.01, rel=1e-15)
    with torch.no_grad():
        for one, other in zip(chain(t)[:5], table(t)[:5], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
        one, other = (transition_frac(c(t[2:]), c(t[1:-1])) for c in (chain, table))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        torch.testing.assert_close(chain.log_snr_rate(t[1:]), table.log_snr_rate(t[1:]), rtol=1e-12, atol=0)
    log_snr = chain(t[1:]).log_snr.detach()
    torch.testing.assert_close(chain.inverse(log_snr), t[1:], rtol=0, atol=1e-12)
    assert bool((log_snr.diff() < 0).all())
    assert (chain.chain_length, chain.t_min) == (7, 1 / 7)


@pytest.mark.parametrize("T", [2, 3, 40])
def test_its_first_log_snr_falls_linearly(T):
    chain = S.build("learned_chain", T=T, first=1e-3, low=-4.0)
    log_snr = chain(torch.arange(1, T + 1, dtype=torch.float64) / T).log_snr.detach()
    expected = torch.linspace(math.log(999), -4.0, T, dtype=torch.float64)
    torch.testing.assert_close(log_snr, expected, rtol=0, atol=1e-11)


def test_it_stays_float64_and_its_first_beta_does_not_learn():
    model = nn.ModuleDict({"network": nn.Linear(2, 2), "schedule": bent()})
    before = model["schedule"].beta.detach()
    model.to(torch.bfloat16)
    assert torch.equal(model["schedule"].beta, before)
    assert [name for name, _ in model["schedule"].named_parameters()] == ["logits"]
    assert torch.equal(copy.deepcopy(model["schedule"])(1.0).log_snr, model["schedule"](1.0).log_snr)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("T", [2, 3, 6])
def test_the_bound_of_gaussian_data_and_its_gradient(T, variance):
    """(154), and (155) by finite differences: eps is fixed while beta moves in x_t, the levels and the denoiser."""
    chain = bent(T)
    value = bound(chain, variance)
    assert float(value.detach()) == pytest.approx(exact_bound(chain.beta.tolist(), variance), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, chain.logits)
    h = 1e-5
    for k in range(T - 1):
        moved = []
        for sign in (1, -1):
            shifted = copy.deepcopy(chain)
            shifted.logits.data[k] += sign * h
            moved.append(exact_bound(shifted.beta.tolist(), variance))
        assert float(gradient[k]) == pytest.approx((moved[0] - moved[1]) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("T", [4, 10])
def test_training_beta_reaches_the_minimum_of_the_bound(T):
    """The minimum is found by another optimizer, BFGS with differences for the gradient, on the closed form (154)."""
    chain, first = LearnedChain(T, first=0.02, low=-3.0), 0.02
    began = float(bound(chain).detach())

    def objective(z):
        return exact_bound([first, *(1 / (1 + np.exp(-z)))])

    best = minimize(objective, np.zeros(T - 1), method="BFGS", jac="3-point", options={"gtol": 1e-8})
    optimizer = torch.optim.LBFGS(
        chain.parameters(), max_iter=60, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def gradient():
        optimizer.zero_grad()
        (value := bound(chain)).backward()
        return value

    optimizer.step(gradient)
    entropy = float(DATA.entropy()) / 2
    assert entropy < best.fun < began - 0.01
    assert float(bound(chain).detach()) == pytest.approx(best.fun, abs=1e-7)


NLL_PARTS = ("prior", "diffusion_nats", "decoder", "total")


def a_model(transform, variance="small", **settings) -> tuple[Diffusion, Diffusion]:
    """A model with a learned chain, and one of the table of its beta with the same network."""
    torch.manual_seed(2)
    schedule = {"name": "learned_chain", "T": 6, "first": 0.01}
    config = ModelConfig(MLP, schedule, loss="full_bound", chain_length=6, variance=variance, **settings)
    model = Diffusion(config, (2,), transform)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    table = {"name": "tabulated", "beta": model.schedule.beta.tolist()}
    other = Diffusion(replace(config, schedule=table), (2,), transform)
    other.network.load_state_dict(model.network.state_dict())
    return model.double(), other.double()


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("transform", [Identity(), IntegerLevels(5)])
def test_evaluation_and_training_have_one_chain(transform, variance):
    """The loss of training is the chain's bound on the same noise, and its levels those of the table of its beta."""
    model, other = a_model(transform, variance)
    values = torch.tensor([[0, 1], [2, 3], [4, 4]])
    eps = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    x = transform.to_model(values, torch.float64)
    expected = vlb(model.reverse_chain(model.denoiser()), x, lambda _: eps[None], edges=transform.edges(x)).total / 2
    loss = model.loss(values, torch.zeros(3).double(), eps)
    assert torch.equal(loss.detach(), expected.detach())
    torch.testing.assert_close(loss, other.loss(values, torch.zeros(3).double(), eps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimate", ["discrete", "continuous", "ode", "openai"])
def test_every_likelihood_is_that_of_the_table_of_its_beta(estimate):
    model, other = a_model(IntegerLevels(256))  # the number that "openai" needs
    values = torch.tensor([[0, 1], [2, 130], [255, 4]])
    one, two = (m.nll(values, estimate=estimate) for m in (model, other))
    for part in NLL_PARTS:
        torch.testing.assert_close(getattr(one, part), getattr(two, part), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_sampler_draws_as_with_the_table_of_its_beta(solver):
    model, other = a_model(Identity())
    one, two = (m.sample(2, sampler=solver) for m in (model, other))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_a_short_training_lowers_the_bound_below_that_of_the_network_alone():
    """Behaviour test, one seed, 50 steps on N(0.5, 0.3²): the same network and noise, with and without the schedule."""
    bounds = []
    schedule = {"name": "learned_chain", "T": 3, "first": 0.05, "low": 1.0}
    for trains_schedule in (True, False):
        torch.manual_seed(0)
        model = Diffusion(ModelConfig(MLP, schedule, loss="full_bound", chain_length=3), (1,), Identity())
        groups = [{"params": model.network.parameters(), "lr": 0.01}]
        groups += [{"params": model.schedule.parameters(), "lr": 0.05}] if trains_schedule else []
        optimizer = torch.optim.Adam(groups)
        g = torch.Generator().manual_seed(1)
        for _ in range(50):
            x, eps = 0.5 + 0.3 * torch.randn(64, 1, generator=g), torch.randn(64, 1, generator=g)
            optimizer.zero_grad()
            model.loss(x, torch.zeros(64), eps).mean().backward()
            optimizer.step()
        values = 0.5 + 0.3 * torch.randn(512, 1, generator=g)
        bounds.append(float(model.nll(values, seed=3).total.mean()))
        assert float(model.schedule.beta[0].detach()) == pytest.approx(0.05)
        assert model.sample(3).isfinite().all()
    assert bounds[0] < bounds[1] - 0.05


def test_a_run_trains_saves_and_loads_it(tmp_path):
    images = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), num_values=5)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    schedule = {"name": "learned_chain", "T": 3}
    config = ModelConfig(
        network, schedule, loss="full_bound", chain_length=3, variance="learned", times={"name": "steps"}
    )
    train = TrainConfig(batch=8, max_steps=2, warmup=0, precision="float32", previews=1, snapshots=0)
    with tiny_run.quick_looks():
        model = checkpoint.load(fit_diffusion(Config(config, train), images, tmp_path, "cpu", quiet=True))
    fresh = LearnedChain(3)
    assert isinstance(model.schedule, LearnedChain)
    assert not torch.allclose(model.schedule.logits, fresh.logits, rtol=0, atol=1e-3)
    assert isinstance(model.transform, IntegerLevels)
    assert model.nll(torch.from_numpy(images.values[:3])).total.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"T": 1}, "T = 1: out of range for a learned chain"),
        ({"T": 1001}, "T = 1001: out of range"),
        ({"T": True}, "T = True: out of range"),
        ({"first": 0.0}, r"first = 0: beta must lie in \(0, 1\)"),
        ({"first": 1.0}, r"first = 1: beta must lie in \(0, 1\)"),
        ({"first": math.nan}, "first = nan"),
        ({"first": 0.5, "low": 0.0}, "low = 0, log-SNR after the first step = 0"),
        ({"low": -math.inf}, "low = -inf"),
    ],
)
def test_invalid_settings(settings, cause):
    with pytest.raises(ConfigError, match=rf"error\[SCHEDULE\] {cause}"):
        S.build("learned_chain", **settings)


@pytest.mark.parametrize("loss", ["weighted_mse", "bound", "continuous"])
def test_other_losses_do_not_train_it(loss):
    config = ModelConfig(MLP, {"name": "learned_chain", "T": 3}, chain_length=3, loss=loss, weight={"name": "simple"})
    with pytest.raises(ConfigError, match=r"learned_chain': only the loss 'full_bound' trains it"):
        Diffusion(config, (2,), Identity())
    with pytest.raises(ConfigError, match=r"chain_length"):
        Diffusion(replace(config, loss="full_bound", chain_length=4), (2,), Identity())

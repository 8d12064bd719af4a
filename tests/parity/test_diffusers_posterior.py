"""The chain of another implementation, diffusers' DDPMScheduler, against ours on the same table.

It runs with `make test-release` where diffusers is installed. What differs there on purpose or by rounding,
in 0.42, and is not asserted here:

- It recovers beta from a float32 alpha_bar by 1 − ᾱ_t/ᾱ_{t−1}, so in float32 its steps near the data keep
  four of their seven digits. The tests give it its own table in float64, and state the loss in one of their own.
- The small variance at t = 0 is clipped to 1e-20 (log −46), ours takes that of the step before; it draws no noise
  there, so only likelihoods could tell. `learned_range` begins there too.
- "fixed_small_log" hands out a standard deviation, "fixed_large_log" a log-variance of which `step` takes the square
  root, which is NaN; "learned" takes what the network says for the variance, negative or not.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest
import torch

from undiffuse.denoising.denoiser import Prediction
from undiffuse.likelihood.vlb import step_nll
from undiffuse.process import discrete_schedule as DS
from undiffuse.process.gaussian import Gaussian, diffuse, posterior, reverse
from undiffuse.sampling.time_grids import time_grid

pytestmark = pytest.mark.release

SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
g = torch.Generator().manual_seed(0)
X, EPS, EPS_HAT = (torch.randn(64, 3, generator=g, dtype=torch.float64) for _ in range(3))
NU = torch.rand(64, 3, generator=g, dtype=torch.float64)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[parity]'")


@pytest.fixture
def make(theirs, monkeypatch):
    """A scheduler in float64, and its step's law: the step is drawn with noise 0 and 1."""

    def build(schedule: str, steps: int | None = None, double: bool = True, **settings):
        scheduler = theirs.DDPMScheduler(beta_schedule=schedule, clip_sample=False, **settings)
        if double:
            scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), scheduler.one.double()
        if steps is not None:
            scheduler.set_timesteps(steps)

        def law(k: int, said: torch.Tensor, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """(mean, variance) of the step from their timestep k."""
            drawn = []
            for z in (0.0, 1.0):
                monkeypatch.setattr(theirs, "randn_tensor", lambda shape, **_: torch.full(shape, z, dtype=x_t.dtype))  # noqa: B023
                drawn.append(scheduler.step(said, k, x_t, return_dict=False)[0])
            return drawn[0], (drawn[1] - drawn[0]) ** 2

        return scheduler, law

    return build


def table(scheduler) -> DS.Tabulated:
    """Ours, from their float32 alpha_bar."""
    bar = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.double()])
    return DS.Tabulated(1 - bar[1:] / bar[:-1])


def ours(x_t: torch.Tensor, t, s, kind: str) -> Gaussian:
    at = t.broadcast_like(x_t)
    return reverse(Prediction((x_t - at.sigma * EPS_HAT) / at.alpha, EPS_HAT, NU), x_t, t, s, kind)


def said(kind: str) -> torch.Tensor:
    return torch.cat([EPS_HAT, 2 * NU - 1], 1) if kind == "learned_range" else EPS_HAT


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", VARIANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_has_the_same_mean_and_variance(make, schedule, kind):
    scheduler, law = make(schedule, variance_type=kind)
    levels, off = time_grid(table(scheduler))[::-1], [0.0, 0.0]
    for k in range(1000):
        t, s = levels[k + 1], levels[k]
        x_t = diffuse(X, t, EPS)
        mean, variance = law(k, said(kind), x_t)
        model = ours(x_t, t, s, VARIANCES[kind])
        off[0] = max(off[0], furthest(mean, model.mean) / float(model.mean.abs().max()))
        if k > 0:
            off[1] = max(off[1], furthest(variance / torch.exp(model.log_var), torch.ones_like(X)))
    assert max(off) < 1e-9  # 3e-13 with 0.42.1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noising_and_the_posterior_are_the_same(make, schedule):
    """With the prediction type "sample" and x itself their step is q(x_s given x_t, x)."""
    scheduler, law = make(schedule, prediction_type="sample")
    levels = time_grid(table(scheduler))[::-1]
    for k in range(1000):
        t, s = levels[k + 1], levels[k]
        x_t = scheduler.add_noise(X, EPS, torch.full((64,), k))
        assert furthest(x_t, diffuse(X, t, EPS)) < 1e-9
        mean, variance = law(k, X, x_t)
        wanted = posterior(x_t, X, t, s)
        assert furthest(mean, wanted.mean) < 1e-9
        if k > 0:
            assert furthest(variance / torch.exp(wanted.log_var), torch.ones(())) < 1e-9


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
def test_the_terms_of_the_bound_are_those_of_its_gaussians(make, kind):
    """KL(q(x_s given x_t, x) to p(x_s given x_t)) from their means and variances, in nats per element."""
    exact, exact_law = make("linear", prediction_type="sample")
    _, law = make("linear", variance_type=kind)
    levels = time_grid(table(exact))[::-1]
    for k in range(1, 1000):
        t, s = levels[k + 1], levels[k]
        x_t = diffuse(X, t, EPS)
        (m, v), (m2, v2) = exact_law(k, X, x_t), law(k, said(kind), x_t)
        kl = 0.5 * (torch.log(v2 / v) - 1 + (v + (m - m2) ** 2) / v2)
        at = t.broadcast_like(x_t)
        prediction = Prediction((x_t - at.sigma * EPS_HAT) / at.alpha, EPS_HAT, NU)
        assert furthest(kl, step_nll(reverse(prediction, x_t, t, s, VARIANCES[kind]), X, x_t, t, s)) < 1e-6


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_fewer_steps_on_its_grids(make, kind, spacing):
    scheduler, law = make("linear", steps=50, variance_type=kind, timestep_spacing=spacing)
    ks = scheduler.timesteps.tolist()
    levels = time_grid(table(scheduler), times=[*((k + 1) / 1000 for k in ks), 0.0])
    for k, t, s in zip(ks, levels[:-1], levels[1:], strict=True):
        x_t = diffuse(X, t, EPS)
        mean, variance = law(k, EPS_HAT, x_t)
        model = ours(x_t, t, s, VARIANCES[kind])
        assert furthest(mean, model.mean) < 1e-9
        if s.sigma > 0:
            assert furthest(variance / torch.exp(model.log_var), torch.ones(())) < 1e-9


def test_what_float32_costs_them(make):
    """Of the posterior variance, next to the data: one part in ten thousand."""
    scheduler, law = make("linear", double=False)
    levels = time_grid(table(scheduler))[::-1]
    _, variance = law(1, EPS_HAT.float(), X.float())
    relative = furthest(variance.double() / torch.exp(posterior(X, X, levels[2], levels[1]).log_var), torch.ones(()))
    assert 1e-5 < relative < 1e-2  # 1e-4 with 0.42.1

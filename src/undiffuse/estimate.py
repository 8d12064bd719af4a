"""The ways to measure a model's −log p, by name: each is a likelihood called with the model's own parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from undiffuse.codec import Pixels
from undiffuse.conditioning import Condition
from undiffuse.denoiser import Clipped, Prediction
from undiffuse.errors import ConfigError
from undiffuse.likelihood import (
    NLL,
    Integrator,
    OwnNoise,
    finite_ends,
    ode_nll,
    openai_vlb,
    stratify,
    tighten,
    vlb,
    vlb_continuous,
)
from undiffuse.presets import clean_end
from undiffuse.process.gaussian import Gaussian, reverse
from undiffuse.process.level import NoiseLevel, like
from undiffuse.randomness import ItemNoise, generator

if TYPE_CHECKING:
    from undiffuse.diffusion import Diffusion

POINTS = 32
"""Points of log-SNR an item of the continuous bound, unless told otherwise."""
EXACT_TRACE = 16
"""Numbers of an item up to which the divergence of its flow is computed, and not estimated."""
CLOSE, COARSE = Integrator(rtol=1e-5, atol=1e-5), Integrator(rtol=1e-4, atol=1e-4)
"""How the flow is integrated where its divergence is computed, and where it is estimated with more noise than this."""


Estimate = Callable[["Diffusion", Tensor, range, int, int | None, Condition | None], NLL]
"""−log p of a batch x by (model, x, items, seed, draws, cond)."""


def discrete(
    model: Diffusion, x: Tensor, items: range, seed: int, draws: int | None, cond: Condition | None = None
) -> NLL:
    """The bound of the model's chain: every step, or one in each of ``draws`` equal strata."""
    strata = None
    if draws is not None and draws < model.steps:
        strata = stratify(model.steps, draws, _uniform(seed, items, draws))
    variance, edges, noise = model.config.variance, model.codec.edges(x), _noise(model, items, seed)
    return vlb(model.denoiser(), x, model.levels, noise, cond=cond, variance=variance, edges=edges, strata=strata)


def continuous(
    model: Diffusion, x: Tensor, items: range, seed: int, draws: int | None, cond: Condition | None = None
) -> NLL:
    """The bound of infinitely many steps, from ``draws`` points of log-SNR."""
    ends, u = finite_ends(model.schedule), _uniform(seed, items, 1)[0]
    noise, edges = _noise(model, items, seed), model.codec.edges(x)
    return vlb_continuous(model.denoiser(), x, *ends, noise, u, points=draws or POINTS, cond=cond, edges=edges)


def ode(model: Diffusion, x: Tensor, items: range, seed: int, draws: int | None, cond: Condition | None = None) -> NLL:
    """The likelihood of the probability flow; ``draws`` of noise and probes together tighten that of discrete data.

    Levels are read from the process' own noise: at the clean end, or where it fills their bins if the schedule goes
    beyond; where a chain's last step to data is noisier than that, by that step.
    """
    (top, clean), dequantise = finite_ends(model.schedule), None
    if isinstance(model.codec, Pixels):
        decode = None
        if clean.log_snr > (filled := clean_end(model.codec.levels)):
            clean = model.schedule(model.schedule.inverse(filled))
        elif model.schedule.steps:
            decode = partial(_last_step, model, clean, cond)
        dequantise = OwnNoise(model.codec.edges, clean, decode)
    trace, integrator = ("exact", CLOSE) if model.dims <= EXACT_TRACE else ("hutchinson", COARSE)
    flow = partial(ode_nll, model.denoiser(), x, top, clean, _noise(model, items, seed), cond=cond, trace=trace)
    return tighten([flow(integrator=integrator, dequantise=dequantise) for _ in range(draws or 1)])


def openai(
    model: Diffusion, x: Tensor, items: range, seed: int, draws: int | None, cond: Condition | None = None
) -> NLL:
    """The chain's bound as the common script computes it, every step; see `likelihood.openai_vlb`."""
    if not isinstance(model.codec, Pixels) or model.codec.levels != 256:
        cause, fix = "the script knows images of 256 levels only", "Leave it out for these data"
        raise ConfigError("COMPAT", "openai", cause, fix)
    noise = _noise(model, items, seed)
    return openai_vlb(Clipped(model.denoiser()), x, model.levels, noise, cond=cond, variance=model.config.variance)


ESTIMATES: dict[str, Estimate] = {
    "discrete": discrete,
    "continuous": continuous,
    "ode": ode,
    "openai": openai,
}


def get(name: str) -> Estimate:
    """The estimate called ``name``. Raises `ConfigError`."""
    if name not in ESTIMATES:
        raise ConfigError("ESTIMATE", repr(name), "no such estimate", f"Use one of {', '.join(ESTIMATES)}")
    return ESTIMATES[name]


def _noise(model: Diffusion, items: range, seed: int) -> ItemNoise:
    return ItemNoise(seed, items, model.item_shape, "bound", model.device)


def _uniform(seed: int, items: range, n: int) -> Tensor:
    return torch.stack([torch.rand(n, generator=generator(seed, "strata", i)) for i in items], 1)


def _last_step(model: Diffusion, clean: NoiseLevel, cond: Condition | None, z: Tensor) -> Gaussian:
    """p(x given x_t = alpha z) of the chain's step from ``clean`` to data."""
    x_t = like(clean.alpha, z) * z
    said = model.denoiser()(x_t.float(), clean, cond, model.levels[-1])
    said = Prediction(*(None if part is None else part.to(z) for part in said))  # type: ignore[arg-type]
    return reverse(said, x_t, clean, model.levels[-1], model.config.variance)

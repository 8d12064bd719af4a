"""Estimates of a model's −log p by name: each row of `ESTIMATES` calls one likelihood with the model's own parts.

A new estimate is a function of (model, batch, mc_samples) and a row of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.data.transform import DataTransform, IntegerLevels
from undiffuse.denoising.denoiser import Clipped, Denoiser
from undiffuse.errors import ConfigError
from undiffuse.likelihood.dequantization import ForwardNoise
from undiffuse.likelihood.importance_weighting import iwae_bound
from undiffuse.likelihood.nll import NLL
from undiffuse.likelihood.openai_vlb import openai_vlb
from undiffuse.likelihood.probability_flow import ode_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import stratify, vlb
from undiffuse.likelihood.vlb_continuous import vlb_continuous
from undiffuse.networks.condition import Condition
from undiffuse.process.clean_end import clean_end
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.ode_integrator import Integrator
from undiffuse.process.schedule import Schedule, finite_ends
from undiffuse.process.seeded_noise import ItemNoise, generator

DEFAULT_POINTS = 32
"""Points of log-SNR per item for the continuous bound, if ``mc_samples`` is None."""
MAX_EXACT_TRACE_DIMS = 16
"""Largest number of dimensions for which `ode` computes the trace; above it the trace is estimated."""
TIGHT_TOLERANCE, LOOSE_TOLERANCE = Integrator(rtol=1e-5, atol=1e-5), Integrator(rtol=1e-4, atol=1e-4)
"""Integrators for the exact trace, and for the estimated one, whose noise is larger than the loose tolerance."""


class Model(Protocol):
    """The parts of a `Diffusion` that estimates use."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def transform(self) -> DataTransform: ...
    @property
    def item_shape(self) -> tuple[int, ...]: ...
    @property
    def dims(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def denoiser(self) -> Denoiser: ...
    def reverse_chain(self, denoise: Denoiser, cond: Condition | None = None) -> ReverseChain: ...


class Batch(NamedTuple):
    """``x`` (B, ...) in the model's units, the numbers of its ``items``, the ``seed`` of their noise, the condition."""

    x: Tensor
    items: range
    seed: int
    cond: Condition | None = None


Estimate = Callable[[Model, Batch, int | None], NLL]
"""−log p of a batch, or a bound on it, from (model, batch, mc_samples)."""


def discrete(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`vlb` of the model's chain: every step, or one step in each of ``mc_samples`` equal strata."""
    chain, strata = model.reverse_chain(model.denoiser(), batch.cond), None
    chain_length = len(chain.noise_levels) - 1
    if mc_samples is not None and mc_samples < chain_length:
        strata = stratify(chain_length, mc_samples, _uniform(batch, mc_samples))
    return vlb(chain, batch.x, _noise(model, batch), edges=model.transform.edges(batch.x), strata=strata)


def continuous(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`vlb_continuous`, the bound of infinitely many steps, from ``mc_samples`` points of log-SNR."""
    denoise, (top, clean), u = model.denoiser(), finite_ends(model.schedule), _uniform(batch, 1)[0]
    noise, edges = _noise(model, batch), model.transform.edges(batch.x)
    points = mc_samples or DEFAULT_POINTS
    return vlb_continuous(denoise, batch.x, top, clean, noise, u, points=points, cond=batch.cond, edges=edges)


def ode(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`ode_nll`; for discrete data an importance-weighted bound of ``mc_samples`` draws of noise and probes.

    Discrete data are dequantized by the process' own noise: at the schedule's clean end, or at the level where three
    standard deviations fill half a bin, if the schedule goes beyond it. If the clean end of a chain is noisier than
    that, the chain's last step decodes.
    """
    (top, clean), dequantizer = finite_ends(model.schedule), None
    if isinstance(model.transform, IntegerLevels):
        decode = None
        if clean.log_snr > (bin_filling := clean_end(model.transform.num_values)):
            clean = model.schedule(model.schedule.inverse(bin_filling))
        elif model.schedule.chain_length:
            decode = partial(_last_step, model.reverse_chain(model.denoiser(), batch.cond), clean)
        dequantizer = ForwardNoise(model.transform.edges, clean, decode)
    exact = model.dims <= MAX_EXACT_TRACE_DIMS
    flow = partial(
        ode_nll,
        model.denoiser(),
        batch.x,
        top,
        clean,
        _noise(model, batch),
        cond=batch.cond,
        trace="exact" if exact else "hutchinson",
        integrator=TIGHT_TOLERANCE if exact else LOOSE_TOLERANCE,
        dequantizer=dequantizer,
    )
    return iwae_bound([flow() for _ in range(mc_samples or 1)])


def openai(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`openai_vlb`, the chain's bound as improved-diffusion computes it, of every step whatever ``mc_samples``."""
    if not isinstance(model.transform, IntegerLevels) or model.transform.num_values != 256:
        cause, fix = (
            "improved-diffusion's bound is defined only for images of 256 values",
            "Leave it out for these data",
        )
        raise ConfigError("COMPAT", "openai", cause, fix)
    return openai_vlb(model.reverse_chain(Clipped(model.denoiser()), batch.cond), batch.x, _noise(model, batch))


ESTIMATES: dict[str, Estimate] = {
    "discrete": discrete,
    "continuous": continuous,
    "ode": ode,
    "openai": openai,
}


def get(name: str) -> Estimate:
    """The row ``name`` of `ESTIMATES`. Raises `ConfigError`."""
    if name not in ESTIMATES:
        raise ConfigError("ESTIMATE", repr(name), "no such estimate", f"Use one of {', '.join(ESTIMATES)}")
    return ESTIMATES[name]


def _noise(model: Model, batch: Batch) -> ItemNoise:
    return ItemNoise(batch.seed, batch.items, model.item_shape, "bound", model.device)


def _uniform(batch: Batch, n: int) -> Tensor:
    return torch.stack([torch.rand(n, generator=generator(batch.seed, "strata", i)) for i in batch.items], 1)


def _last_step(chain: ReverseChain, clean: NoiseLevel, z: Tensor) -> Gaussian:
    """p(x given x_t = alpha z): the chain's step from ``clean`` to data."""
    return chain.step(broadcast_like(clean.alpha, z) * z, clean, chain.noise_levels[-1], torch.float32)

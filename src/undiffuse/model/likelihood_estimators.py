"""Estimates of a model's −log p by name: each row of `ESTIMATES` calls one likelihood with the model's own parts.

A new estimate is a function of (model, batch, mc_samples) and a row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.data.transform import DataTransform, IntegerLevels
from undiffuse.denoising.denoiser import Clipped, Denoiser, NetworkDenoiser, in_float32
from undiffuse.errors import ConfigError, unknown_name
from undiffuse.likelihood.decoder import CategoricalDecoder, Decoder, Density, LastStep, ValueSoftmax
from undiffuse.likelihood.dequantization import ForwardNoise
from undiffuse.likelihood.few_calls import few_call_nll
from undiffuse.likelihood.importance_weighting import iwae_bound
from undiffuse.likelihood.nll import NLL
from undiffuse.likelihood.openai_vlb import openai_vlb
from undiffuse.likelihood.probability_flow import ode_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import draw_steps, vlb
from undiffuse.likelihood.vlb_continuous import vlb_continuous
from undiffuse.model.config import ModelConfig
from undiffuse.model.consistency import few_call_sampler, noisiest_level
from undiffuse.networks.condition import Condition
from undiffuse.process.clean_end import clean_end
from undiffuse.process.noise_level import NoiseLevel, stack
from undiffuse.process.ode_integrator import Integrator
from undiffuse.process.schedule import Schedule, finite_ends
from undiffuse.process.seeded_noise import ItemNoise, generator, uniform

DEFAULT_POINTS = 32
"""Points of log-SNR per item for the continuous bound, if ``mc_samples`` is None."""
MAX_EXACT_TRACE_DIMS = 16
"""Largest number of dimensions for which `ode` computes the trace; above it the trace is estimated."""
TIGHT_TOLERANCE, LOOSE_TOLERANCE = Integrator(rtol=1e-5, atol=1e-5), Integrator(rtol=1e-4, atol=1e-4)
"""Integrators for the exact trace, and for the estimated one, whose noise is larger than the loose tolerance."""


class Decodable(Protocol):
    """The parts of a `Diffusion` that a decoder uses."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def transform(self) -> DataTransform: ...
    def reverse_chain(self, denoise: Denoiser, cond: Condition | None = None) -> ReverseChain: ...


class Model(Decodable, Protocol):
    """The parts of a `Diffusion` that estimates use."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def x_shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def denoiser(self) -> Denoiser: ...


class Batch(NamedTuple):
    """``x`` (B, ...) in the model's units, the numbers of its ``items``, the ``seed`` of their noise, the condition."""

    x: Tensor
    items: range
    seed: int
    cond: Condition | None = None


Estimate = Callable[[Model, Batch, int | None], NLL]
"""−log p of a batch, or a bound on it, from (model, batch, mc_samples)."""


def integral_ends(model: Decodable) -> tuple[NoiseLevel, NoiseLevel]:
    """(noisiest, cleanest) level of the integrals over log-SNR: those of `finite_ends`.

    For integer data the cleanest is at most `clean_end`, where three standard deviations of noise fill half a bin.
    A network does not resolve the noise beyond it, and few steps of training are there.
    """
    top, clean = finite_ends(model.schedule)
    if isinstance(model.transform, IntegerLevels) and clean.log_snr > (end := clean_end(model.transform.num_values)):
        clean = model.schedule(model.schedule.inverse(end))
    return top, clean


def clean_decoder(model: Decodable, denoise: Denoiser, clean: NoiseLevel, cond: Condition | None = None) -> Decoder:
    """p(x given z_0), z_0 at the level ``clean`` of finite log-SNR: the tightest decoder that the model has.

    For integers the network's own distribution of the values, if its output is one; at the first level of a table
    the chain's last step; otherwise the distribution ∝ N(z_0; alpha_0 v, sigma_0²) of the values v. For continuous
    data the density N(z_0/alpha_0, sigma_0²/alpha_0²).
    """
    if not isinstance(model.transform, IntegerLevels):
        return Density()
    if isinstance(denoise, NetworkDenoiser) and denoise.categorical:
        return CategoricalDecoder(denoise, model.transform, cond)
    if model.schedule.chain_length and float(clean.t) == model.schedule.t_min:
        return LastStep(model.reverse_chain(denoise, cond), model.transform.edges)
    return ValueSoftmax(model.transform)


def discrete(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`vlb` of the model's chain: every step, or ``mc_samples`` of them (`draw_steps`)."""
    chain, visits = model.reverse_chain(model.denoiser(), batch.cond), None
    decode = clean_decoder(model, chain.denoise, chain.noise_levels[-1], batch.cond)
    if mc_samples is not None and mc_samples < len(chain.noise_levels) - 1:
        log_snr = stack(chain.noise_levels).log_snr.detach().cpu().flip(0)
        visits = draw_steps(log_snr, _uniform(batch, mc_samples))
    edges = model.transform.edges(batch.x)
    return vlb(chain, batch.x, _noise(model, batch), edges=edges, decode=decode, visits=visits)


def continuous(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`vlb_continuous`, the bound of infinitely many steps, from ``mc_samples`` points of log-SNR."""
    denoise, (top, clean), u = model.denoiser(), integral_ends(model), _uniform(batch, 1)[0]
    noise, decode = _noise(model, batch), clean_decoder(model, denoise, clean, batch.cond)
    points = mc_samples or DEFAULT_POINTS
    return vlb_continuous(denoise, batch.x, top, clean, noise, u, points=points, cond=batch.cond, decode=decode)


def ode(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`ode_nll`; for discrete data an importance-weighted bound of ``mc_samples`` draws of noise and probes.

    Discrete data are dequantized by the process' own noise, at the clean one of the `integral_ends`. There
    `clean_decoder` decodes.
    """
    denoise = in_float32(model.denoiser())
    top, clean, dequantizer = _flow_ends(model, denoise, batch.cond)
    decoder_calls = dequantizer.decode.calls if dequantizer else 0
    exact = math.prod(model.x_shape) <= MAX_EXACT_TRACE_DIMS
    flow = partial(
        ode_nll,
        denoise,
        batch.x,
        top,
        clean,
        _noise(model, batch),
        cond=batch.cond,
        trace="exact" if exact else "hutchinson",
        integrator=TIGHT_TOLERANCE if exact else LOOSE_TOLERANCE,
        dequantizer=dequantizer,
    )
    result = iwae_bound(samples := [flow() for _ in range(mc_samples or 1)])
    return result._replace(calls=result.calls + len(samples) * decoder_calls)


def _flow_ends(
    model: Decodable, denoise: Denoiser, cond: Condition | None
) -> tuple[NoiseLevel, NoiseLevel, ForwardNoise | None]:
    """The noisy and the clean end of the flow, and for discrete data the dequantizer at the clean end.

    The noisy end is at t = 1 wherever log-SNR is finite there: a cut costs the flow of order alpha, a bound alpha².
    """
    top, clean = integral_ends(model)
    noisiest = model.schedule(1.0)
    top = noisiest if bool(torch.isfinite(noisiest.log_snr)) else top
    if not isinstance(model.transform, IntegerLevels):
        return top, clean, None
    return top, clean, ForwardNoise(clean, clean_decoder(model, denoise, clean, cond))


def flow_map(model: Model, batch: Batch, mc_samples: int | None) -> NLL:
    """`few_call_nll` of a flow map both ways, in the calls of its samples: an estimate, not a bound.

    With the dequantizer's noise of `ode` for the same seed, and so to be compared item by item. Raises `ConfigError`
    for another model.
    """
    if not model.config.divergence:
        cause = "only a flow map both ways has it: distill --method lagrangian --both-ways"
        raise ConfigError("ESTIMATE", "flow_map", cause, "Use discrete, continuous or ode")
    denoise = in_float32(model.denoiser())
    assert isinstance(denoise, NetworkDenoiser)
    _, clean, dequantizer = _flow_ends(model, denoise, batch.cond)
    inner = few_call_sampler(model.schedule, model.config.calls).times or ()
    levels = [clean, *(model.schedule(t) for t in reversed(inner[1:-1])), noisiest_level(model.schedule)]
    result = few_call_nll(denoise, batch.x, levels, _noise(model, batch), cond=batch.cond, dequantizer=dequantizer)
    return result._replace(calls=result.calls + (dequantizer.decode.calls if dequantizer else 0))


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
    "flow_map": flow_map,
}


def get(name: str) -> Estimate:
    """The row ``name`` of `ESTIMATES`. Raises `ConfigError`."""
    if name not in ESTIMATES:
        raise unknown_name("ESTIMATE", name, "estimate", ESTIMATES)
    return ESTIMATES[name]


def _noise(model: Model, batch: Batch) -> ItemNoise:
    return ItemNoise(batch.seed, batch.items, model.x_shape, "bound", model.device)


def _uniform(batch: Batch, n: int) -> Tensor:
    return torch.stack([uniform(n, generator(batch.seed, "strata", i)) for i in batch.items], 1)

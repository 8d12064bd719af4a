"""The training loss that a configuration names, computed with the model's own parts.

`losses` has the losses themselves, as functions of predictions and levels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from undiffuse.data.transform import DataTransform
from undiffuse.denoising.denoiser import Denoiser, NetworkDenoiser
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.model import losses
from undiffuse.model.config import ModelConfig
from undiffuse.model.likelihood_estimators import clean_decoder
from undiffuse.networks.condition import Condition
from undiffuse.process import time_sampling as times
from undiffuse.process.gaussian import diffuse
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule
from undiffuse.process.target import Target
from undiffuse.process.weighting import Weight
from undiffuse.sampling.time_grids import time_grid


class Model(Protocol):
    """The parts of a `Diffusion` that its losses use."""

    config: ModelConfig
    schedule: Schedule
    target: Target
    weight: Weight
    times: Any
    transform: DataTransform
    chain_length: int

    def denoiser(self, network: nn.Module | None = None) -> NetworkDenoiser: ...
    def reverse_chain(self, denoise: Denoiser, cond: Condition | None = None) -> ReverseChain: ...
    def next_level(self, t: NoiseLevel) -> NoiseLevel: ...


def training_loss(
    model: Model,
    x: Tensor,
    u: Tensor,
    eps: Tensor,
    z: Tensor | None = None,
    cond: Condition | None = None,
    network: nn.Module | None = None,
) -> Tensor:
    """The losses (B,) of `Diffusion.loss` for ``x`` (B, ...) in the units of the model."""
    denoise, name = model.denoiser(network), model.config.loss
    decode = clean_decoder(model, denoise, model.schedule(0.0), cond)
    if name == "full_bound":  # one eps for all steps: the mean of each term depends on one eps only
        levels = time_grid(model.schedule, model.chain_length)  # differentiable in a learned schedule
        chain = replace(model.reverse_chain(denoise, cond), noise_levels=levels)
        return losses.full_bound(chain, x, lambda _: eps[None], model.transform.edges(x), decode)
    at = model.times.sample(u)
    if name == "continuous":
        return losses.continuous_bound(denoise, x, at, model.times.log_prob(at), eps, decode, cond)
    loss = _loss_at(model, denoise, x, model.schedule(at), eps, z, cond)
    if isinstance(model.times, times.LossAwareSteps):
        return loss * broadcast_like(model.times.importance_weight(at), loss)
    return loss


def _loss_at(
    model: Model,
    denoise: NetworkDenoiser,
    x: Tensor,
    t: NoiseLevel,
    eps: Tensor,
    z: Tensor | None,
    cond: Condition | None,
) -> Tensor:
    """The losses ``weighted_mse``, ``hybrid`` and ``bound`` at the levels ``t`` (B,)."""
    s = model.next_level(t)
    x_t = diffuse(x, t, eps)
    if model.config.loss == "weighted_mse":
        y, *_ = denoise.outputs(x_t, t, cond)
        w = model.weight(t, s) * model.chain_length if model.weight.needs_next_level else model.weight(t, s)
        return losses.weighted_mse(y, model.target, x, eps, w, t, s, z)
    edges = model.transform.edges(x)
    if model.config.loss == "hybrid":
        prediction = denoise(x_t, t, cond, s)
        return losses.hybrid(prediction, eps, x, x_t, t, s, model.chain_length, edges=edges)
    step = model.reverse_chain(denoise, cond).step(x_t, t, s)
    return model.chain_length * losses.bound_term(step, x, x_t, t, s, edges)

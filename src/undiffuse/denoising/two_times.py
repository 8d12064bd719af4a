"""Flow maps X_{t→s}: denoisers that also get the level s at which a step ends.

A pair (x̂, ε̂) with x_t = alpha_t x̂ + sigma_t ε̂ and X_{t→s}(x_t) = alpha_s x̂ + sigma_s ε̂ describes the map for every
schedule. Along the flow from t to s, x̂ is the mean of the denoiser's x̂ over alpha/sigma, ε̂ the mean of its ε̂ over
sigma/alpha; at s = t they are the denoiser's own.

In the coordinates z = x/(alpha + sigma) and τ = sigma/(alpha + sigma) every schedule is that of flow matching: the flow
is dz/dτ = ε̂ − x̂, and Z_{t→s}(z) = z + (τ_s − τ_t) u with the average velocity u = ε̂ − x̂ of the pair.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule


def predict_to(
    denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None
) -> Prediction:
    """The pair (x̂, ε̂) of X_{t→s} at ``x_t`` (B, ...); the levels are () or (B,), s cleaner or noisier than t.

    A denoiser without a second time predicts as at s = t.
    """
    end_time = s.t.expand(len(x_t))
    return denoise(x_t, t, replace(cond or Condition(), end_time=end_time), next_level=s)


def flow_map(denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None) -> Tensor:
    """X_{t→s}(x_t) = alpha_s x̂ + sigma_s ε̂ with the pair of `predict_to`; DDIM's step if the denoiser has one time."""
    x, eps, _ = predict_to(denoise, x_t, t, s, cond)
    return broadcast_like(s.alpha, x_t) * x + broadcast_like(s.sigma, x_t) * eps


def average_velocity(
    denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None
) -> Tensor:
    """u = ε̂ − x̂ of `predict_to`, the mean of dz/dτ over τ from t to s; at s = t the velocity of the flow."""
    x, eps, _ = predict_to(denoise, x_t, t, s, cond)
    return eps - x


def straight_scale(level: NoiseLevel) -> Tensor:
    """alpha + sigma, by which x is divided to make z."""
    return level.alpha + level.sigma


def straight_time(level: NoiseLevel) -> Tensor:
    """τ = sigma/(alpha + sigma), from 0 at the data to 1 at pure noise."""
    return level.sigma / straight_scale(level)


def level_at_straight_time(schedule: Schedule, tau: Tensor) -> NoiseLevel:
    """The level of ``schedule`` with sigma/(alpha + sigma) = ``tau``, or the nearest within its range."""
    return schedule(schedule.inverse(2 * (torch.log1p(-tau) - torch.log(tau))))

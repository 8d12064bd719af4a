"""Flow maps X_{t→s}: denoisers that also get the level s at which a step ends.

A pair (x̂, ε̂) with x_t = alpha_t x̂ + sigma_t ε̂ and X_{t→s}(x_t) = alpha_s x̂ + sigma_s ε̂ describes the map for every
schedule. Along the flow from t to s, x̂ is the mean of the denoiser's x̂ over alpha/sigma, ε̂ the mean of its ε̂ over
sigma/alpha; at s = t they are the denoiser's own.

In the coordinates z = x/(alpha + sigma) and τ = sigma/(alpha + sigma) every schedule is that of flow matching: the flow
is dz/dτ = ε̂ − x̂, and Z_{t→s}(z) = z + (τ_s − τ_t) u with the average velocity u = ε̂ − x̂ of the pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

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
    return denoise(x_t, t, _with_end_time(cond, s, len(x_t)), next_level=s)


class MapDenoiser(Denoiser, Protocol):
    """A denoiser that also predicts the slope: `NetworkDenoiser` with ``divergence``."""

    def predict_with_slope(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None
    ) -> tuple[Prediction, Tensor]: ...


def predict_to_with_slope(
    denoise: MapDenoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None
) -> tuple[Prediction, Tensor]:
    """`predict_to`, and h (B, ...), the mean of alpha ∂x̂_i/∂x_i over log(sigma/alpha) along the flow from t to s."""
    return denoise.predict_with_slope(x_t, t, _with_end_time(cond, s, len(x_t)))


def _with_end_time(cond: Condition | None, s: NoiseLevel, items: int) -> Condition:
    """``cond`` of ``items`` items with the time of ``s``, () or (B,), as the end time of each."""
    return replace(cond or Condition(), end_time=s.t.expand(items))


def map_log_det(slope: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """log|det ∂X_{t→s}/∂x_t| (B,) = Σ_i (log(sigma_s/sigma_t) − (λ_s − λ_t) h_i), with λ = log(sigma/alpha).

    It is the integral of the flow's divergence from t to s: with z and τ of this module dz/dτ = (z − x̂)/τ and
    dτ = τ (1 − τ) dλ, so that it grows by Σ_i (1 − τ)(1 − ∂x̂_i/∂z_i) per unit of λ, in which
    (1 − τ) ∂x̂_i/∂z_i = alpha ∂x̂_i/∂x_i, and ∫ (1 − τ) dλ = ∫ d log τ.
    """
    slope = slope.double()
    span, grown = log_ratio(s) - log_ratio(t), torch.log(s.sigma) - torch.log(t.sigma)
    return (broadcast_like(grown, slope) - broadcast_like(span, slope) * slope).flatten(1).sum(1)


def log_ratio(level: NoiseLevel) -> Tensor:
    """λ = log(sigma/alpha)."""
    return -level.log_snr / 2


def flow_map(denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None) -> Tensor:
    """X_{t→s}(x_t) = alpha_s x̂ + sigma_s ε̂ with the pair of `predict_to`; DDIM's step if the denoiser has one time."""
    return pair_at(predict_to(denoise, x_t, t, s, cond), s)


def pair_at(prediction: Prediction, s: NoiseLevel) -> Tensor:
    """alpha_s x̂ + sigma_s ε̂."""
    x, eps, _ = prediction
    return broadcast_like(s.alpha, x) * x + broadcast_like(s.sigma, x) * eps


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

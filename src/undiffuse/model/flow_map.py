"""Objectives for a flow map X_{t→s}, learned from the velocity of a flow, by the table `OBJECTIVES`.

In the coordinates of `undiffuse.denoising.two_times` a map is Z_{t→s}(z) = z + (τ_s − τ_t) u(z, t, s), and with the
flow's velocity v either of two equations makes it that of the flow: ∂Z_{t→s}(z)/∂τ_s = v(Z_{t→s}(z), s) (Lagrangian:
at the end of the map [Boffi25]), or u = v − (τ_t − τ_s) du/dτ_t along the flow through z (MeanFlow: at its start
[Geng25]). Both say u(z, t, t) = v(z, t) at s = t. Derivatives are central differences, two calls of the network, which
work with every network, attention kernel and distribution of weights; their error is of order 2 in the width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.denoising.two_times import (
    MapDenoiser,
    average_velocity,
    level_at_straight_time,
    log_ratio,
    predict_to,
    predict_to_with_slope,
    straight_scale,
    straight_time,
)
from undiffuse.model.consistency import noisiest_level, pseudo_huber
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule
from undiffuse.process.statistics import item_mean

WIDTH = 0.02
"""Half the width of a difference, relative to τ (1 − τ): about that of log(sigma/alpha)."""
DIAGONAL_SHARE, TO_DATA_SHARE = 0.25, 0.25
"""Shares of the items with s = t, where u is the velocity, and with s at the data."""
MIN_TIME_SHARE = 0.02
"""τ_t is uniform from this fraction of its range on."""

Velocity = Callable[[Tensor, NoiseLevel], Tensor]
"""(x_t, t) -> dz/dτ, of x_t's shape."""


T = TypeVar("T")
SlopedVelocity = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]]
"""(x_t, t) -> dz/dτ and alpha ∂x̂_i/∂x_i, or an estimate of it with that mean, both of x_t's shape."""


class Objective(Protocol):
    def __call__(
        self,
        denoise: Denoiser,
        velocity: Velocity,
        x_t: Tensor,
        t: NoiseLevel,
        s: NoiseLevel,
        cond: Condition | None = None,
        width: float = WIDTH,
    ) -> Tensor:
        """The error of the map of ``denoise`` from ``x_t`` (B, ...), of x_t's shape: 0 for that of ``velocity``.

        Levels are (B,). No gradient flows through ``velocity``.
        """
        ...


class Stencil(NamedTuple):
    """Levels at τ − h and τ + h, and h, (B,)."""

    low: NoiseLevel
    high: NoiseLevel
    half: Tensor


def stencil(schedule: Schedule, level: NoiseLevel, width: float) -> Stencil:
    """The levels to both sides of ``level``, h = ``width`` τ (1 − τ)."""
    tau = straight_time(level)
    half = width * tau * (1 - tau)
    return Stencil(level_at_straight_time(schedule, tau - half), level_at_straight_time(schedule, tau + half), half)


def lagrangian(
    denoise: Denoiser,
    velocity: Velocity,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    cond: Condition | None = None,
    width: float = WIDTH,
) -> Tensor:
    """τ_s (1 − τ_s) (∂Z_{t→s}/∂τ_s − v(Z_{t→s}, s)): the error of the map per unit of log(sigma_s/alpha_s) [Boffi25].

    The derivative is (Z_{t→high} − Z_{t→low})/2h, and v is at the mean of the two. Both calls have the same dropout.
    """
    sides = stencil(denoise.schedule, s, width)
    low, high = _both_sides(sides, lambda level: predict_to(denoise, x_t, t, level, cond))
    x_s, derivative = _end_and_derivative(low, high, x_t, t, s, sides)
    with torch.no_grad():
        v = velocity(x_s, s)
    return broadcast_like(sides.half / width, v) * (derivative - v)


def lagrangian_with_slope(
    denoise: MapDenoiser,
    flow: SlopedVelocity,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    cond: Condition | None = None,
    width: float = WIDTH,
) -> tuple[Tensor, Tensor]:
    """The error of `lagrangian`, and ∂((λ_s − λ_t) h)/∂λ_s − g with λ = log(sigma/alpha), both of x_t's shape.

    h is the slope of the map from t to s (`predict_to_with_slope`) and g that of ``flow`` at its end, so that the
    second is 0 where (λ_s − λ_t) h is the integral of g along the flow. Both errors come from the same two calls. g may
    be an estimate, because the mean square of this error is least where h is that of the mean of g.
    """
    sides = stencil(denoise.schedule, s, width)
    predictions = _both_sides(sides, lambda level: predict_to_with_slope(denoise, x_t, t, level, cond))
    (low, h_low), (high, h_high) = predictions
    x_s, derivative = _end_and_derivative(low, high, x_t, t, s, sides)
    with torch.no_grad():
        v, g = flow(x_s, s)
    before, after = (log_ratio(level) - log_ratio(t) for level in (sides.low, sides.high))
    grown = broadcast_like(after / (after - before), v) * h_high - broadcast_like(before / (after - before), v) * h_low
    return broadcast_like(sides.half / width, v) * (derivative - v), grown - g


def _both_sides(sides: Stencil, predict: Callable[[NoiseLevel], T]) -> tuple[T, T]:
    """``predict`` of the two levels, with the same dropout."""
    with torch.random.fork_rng():
        low = predict(sides.low)
    return low, predict(sides.high)


def _end_and_derivative(
    low: Prediction, high: Prediction, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, sides: Stencil
) -> tuple[Tensor, Tensor]:
    """X_{t→s} from the mean of Z to both sides of s, without a gradient, and the difference of these over 2h."""
    z = x_t / broadcast_like(straight_scale(t), x_t)
    ends = [
        z + broadcast_like(straight_time(level) - straight_time(t), z) * (prediction.eps - prediction.x)
        for level, prediction in ((sides.low, low), (sides.high, high))
    ]
    x_s = (ends[0] + ends[1]).detach() / 2 * broadcast_like(straight_scale(s), z)
    return x_s, (ends[1] - ends[0]) / (2 * broadcast_like(sides.half, z))


def meanflow(
    denoise: Denoiser,
    velocity: Velocity,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    cond: Condition | None = None,
    width: float = WIDTH,
) -> Tensor:
    """u(z, t, s) − (v − (τ_t − τ_s) du/dτ_t), without a gradient to the part in brackets [Geng25 eq. 6 and 11].

    du/dτ_t is along the flow: (u(z + h v, t + h, s) − u(z − h v, t − h, s))/2h. ``velocity`` may be that of the pair
    of data and noise, ε − x, since the part in brackets is linear in it up to the error of the difference: its mean
    given x_t is that with v.
    """
    low, high, half = stencil(denoise.schedule, t, width)
    with torch.no_grad():
        v = velocity(x_t, t)
        z, h = x_t / broadcast_like(straight_scale(t), x_t), broadcast_like(half, x_t)
        sides = []
        for level, sign in ((low, -1), (high, 1)):
            with torch.random.fork_rng():
                x = (z + sign * h * v) * broadcast_like(straight_scale(level), z)
                sides.append(average_velocity(denoise, x, level, s, cond))
        span = broadcast_like(straight_time(t) - straight_time(s), z)
        goal = v - span * (sides[1] - sides[0]) / (2 * h)
    return average_velocity(denoise, x_t, t, s, cond) - goal


OBJECTIVES: dict[str, Objective] = {"lagrangian": lagrangian, "meanflow": meanflow}


def flow_map_loss(residual: Tensor) -> Tensor:
    """√(mean residual² + c²) − c of each item, (B,): `pseudo_huber`."""
    return pseudo_huber(item_mean(residual**2))


def slope_estimate(x: Tensor, at: Tensor, level: NoiseLevel, probe: Tensor) -> Tensor:
    """alpha v_i Σ_j v_j ∂x̂_j/∂x_i, an estimate of alpha ∂x̂_i/∂x_i by a ``probe`` v of random signs [Hutchinson90].

    ``x`` is x̂ at ``at``, with the graph between them; all are of one shape (B, ...).
    """
    (gradient,) = torch.autograd.grad(x, at, probe)
    return broadcast_like(level.alpha, at) * probe * gradient


def map_levels(schedule: Schedule, u: Tensor, r: Tensor, both_ways: bool = False) -> tuple[NoiseLevel, NoiseLevel]:
    """The levels (t, s) of training from uniform numbers ``u`` and ``r``, (B,) in [0, 1).

    τ_t is uniform between the ends. With the shares `DIAGONAL_SHARE` and `TO_DATA_SHARE` s is t or the cleanest level,
    else log(sigma_s/alpha_s) is uniform between that and t. With ``both_ways`` t and s are exchanged for half of the
    items. No difference of width `WIDTH` leaves the range of the schedule.
    """
    ends = straight_time(schedule(schedule.t_min)), straight_time(noisiest_level(schedule))
    lowest, highest = ends[0] / (1 - WIDTH), ends[1] - WIDTH * ends[1] * (1 - ends[1])
    tau_t = lowest + (highest - lowest) * (MIN_TIME_SHARE + (1 - MIN_TIME_SHARE) * u.double())
    r, exchanged = r.double(), torch.zeros_like(r, dtype=torch.bool)
    if both_ways:
        exchanged, r = r >= 0.5, 2 * r % 1
    share = ((r - DIAGONAL_SHARE - TO_DATA_SHARE) / (1 - DIAGONAL_SHARE - TO_DATA_SHARE)).clamp(min=0)
    tau_s = torch.sigmoid(torch.lerp(torch.logit(lowest).expand_as(share), torch.logit(tau_t), share))
    tau_s = torch.where(r < DIAGONAL_SHARE, tau_t, tau_s)
    tau_t, tau_s = torch.where(exchanged, tau_s, tau_t), torch.where(exchanged, tau_t, tau_s)
    return level_at_straight_time(schedule, tau_t), level_at_straight_time(schedule, tau_s)

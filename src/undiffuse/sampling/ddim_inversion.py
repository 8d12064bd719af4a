"""Items to noise by the probability flow, the way back, and interpolation between two noises."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.prior import prior_scale
from undiffuse.process.schedule import Schedule, finite_ends
from undiffuse.sampling.solvers.runge_kutta import RungeKutta
from undiffuse.sampling.trajectory import last_step, trajectory

FLOW_SOLVER = RungeKutta("rk4", "angle")
"""Of order 4, with four calls a step and no noise: the way up and the way down have to agree."""


def finite_levels(schedule: Schedule, levels: list[NoiseLevel]) -> list[NoiseLevel]:
    """The falling ``levels`` with both ends replaced by those of finite log-SNR, see `finite_ends`."""
    top, clean = finite_ends(schedule)
    return [top, *(level for level in levels if clean.t < level.t < top.t), clean]


@torch.no_grad()
def ddim_invert(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """x_T/std by the flow up from alpha x at the last of the falling ``levels``; std is that of the prior.

    The noises (B, ...) of the data ``x`` (B, ...) are N(0, I) to the extent that the model is right.
    """
    start = broadcast_like(levels[-1].alpha, x) * x
    top = last_step(trajectory(denoise, FLOW_SOLVER, levels[::-1], start, lambda n: x.new_empty(n, *x.shape)))
    return top.x / prior_scale(top.level)


@torch.no_grad()
def ddim_generate(denoise: Denoiser, noise: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """x (B, ...) of ``noise`` (B, ...): the inverse of `ddim_invert`, to the error of the solver."""
    start = noise * prior_scale(levels[0])
    clean = last_step(trajectory(denoise, FLOW_SOLVER, levels, start, lambda n: noise.new_empty(n, *noise.shape)))
    return clean.x / broadcast_like(clean.level.alpha, noise)


def slerp(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """(sin((1 − w) θ) one + sin(w θ) other)/sin θ for each w of ``weight`` (n,), θ the angle between them [Shoemake85].

    Between noises of equal length every result has that length too, as samples of N(0, I) nearly do. If ``one`` and
    ``other`` lie on a line through 0, the interpolation is linear.
    """
    flat = one.flatten().double(), other.flatten().double()
    theta = torch.acos((flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm())).clamp(-1, 1))
    w = weight.to(theta).reshape(-1, *[1] * one.ndim)
    if torch.sin(theta) < 1e-6:
        return ((1 - w) * one + w * other).to(one)
    return ((torch.sin((1 - w) * theta) * one + torch.sin(w * theta) * other) / torch.sin(theta)).to(one)

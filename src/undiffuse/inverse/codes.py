"""Codes: where the probability flow carries items to, and back; and ways between codes."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.likelihood import finite_ends
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import Schedule
from undiffuse.sample import prior_scale, trajectory
from undiffuse.solvers.runge_kutta import RungeKutta
from undiffuse.solvers.solver import Solver

FLOW = RungeKutta("rk4", "angle")
"""Of order 4, four calls a step: what goes up has to come down."""


def inner(schedule: Schedule, levels: list[NoiseLevel]) -> list[NoiseLevel]:
    """The falling ``levels`` between the ends of finite log-SNR (`finite_ends`), in place of their own."""
    top, clean = finite_ends(schedule)
    return [top, *(level for level in levels if clean.t < level.t < top.t), clean]


@torch.no_grad()
def to_codes(denoise: Denoiser, x: Tensor, levels: list[NoiseLevel], solver: Solver = FLOW) -> Tensor:
    """x_T/std carried up by the flow from alpha x at the last of the falling ``levels``; std is that of the prior.

    Codes of the data are N(0, I) as far as the model is right. ``solver`` draws no noise; ``x`` (B, ...).
    """
    start = like(levels[-1].alpha, x) * x
    *_, top = trajectory(denoise, solver, levels[::-1], start, lambda n: x.new_empty(n, *x.shape))
    return top.x / prior_scale(top.level)


@torch.no_grad()
def from_codes(denoise: Denoiser, codes: Tensor, levels: list[NoiseLevel], solver: Solver = FLOW) -> Tensor:
    """x, (B, ...): the inverse of `to_codes`, to the error of the solver."""
    start = codes * prior_scale(levels[0])
    *_, clean = trajectory(denoise, solver, levels, start, lambda n: codes.new_empty(n, *codes.shape))
    return clean.x / like(clean.level.alpha, codes)


def slerp(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """(sin((1 − w) θ) one + sin(w θ) other)/sin θ for the w of ``share`` (n,), θ the angle between them [Shoemake85].

    Codes of equal length keep it on the way, as samples of N(0, I) do. On a line through 0 it is the line.
    """
    flat = one.flatten().double(), other.flatten().double()
    theta = torch.acos((flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm())).clamp(-1, 1))
    w = share.to(theta).reshape(-1, *[1] * one.ndim)
    if torch.sin(theta) < 1e-6:
        return ((1 - w) * one + w * other).to(one)
    return ((torch.sin((1 - w) * theta) * one + torch.sin(w * theta) * other) / torch.sin(theta)).to(one)

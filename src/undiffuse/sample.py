"""Sampling: one loop that walks the noise levels, for every solver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import NonFiniteError
from undiffuse.process.gaussian import forward
from undiffuse.process.level import NoiseLevel
from undiffuse.randomness import Noise

if TYPE_CHECKING:
    from undiffuse.solvers.solver import Solver


class Step(NamedTuple):
    """A state of the trajectory: ``x`` (B, ...) at ``level``, after ``done`` steps."""

    done: int
    level: NoiseLevel
    x: Tensor


def trajectory(
    denoise: Denoiser, solver: Solver, levels: Sequence[NoiseLevel], x: Tensor, noise: Noise
) -> Iterator[Step]:
    """Each state from ``x`` (B, ...) at levels[0] down to levels[-1], len(levels) of them.

    ``noise(draws)`` gives the step's fresh numbers (draws, B, ...). Keep the last for a sample.
    """
    levels = list(levels)
    state = solver.init(x, levels)
    yield Step(0, levels[0], x)
    for done, (t, s) in enumerate(pairwise(levels), start=1):
        x, state = solver.step(denoise, x, t, s, state, noise(solver.draws))
        yield Step(done, s, x)


def forward_trajectory(x: Tensor, levels: Sequence[NoiseLevel], noise: Noise) -> Iterator[Step]:
    """The whole chain q(x_1..x_T|x) drawn step by step, from data (levels[-1]) up to levels[0] [Ho20 eq. 2].

    ``x`` is the state at levels[-1]; ``noise(1)`` gives each step's numbers.
    """
    upward = list(levels)[::-1]
    yield Step(0, upward[0], x)
    for done, (s, t) in enumerate(pairwise(upward), start=1):
        x = forward(x, s, t).sample(noise(1)[0])
        yield Step(done, t, x)


def prior_sample(level: NoiseLevel, noise: Tensor) -> Tensor:
    """x_T ~ N(0, I), or N(0, sigma_T²) where the schedule does not preserve variance, from ``noise`` (B, ...)."""
    return noise * prior_scale(level)


def prior_scale(level: NoiseLevel) -> float:
    """The standard deviation of the model's prior at ``level``: 1, or sigma_T where alpha² + sigma² is not 1."""
    preserving = abs(float(level.alpha**2 + level.sigma**2) - 1) < 1e-6
    return 1.0 if preserving else float(level.sigma)


def to_data(x: Tensor, level: NoiseLevel) -> Tensor:
    """x/alpha at the last level of a chain, its estimate of the data (alpha is 1 where sigma is 0)."""
    return x / float(level.alpha)


def numbers(x: Tensor, first: int = 0) -> Tensor:
    """``x`` (B, ...), items ``first`` and on, if it holds nothing but finite numbers. Raises `NonFiniteError`."""
    lost = torch.isfinite(x).flatten(1).all(1).logical_not().nonzero().flatten().tolist()
    if lost:
        cause = f"{len(lost)} of {len(x)} items grew beyond all numbers on the way"
        fix = "Lower the guidance, take more steps or another solver, or train the model longer"
        raise NonFiniteError("NON_FINITE", f"item {first + lost[0]}", cause, fix)
    return x

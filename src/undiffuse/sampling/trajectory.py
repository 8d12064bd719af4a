"""Sampling: one loop over the noise levels, for every solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import NonFiniteError
from undiffuse.process.gaussian import forward
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.seeded_noise import Noise
from undiffuse.sampling.solvers.solver import Solver


class Step(NamedTuple):
    """A state of the trajectory: ``x`` (B, ...) at ``level``, after ``done`` steps."""

    done: int
    level: NoiseLevel
    x: Tensor


@torch.inference_mode(False)  # guidance by a classifier needs gradients
@torch.no_grad()
def trajectory(
    denoise: Denoiser, solver: Solver, levels: Sequence[NoiseLevel], x: Tensor, noise: Noise
) -> Iterator[Step]:
    """The len(levels) states from ``x`` (B, ...) at levels[0], noise, to levels[-1], data; no gradients are recorded.

    ``noise(n)`` returns fresh noise (n, B, ...) for each step. The last state, by `last_step`, is the sample.
    """
    levels = list(levels)
    state = solver.init(x, levels)  # what the solver carries from step to step, not x
    yield Step(0, levels[0], x)
    for done, (t, s) in enumerate(pairwise(levels), start=1):
        x, state = solver.step(denoise, x, t, s, state, noise(solver.noises_per_step))
        yield Step(done, s, x)


def last_step(steps: Iterable[Step], on_step: Callable[[], None] | None = None) -> Step:
    """The last of ``steps``, keeping no other; calls ``on_step`` after each but the start."""
    last = None
    for last in steps:
        if on_step and last.done:
            on_step()
    if last is None:
        raise ValueError("a trajectory has at least its start")
    return last


def frame_steps(num_steps: int, max_frames: int) -> set[int]:
    """At most ``max_frames`` + 1 of the numbers 0 to ``num_steps``, at equal distances, with the first and the last."""
    frames = max(1, min(num_steps, max_frames))
    return {round(i * num_steps / frames) for i in range(frames + 1)}


def forward_trajectory(x: Tensor, levels: Sequence[NoiseLevel], noise: Noise) -> Iterator[Step]:
    """The chain q(x_1, …, x_T given x) of [Ho20 eq. 2], step by step, from data (levels[-1]) up to levels[0].

    ``x`` (B, ...) is the state at levels[-1]; ``noise(1)`` returns fresh noise (1, B, ...) for each step.
    """
    upward = list(levels)[::-1]
    yield Step(0, upward[0], x)
    for done, (s, t) in enumerate(pairwise(upward), start=1):
        x = forward(x, s, t).sample(noise(1)[0])
        yield Step(done, t, x)


def rescale(x: Tensor, level: NoiseLevel) -> Tensor:
    """x/alpha, the estimate of the data from the last state of a trajectory; x itself where alpha is 1."""
    return x / float(level.alpha.detach())


def check_finite(x: Tensor, first: int = 0) -> Tensor:
    """``x`` (B, ...), the items from ``first`` on, if all are finite. Raises `NonFiniteError`."""
    failed = torch.isfinite(x).flatten(1).all(1).logical_not().nonzero().flatten().tolist()
    if failed:
        cause = f"{len(failed)} of {len(x)} samples became NaN or infinite"
        fix = "Lower the guidance, take more steps or another solver, or train the model longer"
        raise NonFiniteError("NON_FINITE", f"item {first + failed[0]}", cause, fix)
    return x

"""States of the processes of a model: from data to noise, from noise to data, and from one noise by several solvers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import forward_trajectory, rescale

States = tuple[list[NoiseLevel], np.ndarray]
"""T levels, and T frames of n items as values of the data, (T, n, *item_shape)."""
COMPARED_SOLVERS = ("ddim", "heun", "dpm++2m", "unipc", "dpm++2m_sde")
"""Solvers that are shown side by side: of order 1 and 2, in one and in several steps, and one that draws noise."""
COMPARED_CALLS = 20
"""Network calls of each of them for a sample."""
FEW_CALLS = (1, 2, 4, 8)
"""Network calls of a distilled model that are shown side by side."""


@torch.no_grad()
def forward_states(model: Diffusion, values: torch.Tensor, columns: int) -> States:
    """``values`` (n, *item_shape) on one chain q(x_1..x_T given x) over ``columns`` levels of the model's chain.

    No network is called, but for the autoencoder of a latent model. Each state is divided by √(alpha² + sigma²) where
    that is above 1, so that it is in the range of the data.
    """
    levels = _evenly(model.chain, columns)
    noise = ItemNoise(0, range(len(values)), model.x_shape, "forward", model.device)
    x = model.transform.to_model(values).to(model.device)
    states = [(s.level, s.x) for s in forward_trajectory(x * float(levels[-1].alpha), levels, noise)]
    return _frames(model, states)


def reverse_states(model: Diffusion, items: range, columns: int, cond: Condition | None = None) -> States:
    """The samples numbered ``items`` on their way from noise, by the model's default sampler, at ``columns`` states."""
    states = [(state.level, state.x) for state in model.trajectory(items, cond=cond)]
    level, x = states[-1]
    states[-1] = level, rescale(x, level)
    return _frames(model, _evenly(states, columns))


def compared_samplers(model: Diffusion) -> list[tuple[str, Sampler, int]]:
    """Samplers to show side by side: a name, the sampler, and its network calls for a sample.

    Several solvers with about `COMPARED_CALLS` calls; for a distilled model its own solver with `FEW_CALLS`.
    """
    if solver := model.config.few_call_solver:
        return [(solver, few_call_sampler(model.schedule, number, solver), number) for number in FEW_CALLS]
    chosen = []
    for name in COMPARED_SOLVERS:
        calls = model.build_solver(Sampler(name)).calls
        steps = max(1, min(COMPARED_CALLS // calls, model.chain_length))
        chosen.append((name, replace(model.default_sampler, solver=name, num_steps=steps), steps * calls))
    return chosen


def _evenly(sequence: Sequence, count: int) -> list:
    """At most ``count`` elements of ``sequence`` at equal distances, with the first and the last."""
    numbers = np.unique(np.linspace(0, len(sequence) - 1, count).round().astype(int))
    return [sequence[i] for i in numbers]


def _frames(model: Diffusion, states: Sequence[tuple[NoiseLevel, torch.Tensor]]) -> States:
    frames = []
    for level, x in states:
        spread = math.hypot(float(level.alpha), float(level.sigma))
        frames.append(model.transform.to_data(x / max(1.0, spread)).cpu().numpy())
    return [level for level, _ in states], np.stack(frames)

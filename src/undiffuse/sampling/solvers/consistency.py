# pyright: reportIncompatibleVariableOverride=false
"""Multistep consistency sampling: jump to the data, add fresh noise, jump again [Song23b alg. 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class ConsistencySampling(Solver):
    """x_s = alpha_s x̂ + sigma_s z, and alpha_s x̂ at the last level.

    For consistency models, whose x̂ is a sample of the data [Song23b alg. 1]. The x̂ of an ordinary denoiser is the
    mean of the data given x_t, so that the samples of such a model are too smooth for any number of steps.
    """

    noises_per_step: ClassVar[int] = 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """(time of the last level,)"""
        return (levels[-1].t,)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        x_s = broadcast_like(s.alpha, x_t) * denoise(x_t, t, next_level=s).x
        if bool(torch.gt(s.t, state[0])):
            x_s = x_s + broadcast_like(s.sigma, x_t) * noise[0]
        return x_s, state

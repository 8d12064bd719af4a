"""Ancestral sampling: the reverse chain itself [Ho20 algorithm 2]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.process.gaussian import Variance, reverse
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ p(x_s given x_t), the same `reverse` as in the bound; no noise where sigma_s is 0.

    ``variance`` is ``"small"``, ``"large"``, ``"learned"`` or a function of (t, s); see `reverse`.
    """

    variance: Variance = "small"
    order: ClassVar[int | None] = 1
    noises_per_step: ClassVar[int] = 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        mean, log_var = reverse(denoise(x_t, t, next_level=s), x_t, t, s, self.variance)
        std = torch.exp(0.5 * log_var) * broadcast_like(s.sigma > 0, x_t)
        return mean + std * noise[0], state

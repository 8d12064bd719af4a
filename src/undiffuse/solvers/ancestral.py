"""Ancestral sampling: the reverse chain itself [Ho20 algorithm 2]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.process.gaussian import Variance, reverse
from undiffuse.process.level import NoiseLevel, like
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class Ancestral:
    """x_s ~ p(x_s given x_t), the same `reverse` as the bound's; no noise where sigma_s is 0.

    ``variance`` is ``"small"``, ``"large"``, ``"learned"`` or a function of (t, s); see `reverse`.
    """

    variance: Variance = "small"
    order: int | None = field(default=1, init=False, repr=False)
    calls: int = field(default=1, init=False, repr=False)
    draws: int = field(default=1, init=False, repr=False)

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        mean, log_var = reverse(denoise(x_t, t, to=s), x_t, t, s, self.variance)
        std = torch.exp(0.5 * log_var) * like(s.sigma > 0, x_t)
        return mean + std * noise[0], state

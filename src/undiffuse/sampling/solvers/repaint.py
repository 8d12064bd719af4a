# pyright: reportIncompatibleVariableOverride=false
"""RePaint: the known part is redrawn at every level, and the chain goes back and forth [Lugmayr22]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.gaussian import forward
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.product import inpainting_factor
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class Repaint(Solver):
    """x_s = alpha_s y + sigma_s z where ``mask`` is true, the step of ``solver`` elsewhere [Lugmayr22 alg. 1].

    A step to a noisier level draws from q(x_t given x_s) and resets the state of ``solver``; `resampling_levels` gives
    such levels. ``y``, in the units of x, and ``mask`` broadcast to x; at t = 0 the known part equals y.
    """

    y: Tensor
    mask: Tensor
    solver: Solver = field(default_factory=Ancestral)

    @property
    def calls(self) -> int:
        return self.solver.calls

    @property
    def noises_per_step(self) -> int:
        return 1 + self.solver.noises_per_step

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return self.solver.init(x, levels)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if s.t > t.t:
            return forward(x_t, t, s).sample(noise[0]), self.solver.init(x_t, [s, t])
        x_s, state = self.solver.step(denoise, x_t, t, s, state, noise[1:])
        return torch.where(self.mask, inpainting_factor(self.y.to(x_s), self.mask)(s).sample(noise[0]), x_s), state


def resampling_levels(levels: Sequence[NoiseLevel], length: int = 10, repeats: int = 10) -> list[NoiseLevel]:
    """The falling ``levels`` with jumps back: each stretch of ``length`` steps occurs ``repeats`` times.

    A jump back is one step, because q(x_t given x_s) needs no levels between; the stretch that ends in data is repeated
    like the others. Network calls are ``repeats`` times the steps. Raises `ConfigError`.
    """
    if length < 1 or repeats < 1:
        where = f"length = {length}, repeats = {repeats}"
        raise ConfigError("REPAINT", where, "both must be at least 1", "Give 1 or more")
    result = [levels[0]]
    for start in range(0, len(levels) - 1, length):
        stretch = list(levels[start : start + length + 1])
        result += stretch[1:] + stretch * (repeats - 1)
    return result

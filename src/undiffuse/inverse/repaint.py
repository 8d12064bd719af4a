"""RePaint: what is known is drawn anew at every level, and the chain goes back and forth [Lugmayr22]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.gaussian import forward
from undiffuse.process.level import NoiseLevel
from undiffuse.solvers.ancestral import Ancestral
from undiffuse.solvers.product import known
from undiffuse.solvers.solver import Solver, State


@dataclass(frozen=True)
class Repaint:
    """x_s = alpha_s y + sigma_s z where ``mask`` is true, the step of ``solver`` elsewhere [Lugmayr22 alg. 1].

    A step to a noisier level is one of q(x_t given x_s), after which ``solver`` begins anew: give it levels by
    `jumps`. ``y`` in the codec's units and ``mask`` broadcast to x; at t = 0 known numbers are y themselves.
    """

    y: Tensor
    mask: Tensor
    solver: Solver = field(default_factory=Ancestral)
    order: int | None = field(default=None, init=False, repr=False)

    @property
    def calls(self) -> int:
        return self.solver.calls

    @property
    def draws(self) -> int:
        return 1 + self.solver.draws

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return self.solver.init(x, levels)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if s.t > t.t:
            return forward(x_t, t, s).sample(noise[0]), self.solver.init(x_t, [s, t])
        x_s, state = self.solver.step(denoise, x_t, t, s, state, noise[1:])
        return torch.where(self.mask, known(self.y.to(x_s), self.mask)(s).sample(noise[0]), x_s), state


def jumps(levels: Sequence[NoiseLevel], length: int = 10, repeats: int = 10) -> list[NoiseLevel]:
    """The falling ``levels`` with ways back: each stretch of ``length`` steps is walked ``repeats`` times.

    The way up is one step, as q(x_t given x_s) has no need of those between; the stretch that ends in data is walked
    once more like the others. Network calls are ``repeats`` times the steps. Raises `ConfigError`.
    """
    if length < 1 or repeats < 1:
        where = f"length = {length}, repeats = {repeats}"
        raise ConfigError("REPAINT", where, "a stretch has a step or more, walked once or more", "Give 1 or more")
    walk = [levels[0]]
    for start in range(0, len(levels) - 1, length):
        stretch = list(levels[start : start + length + 1])
        walk += stretch[1:] + stretch * (repeats - 1)
    return walk

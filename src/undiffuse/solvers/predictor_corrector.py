"""Predictor and corrector: a step down, then steps that leave the level and mend the law [Song21 alg. 2, 3]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel
from undiffuse.score import predicted
from undiffuse.solvers.ancestral import Ancestral
from undiffuse.solvers.langevin import langevin
from undiffuse.solvers.solver import MANY, Solver, State


@dataclass(frozen=True)
class Corrector:
    """``each`` Langevin updates at the level s, of size 2 (snr ‖z‖/‖∇log p‖)², norms item by item [Song21 alg. 4].

    Theirs takes the batch's mean norms, which would make an item depend on its neighbours, and in alg. 5 multiplies
    with 1 − beta. For N(0, V) of many dimensions the stationary variance is (1 + snr²) V. x_t is taken to be at s.
    Raises `ConfigError`.
    """

    snr: float = 0.16
    each: int = 1
    order: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.snr < math.inf and 1 <= self.each <= MANY):
            where = f"snr = {self.snr!r}, each = {self.each!r}"
            raise ConfigError(
                "SOLVER", where, "no update can be made so", f"Give a snr above 0, and each from 1 to {MANY}"
            )

    @property
    def calls(self) -> int:
        return self.each

    @property
    def draws(self) -> int:
        return self.each

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        for z in noise:
            score = predicted(denoise(x_t, s), s)
            length = _norm(score)
            size = torch.where(length > 0, 2 * (self.snr * _norm(z) / length) ** 2, 0)
            x_t = langevin(x_t, score, size, z)
        return x_t, state


def _norm(x: Tensor) -> Tensor:
    """Of each item, (B, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


@dataclass(frozen=True)
class PredictorCorrector:
    """x_s by the ``predictor``'s step from t to s, then the ``corrector``'s from s to s; no correction at sigma_s = 0.

    Both are solvers. `AnnealedLangevin` is a corrector too, of a size that is known beforehand.
    """

    predictor: Solver = field(default_factory=Ancestral)
    corrector: Solver = field(default_factory=Corrector)
    order: int | None = field(default=None, init=False, repr=False)

    @property
    def calls(self) -> int:
        return self.predictor.calls + self.corrector.calls

    @property
    def draws(self) -> int:
        return self.predictor.draws + self.corrector.draws

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return self.predictor.init(x, levels), self.corrector.init(x, levels)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        first, second = state
        down, around = noise.split([self.predictor.draws, self.corrector.draws])
        x_s, first = self.predictor.step(denoise, x_t, t, s, first, down)
        if bool(s.sigma > 0):
            x_s, second = self.corrector.step(denoise, x_s, s, s, second, around)
        return x_s, (first, second)

# pyright: reportIncompatibleVariableOverride=false
"""Predictor and corrector: a step down, then steps at that level to correct the distribution [Song21 alg. 2, 3]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.denoising.score_matching import score_from_prediction
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.langevin import langevin
from undiffuse.sampling.solvers.solver import MAX_CALLS_PER_STEP, Solver, State


@dataclass(frozen=True)
class LangevinCorrector(Solver):
    """``num_updates`` Langevin updates at the level s of size 2 (snr ‖z‖/‖∇log p‖)², norms per item [Song21 alg. 4].

    Theirs uses the batch's mean norms, with which an item would depend on its neighbours, and in alg. 5 multiplies by
    1 − beta. For N(0, V) of many dimensions the stationary variance is (1 + snr²) V. ``x_t`` is a state at s. Raises
    `ConfigError`.
    """

    snr: float = 0.16
    num_updates: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.snr < math.inf and 1 <= self.num_updates <= MAX_CALLS_PER_STEP):
            where = f"snr = {self.snr!r}, num_updates = {self.num_updates!r}"
            fix = f"Give a snr above 0, and num_updates from 1 to {MAX_CALLS_PER_STEP:,}"
            raise ConfigError("SOLVER", where, "these settings are out of range", fix)

    @property
    def calls(self) -> int:
        return self.num_updates

    @property
    def noises_per_step(self) -> int:
        return self.num_updates

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        for z in noise:
            score = score_from_prediction(denoise(x_t, s), s)
            length = _norm(score)
            size = torch.where(length > 0, 2 * (self.snr * _norm(z) / length) ** 2, 0)
            x_t = langevin(x_t, score, size, z)
        return x_t, state


def _norm(x: Tensor) -> Tensor:
    """The norm of each item, (B, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """x_s by the ``predictor``'s step from t to s, then the ``corrector``'s from s to s; no correction at sigma_s = 0.

    `AnnealedLangevin` can be the corrector too; its updates are of a fixed size.
    """

    predictor: Solver = field(default_factory=Ancestral)
    corrector: Solver = field(default_factory=LangevinCorrector)

    @property
    def calls(self) -> int:
        return self.predictor.calls + self.corrector.calls

    @property
    def noises_per_step(self) -> int:
        return self.predictor.noises_per_step + self.corrector.noises_per_step

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return self.predictor.init(x, levels), self.corrector.init(x, levels)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        predicted, corrected = state
        z_predictor, z_corrector = noise.split([self.predictor.noises_per_step, self.corrector.noises_per_step])
        x_s, predicted = self.predictor.step(denoise, x_t, t, s, predicted, z_predictor)
        if bool(s.sigma > 0):
            x_s, corrected = self.corrector.step(denoise, x_s, s, s, corrected, z_corrector)
        return x_s, (predicted, corrected)

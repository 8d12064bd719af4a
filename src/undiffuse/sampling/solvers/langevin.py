# pyright: reportIncompatibleVariableOverride=false
"""Langevin dynamics, annealed over the noise levels [Song19 alg. 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.denoising.score_matching import score_from_prediction
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.sampling.solvers.solver import MAX_CALLS_PER_STEP, Solver, State, require_signal


def langevin(x: Tensor, score: Tensor, size: Tensor | float, noise: Tensor) -> Tensor:
    """x + size score + √(2 size) noise, one unadjusted Langevin update [Song19 eq. 4, whose ε is 2 size].

    As ``size`` (a number, or a tensor that broadcasts to x) falls to 0, its stationary distribution tends to the
    density with that score; for N(0, 1) it is N(0, 1/(1 − size/2)).
    """
    return x + size * score + (2 * size) ** 0.5 * noise


@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """x_s from (alpha_s/alpha_t) x_t by Langevin updates of size ``step_size`` sigma_s² [Song19 alg. 1].

    Theirs is α_i = ε sigma_i²/sigma_L², with α_i/2 before the score and √α_i before the noise: ours with
    ``step_size`` = ε/(2 sigma_L²), so their ε = 2e-5 at sigma_L = 0.01 is 0.1, and their T is ``updates_per_level``. A
    step that ends in data (sigma_s = 0, where there is no score) makes its updates at t.

    In the last step of a trajectory the last update returns the denoised mean alpha_s x̂ of Tweedie's formula, without
    the noise of the last level [Jolicoeur21]; it costs no call. With ``denoise_last`` = False a last level of
    sigma_s > 0 keeps its noise [Song19]. A corrector's step, from s to s, does not denoise. Raises `ConfigError`.
    """

    step_size: float = 0.1
    updates_per_level: int = 100
    denoise_last: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.step_size < 2 and 1 <= self.updates_per_level <= MAX_CALLS_PER_STEP):
            where = f"step_size={self.step_size!r}, updates_per_level={self.updates_per_level!r}"
            cause = "the updates diverge at a step_size of 2 or more, and a step makes at least one update"
            fix = f"Give a step_size between 0 and 2, and updates_per_level from 1 to {MAX_CALLS_PER_STEP:,}"
            raise ConfigError("SOLVER", where, cause, fix)

    @property
    def calls(self) -> int:
        return self.updates_per_level

    @property
    def noises_per_step(self) -> int:
        return self.updates_per_level

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """(time of the last level,)"""
        require_signal(levels, "annealed_langevin")
        return (levels[-1].t,)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        to_data = s.sigma == 0
        at = NoiseLevel(*(torch.where(to_data, a, b) for a, b in zip(t[:4], s[:4], strict=True)))  # type: ignore[arg-type]
        size = broadcast_like(self.step_size * at.sigma**2, x_t)
        x = clean = broadcast_like(at.alpha / t.alpha, x_t) * x_t
        for z in noise:
            prediction = denoise(x, at)
            x, clean = langevin(x, score_from_prediction(prediction, at), size, z), prediction.x
        if self.denoise_last and state:
            to_data = to_data | ((s.t == state[0]) & (s.t < t.t))
        return torch.where(broadcast_like(to_data, x_t).bool(), broadcast_like(s.alpha, x_t) * clean, x), state

"""Langevin dynamics, annealed over the noise levels [Song19 alg. 1]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, like
from undiffuse.score import predicted
from undiffuse.solvers.inversion import require_signal
from undiffuse.solvers.solver import MANY, State


def langevin(x: Tensor, score: Tensor, size: Tensor | float, noise: Tensor) -> Tensor:
    """x + size score + √(2 size) noise, one unadjusted Langevin update [Song19 eq. 4, whose ε is 2 size].

    Its stationary law tends to the density with that score as ``size`` (a number, or what broadcasts to x)
    falls to 0; for N(0, 1) it is N(0, 1/(1 − size/2)).
    """
    return x + size * score + (2 * size) ** 0.5 * noise


@dataclass(frozen=True)
class AnnealedLangevin:
    """x/alpha is carried from t to s; there ``each`` Langevin updates of size ``step_size`` sigma_s² [Song19 alg. 1].

    Theirs is α_i = ε sigma_i²/sigma_L², with α_i/2 before the score and √α_i before the noise: ours with
    ``step_size`` = ε/(2 sigma_L²), so their ε = 2e-5 at sigma_L = 0.01 is 0.1, and their T is ``each``. A step
    that ends in data (sigma_s = 0, where there is no score) makes its updates at t instead, the last of them
    the denoised mean x̂ [Jolicoeur21]. Raises `ConfigError`.
    """

    step_size: float = 0.1
    each: int = 100
    order: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.step_size < 2 and 1 <= self.each <= MANY):
            some = 1 <= self.each <= MANY
            cause = "the updates do not settle" if some else f"there is no update, or more than {MANY:,}"
            where = f"step_size={self.step_size!r}, each={self.each!r}"
            raise ConfigError("SOLVER", where, cause, "Give a step_size between 0 and 2, and each of at least 1")

    @property
    def calls(self) -> int:
        return self.each

    @property
    def draws(self) -> int:
        return self.each

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        require_signal(levels, "annealed_langevin")
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        to_data = s.sigma == 0
        at = NoiseLevel(*(torch.where(to_data, a, b) for a, b in zip(t[:4], s[:4], strict=True)))  # type: ignore[arg-type]
        size = like(self.step_size * at.sigma**2, x_t)
        x = clean = like(at.alpha / t.alpha, x_t) * x_t
        for z in noise:
            prediction = denoise(x, at)
            x, clean = langevin(x, predicted(prediction, at), size, z), prediction.x
        return torch.where(like(to_data, x_t).bool(), clean, x), state

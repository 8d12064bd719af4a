# pyright: reportIncompatibleVariableOverride=false
"""Samples of a distribution multiplied by a factor: inpainting, denoising [SohlDickstein15 §2.5]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.gaussian import Gaussian, Variance, forward, reverse
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.sampling.solvers.solver import MAX_CALLS_PER_STEP, Solver, State

Factor = Callable[[NoiseLevel], Gaussian]
"""r_s as a function of the level s: a Gaussian that broadcasts to x, where ``log_var`` = inf stands for r = 1."""


def unit_factor(level: NoiseLevel) -> Gaussian:
    """r = 1: the distribution as it is."""
    return Gaussian(torch.zeros(()), torch.tensor(math.inf))


def observation_factor(y: Tensor, log_var: Tensor) -> Factor:
    """r_s = N(alpha_s y, alpha_s² exp(log_var) + sigma_s²): y = x + noise, carried to the level s.

    ``y`` and ``log_var`` broadcast to x; ``log_var`` = −inf where y is x itself, inf where x is not observed (``y`` is
    not read there). At t = 0 sigma counts as 0, because the observation is of the data.
    """
    y = torch.where(log_var == math.inf, 0, y)

    def factor(level: NoiseLevel) -> Gaussian:
        at = level.broadcast_like(y)
        noise = torch.where(at.t > 0, 2 * torch.log(at.sigma), -math.inf)
        return Gaussian(at.alpha * y, torch.logaddexp(2 * torch.log(at.alpha) + log_var, noise))

    return factor


def inpainting_factor(y: Tensor, mask: Tensor) -> Factor:
    """r_s = N(alpha_s y, sigma_s²) where ``mask`` is true, 1 elsewhere: the factor of inpainting.

    ``y``, in the units of x, and ``mask`` both broadcast to x. Where ``mask`` is true the sample equals y.
    """
    return observation_factor(y, torch.where(mask, -math.inf, math.inf).to(y))


@dataclass(frozen=True)
class Product(Solver):
    """x_s ~ p(x_s given x_t) r_s(x_s)/Z, the reverse step times ``factor(s)``; its mean where sigma_s is 0.

    With r_s(x_s) = p(y given x_s) it is p(x_s given x_t, y) itself. `inpainting_factor` and `observation_factor` are
    not that factor: they relate each element of x_s to the observation of that element alone, so one pass is biased
    for any number of steps. ``repeats`` > 1 returns to x_t by q(x_t given x_s) and steps down again, which is Gibbs
    sampling of q(x_s) q(x_t given x_s) r_s(x_s): with more repeats the distribution of x_s tends to q(x_s) r_s(x_s)/Z
    [Lugmayr22 alg. 1, with another step down]. ``variance`` as in `Ancestral`. Without a factor it is `Ancestral`, so
    `SOLVERS` has no row for it.
    """

    factor: Factor = unit_factor
    variance: Variance = "small"
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= MAX_CALLS_PER_STEP:
            cause = f"it must be from 1 to {MAX_CALLS_PER_STEP:,}"
            raise ConfigError("SOLVER", f"repeats = {self.repeats}", cause, "Give a number such as 10")

    @property
    def calls(self) -> int:
        return self.repeats

    @property
    def noises_per_step(self) -> int:
        return 2 * self.repeats - 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        x_s = self._down(denoise, x_t, t, s, noise[0])
        for up, down in zip(noise[1::2], noise[2::2], strict=True):
            x_s = self._down(denoise, forward(x_s, s, t).sample(up), t, s, down)
        return x_s, state

    def _down(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor) -> Tensor:
        model = reverse(denoise(x_t, t, next_level=s), x_t, t, s, self.variance)
        (mean, log_var), _ = model.times(Gaussian(*(part.to(model.mean) for part in self.factor(s))))
        return mean + torch.exp(0.5 * log_var) * broadcast_like(s.sigma > 0, x_t) * noise

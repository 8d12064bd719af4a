"""Samples of a distribution multiplied with another: inpainting, denoising [SohlDickstein15 §2.5]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.gaussian import Gaussian, Variance, forward, reverse
from undiffuse.process.level import NoiseLevel, like
from undiffuse.solvers.solver import MANY, State

Factor = Callable[[NoiseLevel], Gaussian]
"""r_s as a function of the level s: a Gaussian that broadcasts to x, where ``log_var`` = inf stands for r = 1."""


def nothing(level: NoiseLevel) -> Gaussian:
    """r = 1: the distribution as it is."""
    return Gaussian(torch.zeros(()), torch.tensor(math.inf))


def observed(y: Tensor, log_var: Tensor) -> Factor:
    """r_s = N(alpha_s y, alpha_s² exp(log_var) + sigma_s²): y = x + noise, carried to the level s.

    ``y`` and ``log_var`` broadcast to x; ``log_var`` = −inf where y is x itself, inf where nothing is known
    of x (there ``y`` is not read). At t = 0 sigma counts as 0: what is known of the data is known there.
    """
    y = torch.where(log_var == math.inf, 0, y)

    def factor(level: NoiseLevel) -> Gaussian:
        at = level.like(y)
        noise = torch.where(at.t > 0, 2 * torch.log(at.sigma), -math.inf)
        return Gaussian(at.alpha * y, torch.logaddexp(2 * torch.log(at.alpha) + log_var, noise))

    return factor


def known(y: Tensor, mask: Tensor) -> Factor:
    """r_s = N(alpha_s y, sigma_s²) where ``mask`` is true, 1 elsewhere: the factor of inpainting.

    ``y`` in the codec's units and ``mask``, both broadcasting to x. A known number comes out as y itself.
    """
    return observed(y, torch.where(mask, -math.inf, math.inf).to(y))


@dataclass(frozen=True)
class Product:
    """x_s ~ p(x_s given x_t) r_s(x_s)/Z, the reverse step times ``factor(s)``; its mean where sigma_s is 0.

    With r_s(x_s) = p(y given x_s) it is p(x_s given x_t, y) itself. `known` and `observed` are not that factor:
    they say of each number what is seen of that number alone, so one pass is biased however many its steps.
    ``repeats`` > 1 goes back to x_t by q(x_t given x_s) and down again, which is Gibbs sampling of
    q(x_s) q(x_t given x_s) r_s(x_s): as they grow, x_s gets the law q(x_s) r_s(x_s)/Z [Lugmayr22 alg. 1, whose
    step down is another]. ``variance`` as in `Ancestral`.
    """

    factor: Factor = nothing
    variance: Variance = "small"
    repeats: int = 1
    order: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= MANY:
            cause = f"a step is made once or more, and not more than {MANY:,} times"
            raise ConfigError("SOLVER", f"repeats = {self.repeats}", cause, "Give a number such as 10")

    @property
    def calls(self) -> int:
        return self.repeats

    @property
    def draws(self) -> int:
        return 2 * self.repeats - 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        x_s = self._down(denoise, x_t, t, s, noise[0])
        for up, down in zip(noise[1::2], noise[2::2], strict=True):
            x_s = self._down(denoise, forward(x_s, s, t).sample(up), t, s, down)
        return x_s, state

    def _down(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, noise: Tensor) -> Tensor:
        model = reverse(denoise(x_t, t, to=s), x_t, t, s, self.variance)
        (mean, log_var), _ = model.times(Gaussian(*(part.to(model.mean) for part in self.factor(s))))
        return mean + torch.exp(0.5 * log_var) * like(s.sigma > 0, x_t) * noise

# pyright: reportIncompatibleVariableOverride=false
"""EDM's stochastic sampler: add a little noise, then take a step of Heun's method down [Karras22 alg. 2]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import finite_ends
from undiffuse.sampling.solvers.runge_kutta import RungeKutta, level_at_ratio, noise_to_signal
from undiffuse.sampling.solvers.solver import Solver, State

HEUN = RungeKutta("heun", "ratio", end="low")
MAX_CHURN = math.sqrt(2) - 1
"""Largest c: with u' = √2 u the fresh noise is as large as the noise that was there."""


@dataclass(frozen=True)
class EDM(Solver):
    """x_s by Heun's method from x_t' = (alpha'/alpha) x_t + alpha' inflation √(u'² − u²) z, u' = (1 + c) u.

    u = sigma/alpha is the paper's sigma, and c = min(``churn``/steps, √2 − 1) where ``low`` ≤ u ≤ ``high``, else 0;
    their S_churn, S_min, S_max and S_noise are ours in this order. c is less where u' would pass the noisiest level,
    see `finite_ends`. Without churn it is Heun's method. If ``inflation`` is not 1, the samples do not converge to the
    distribution of the data, and there is no order. The defaults are the paper's for ImageNet. Raises `ConfigError`.
    """

    churn: float = 40.0
    low: float = 0.05
    high: float = 50.0
    inflation: float = 1.003
    calls: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and 0 <= self.low <= self.high and 0 < self.inflation <= 2):
            where = f"churn = {self.churn:g}, low = {self.low:g}, high = {self.high:g}, inflation = {self.inflation:g}"
            fix = "Give churn of at least 0, low of at most high, and an inflation near 1, at most 2"
            raise ConfigError("SOLVER", where, "these settings are out of range", fix)

    @property
    def order(self) -> int | None:
        return 2 if self.churn == 0 or self.inflation == 1 else None

    @property
    def noises_per_step(self) -> int:
        return 0 if self.churn == 0 else 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """(number of steps,)"""
        return (len(levels) - 1,)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        u, schedule = noise_to_signal(t), denoise.schedule
        if self.churn and bool((u >= self.low) & (u <= self.high)):
            highest = noise_to_signal(finite_ends(schedule)[0])
            raised = torch.minimum((1 + min(self.churn / state[0], MAX_CHURN)) * u, highest)
            if bool(raised > u):
                up = level_at_ratio(schedule, raised)
                fresh = broadcast_like(up.alpha * self.inflation * torch.sqrt(raised**2 - u**2), x_t) * noise[0]
                x_t, t = broadcast_like(up.alpha / t.alpha, x_t) * x_t + fresh, up
        return HEUN.step(denoise, x_t, t, s, (), noise)[0], state

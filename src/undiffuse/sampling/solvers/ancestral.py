"""Ancestral sampling: the reverse chain itself [Ho20 algorithm 2], and with a classifier [Dhariwal21 algorithm 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.denoising.guidance import LogProb, check_scale, classifier_gradient
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import Gaussian, Variance, reverse
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class Ancestral(Solver):
    """x_s ~ p(x_s given x_t), the same `reverse` as in the bound; no noise where sigma_s is 0.

    ``variance`` is ``"small"``, ``"large"``, ``"learned"`` or a function of (t, s); see `reverse`.
    """

    variance: Variance = "small"
    order: ClassVar[int | None] = 1
    noises_per_step: ClassVar[int] = 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        mean, log_var = self.transition(denoise, x_t, t, s)
        std = torch.exp(0.5 * log_var) * broadcast_like(s.sigma > 0, x_t)
        return mean + std * noise[0], state

    def transition(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        """p(x_s given x_t)."""
        return reverse(denoise(x_t, t, next_level=s), x_t, t, s, self.variance)


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidedAncestral(Ancestral):
    """x_s ~ N(μ + scale Σ ∇log p(cond|x_t), Σ), with μ and Σ of `Ancestral` [Dhariwal21 algorithm 1].

    ``log_prob`` as in `ClassifierGuided`, the score form, from which a step differs by
    scale (Σ − (alpha_s/alpha_t) sigma_t² frac) ∇log p: the shifts agree to first order in the step, maths.md (109). No
    clamp of x̂ limits this shift, unlike that of the score form. Raises `ConfigError`.
    """

    log_prob: LogProb
    cond: Condition
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def transition(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        mean, log_var = super().transition(denoise, x_t, t, s)
        gradient = classifier_gradient(self.log_prob, x_t, t, self.cond)
        return Gaussian(mean + self.scale * torch.exp(log_var) * gradient, log_var)

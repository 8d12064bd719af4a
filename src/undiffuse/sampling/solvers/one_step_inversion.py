"""One-step inversion: the forward step solved for its start, with an estimate of that step's noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like, transition_frac
from undiffuse.sampling.solvers.solver import Solver, State, require_signal


def invert(x_t: Tensor, step_eps: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """x_s = (alpha_s/alpha_t)(x_t − sigma_t √frac step_eps), for the noise ``step_eps`` of q(x_t given x_s).

    In a table (x_t − √beta eps_t)/√(1 − beta): the inverse of a draw from `process.gaussian.forward`. The noise between
    x and x_t is a different one; see `step_noise`.
    """
    back = broadcast_like(s.alpha / t.alpha, x_t)
    return back * (x_t - broadcast_like(t.sigma * torch.sqrt(transition_frac(t, s)), x_t) * step_eps)


def step_noise(eps: Tensor, t: NoiseLevel, s: NoiseLevel, z: Tensor | None = None) -> Tensor:
    """√frac eps + √(1 − frac) z: the noise of the step from s to t, given x_t = alpha_t x + sigma_t eps.

    Without ``z`` its mean; for eps = ε̂ that is E[eps_t given x_t]. In a table frac = beta/(1 − alpha_bar).
    """
    frac = transition_frac(t, s)
    mean = broadcast_like(torch.sqrt(frac), eps) * eps
    return mean if z is None else mean + broadcast_like(torch.sqrt(1 - frac), eps) * z


@dataclass(frozen=True)
class OneStepInversion(Solver):
    """x_s = invert(x_t, E[eps_t given x_t]): a chain of posterior means without noise, for comparison.

    ``form="printed"`` uses ε̂ itself as the noise of the one step, as if both were the same. Neither form is a sampler,
    so `SOLVERS` has no row for it: ``scaled`` ends in E[x given x_T] for any number of steps, ``printed`` in less. With
    noise, ``invert(x_t, step_noise(ε̂, t, s, z), t, s)``, it is `Ancestral` with the small variance.
    """

    form: str = "scaled"

    def __post_init__(self) -> None:
        if self.form not in ("scaled", "printed"):
            raise ConfigError("SOLVER", f"form={self.form!r}", "unknown", "Use 'scaled' or 'printed'")

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        require_signal(levels, "inversion")
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        eps = denoise(x_t, t, next_level=s).eps
        return invert(x_t, eps if self.form == "printed" else step_noise(eps, t, s), t, s), state

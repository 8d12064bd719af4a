"""One-step inversion: the forward step solved for its start, with a guess of that step's noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, frac, like
from undiffuse.solvers.solver import State


def invert(x_t: Tensor, step_eps: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """x_s = (alpha_s/alpha_t)(x_t − sigma_t √frac step_eps), for the noise ``step_eps`` of q(x_t given x_s).

    In a table (x_t − √beta eps_t)/√(1 − beta): `process.gaussian.forward`, drawn and undone. The noise of
    the whole way from x is another one; see `step_noise`.
    """
    back = like(s.alpha / t.alpha, x_t)
    return back * (x_t - like(t.sigma * torch.sqrt(frac(t, s)), x_t) * step_eps)


def step_noise(eps: Tensor, t: NoiseLevel, s: NoiseLevel, z: Tensor | None = None) -> Tensor:
    """√frac eps + √(1 − frac) z: the noise of the step from s to t, given x_t = alpha_t x + sigma_t eps.

    Without ``z`` its mean; for eps = ε̂ that is E[eps_t given x_t]. In a table frac = beta/(1 − alpha_bar).
    """
    share = frac(t, s)
    mean = like(torch.sqrt(share), eps) * eps
    return mean if z is None else mean + like(torch.sqrt(1 - share), eps) * z


@dataclass(frozen=True)
class Inversion:
    """x_s = invert(x_t, E[eps_t given x_t]): a chain of posterior means without noise, for comparison.

    ``form="printed"`` takes ε̂ itself for the noise of the one step, as if both were the same. Neither is a
    sampler: ``scaled`` ends in E[x given x_T] whatever the number of steps, ``printed`` in less. With noise,
    ``invert(x_t, step_noise(ε̂, t, s, z), t, s)``, it is `Ancestral` with the small variance.
    """

    form: str = "scaled"
    order: int | None = field(default=None, init=False, repr=False)
    calls: int = field(default=1, init=False, repr=False)
    draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.form not in ("scaled", "printed"):
            raise ConfigError("SOLVER", f"form={self.form!r}", "unknown", "Use 'scaled' or 'printed'")

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        require_signal(levels, "inversion")
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        eps = denoise(x_t, t, to=s).eps
        return invert(x_t, eps if self.form == "printed" else step_noise(eps, t, s), t, s), state


def require_signal(levels: list[NoiseLevel], name: str) -> None:
    """Raises `ConfigError` where a chain begins at alpha = 0, by which the solver ``name`` would divide."""
    if float(levels[0].alpha) == 0:
        cause = "it divides by the scale of the signal, and the schedule begins without any (zero-terminal SNR)"
        raise ConfigError("SOLVER", f"solver {name!r}", cause, "Use 'ddim' or 'ancestral'")

"""What a solver is: one pure step between two noise levels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel

State = tuple[Any, ...]
"""What a solver carries from step to step: tensors of x's shape and `NoiseLevel`s, never mutated."""


MAX_CALLS_PER_STEP = 10_000
"""Most network calls in one step; a setting that asks for more is taken for a mistake."""


class Solver:
    """Base of all solvers. A subclass declares its facts as class variables, or as properties of its settings.

    ``order`` of convergence (strong if it draws no noise, else weak; None: none), network ``calls`` in a step, and
    ``noises_per_step``, the noise tensors that a step reads.
    """

    order: ClassVar[int | None] = None
    calls: ClassVar[int] = 1
    noises_per_step: ClassVar[int] = 0

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """The state before the first step: empty by default. Raises `ConfigError` for levels that do not suit."""
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        """(x_s, state) from ``x_t`` (B, ...) with ``noise`` (noises_per_step, B, ...)."""
        raise NotImplementedError


def is_finite_step(t: NoiseLevel, s: NoiseLevel) -> bool:
    """Whether log-SNR is finite at both levels: alpha_t > 0 and sigma_s > 0."""
    return bool(torch.logical_and(t.alpha > 0, s.sigma > 0))


def require_signal(levels: list[NoiseLevel], name: str) -> None:
    """Raises `ConfigError` if the first level has alpha = 0, by which the solver ``name`` would divide."""
    if float(levels[0].alpha) == 0:
        cause = "it divides by alpha, and the schedule starts at alpha = 0 (zero-terminal SNR)"
        raise ConfigError("SOLVER", f"solver {name!r}", cause, "Use 'ddim' or 'ancestral'")

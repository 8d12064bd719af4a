"""What a solver is: one pure step between two noise levels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.schedule import MIN_LOG_SNR, Schedule

State = tuple[Any, ...]
"""What a solver carries from step to step: tensors of x's shape and `NoiseLevel`s, never mutated."""


MAX_CALLS_PER_STEP = 10_000
"""Most network calls in one step; a setting that asks for more is taken for a mistake."""


class Solver:
    """Base of all solvers. A subclass declares its facts as class variables, or as properties of its settings.

    ``order`` of convergence between levels of finite log-SNR (strong if it draws no noise, else weak; None: none), see
    also `order_on`; network ``calls`` in a step; ``noises_per_step``, the noise tensors that a step reads; and
    ``needs_float32``, whether rounding in the network to bfloat16 would be larger than its tolerance.
    """

    order: ClassVar[int | None] = None
    calls: ClassVar[int] = 1
    noises_per_step: ClassVar[int] = 0
    needs_float32: ClassVar[bool] = False

    def order_on(self, schedule: Schedule, at_data: bool = False) -> int | None:
        """The order on levels that are equally spaced in t from 1 to 0, with both ends of ``schedule``.

        A solver that ends with DDIM's step into data has at most the order of that step, see `end_power`. ``at_data``:
        the denoiser `predicts_at_data`, which some solvers use.
        """
        return None if self.order is None else int(min(self.order, end_power(schedule)))

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


@torch.no_grad()
def end_power(schedule: Schedule) -> float:
    """p where sigma² ~ t^p at t = 0 or alpha² ~ (1 − t)^p at t = 1, the smaller one; inf if both are above 0.

    The error of a DDIM step into data is of the order of sigma² at its start, and that of one out of pure noise of
    alpha² at its end. In a long table of beta sigma² ~ t.
    """
    if schedule.chain_length is not None:
        return 1.0
    h, powers = 1e-3, [math.inf]
    if float(schedule(0.0).sigma) == 0:
        powers.append(_power(schedule(h).sigma, schedule(2 * h).sigma))
    if float(schedule(1.0).log_snr) < MIN_LOG_SNR:
        powers.append(_power(schedule(1 - h).alpha, schedule(1 - 2 * h).alpha))
    return min(powers)


def _power(near: Tensor, far: Tensor) -> float:
    """p of a square that grows like distance^p, from its root at one and at two units of distance."""
    return round(2 * math.log2(float(far / near)))


def require_signal(levels: list[NoiseLevel], name: str) -> None:
    """Raises `ConfigError` if the first level has alpha = 0, by which the solver ``name`` would divide."""
    if float(levels[0].alpha) == 0:
        cause = "it divides by alpha, and the schedule starts at alpha = 0 (zero-terminal SNR)"
        raise ConfigError("SOLVER", f"solver {name!r}", cause, "Use 'ddim' or 'ancestral'")

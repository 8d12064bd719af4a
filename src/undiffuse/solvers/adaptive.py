"""The probability flow within a tolerance: as many steps as each item needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.likelihood.integrate import Integrator, clock, log_snr_at
from undiffuse.process.level import NoiseLevel, like
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class Adaptive:
    """x_s by Dormand and Prince's pair of orders 5 and 4 from t to s, in x_t/√(alpha² + sigma²) [Dormand80].

    ``rtol`` and ``atol`` are of that quantity and of each inner step, see `Integrator`; the fewer the grid's steps the
    better. Each item has inner steps of its own. The denoiser is called with the whole batch all the same, each item
    at its own level, since what wraps it may know the batch; one that has arrived is asked again in vain. What is
    remembered is how many calls each item took in each step, (B,). A step into data goes to t_min first, and one out
    of a table's last level without signal to the level before; the rest of it is DDIM's. ``calls`` is the least.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000
    order: int | None = field(default=None, init=False, repr=False)
    calls: int = field(default=7, init=False, repr=False)
    draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._integrator()

    def _integrator(self) -> Integrator:
        return Integrator(rtol=self.rtol, atol=self.atol, max_calls=self.max_calls)

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        schedule, x, calls = denoise.schedule, x_t, torch.zeros(len(x_t), dtype=torch.int64)
        first, last = t, s
        if schedule.steps and bool(t.alpha == 0):
            first = schedule(torch.maximum(s.t, torch.ones_like(s.t) - 1 / schedule.steps))
            x, calls = DDIM().step(denoise, x, t, first, (), noise)[0], calls + 1
        if bool(s.sigma == 0):
            last = schedule(torch.clamp(first.t, max=schedule.t_min))
        if bool(last.t < first.t):
            x, spent = self._carry(denoise, x, first, last)
            calls = calls + spent
        if bool(s.t < last.t):
            x, calls = DDIM().step(denoise, x, last, s, (), noise)[0], calls + 1
        return x, (*state, calls)

    def _carry(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> tuple[Tensor, Tensor]:
        """(x_s, calls of each item): with r² = alpha² + sigma², d(x/r)/dv = (sigma/r)((sigma/r) x̂ − (alpha/r) ε̂).

        v = asinh(alpha/sigma) is the `clock` of `integrate`, run backwards. The integrator's last column is not used.
        """
        y = x_t.to(torch.promote_types(x_t.dtype, torch.float32)).flatten(1) / like(_radius(t), x_t.flatten(1))
        y = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
        start, end = (-float(clock(level.log_snr.detach())) for level in (t, s))
        places, clocks = y.clone(), torch.full((len(y),), start, dtype=torch.float64)

        def rate(items: Tensor, v: Tensor, y: Tensor) -> Tensor:
            places[items], clocks[items] = y, v
            level = denoise.schedule(denoise.schedule.inverse(log_snr_at(-clocks)))
            at, r = level.like(x_t), like(_radius(level), x_t)
            x, eps, _ = denoise((r * places[:, :-1].reshape(x_t.shape)).to(x_t.dtype), level)
            move = at.sigma / r * (at.sigma / r * x - at.alpha / r * eps)
            return torch.cat([move.flatten(1), torch.zeros_like(places[:, :1])], 1)[items]

        y, calls = self._integrator()(rate, y, start, end)
        return like(_radius(s), x_t) * y[:, :-1].reshape(x_t.shape), calls


def _radius(level: NoiseLevel) -> Tensor:
    return torch.hypot(level.alpha, level.sigma)

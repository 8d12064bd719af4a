"""The probability flow within a tolerance: each item takes as many steps as it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.ode_integrator import Integrator, flow_time, flow_velocity, log_snr_at_flow_time, radius
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class Adaptive(Solver):
    """x_s by Dormand and Prince's pair of orders 5 and 4 from t to s, in x_t/√(alpha² + sigma²) [Dormand80].

    ``rtol`` and ``atol`` apply to that quantity and to each inner step, see `Integrator`; the fewer steps the grid has,
    the better. Each item has its own inner steps. The denoiser always gets the full batch, each item at its own level,
    because wrappers (guidance, conditions) may hold per-batch state; finished items are evaluated and discarded. The
    state is the number of calls of each item in each step, (B,). A step into data stops at t_min, and one out of a
    table's last level without signal starts at the level before; DDIM does the rest. ``calls`` is the minimum.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000
    calls: ClassVar[int] = 7
    needs_float32: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._integrator()

    def _integrator(self) -> Integrator:
        return Integrator(rtol=self.rtol, atol=self.atol, max_calls=self.max_calls)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        schedule, x, calls = denoise.schedule, x_t, torch.zeros(len(x_t), dtype=torch.int64)
        first, last = t, s
        if schedule.chain_length and bool(t.alpha == 0):
            first = schedule(torch.maximum(s.t, torch.ones_like(s.t) - 1 / schedule.chain_length))
            x, calls = DDIM().step(denoise, x, t, first, (), noise)[0], calls + 1
        if bool(s.sigma == 0):
            last = schedule(torch.clamp(first.t, max=schedule.t_min))
        if bool(last.t < first.t):
            x, inner_calls = self._integrate(denoise, x, first, last)
            calls = calls + inner_calls
        if bool(s.t < last.t):
            x, calls = DDIM().step(denoise, x, last, s, (), noise)[0], calls + 1
        return x, (*state, calls)

    def _integrate(self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> tuple[Tensor, Tensor]:
        """(x_s, calls of each item) by `flow_velocity` in v = asinh(alpha/sigma), `flow_time` with the opposite sign.

        The integrator's last column is not used.
        """
        y = x_t.to(torch.promote_types(x_t.dtype, torch.float32)).flatten(1) / broadcast_like(radius(t), x_t.flatten(1))
        y = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
        start, end = (-float(flow_time(level.log_snr.detach())) for level in (t, s))
        all_y, all_v = y.clone(), torch.full((len(y),), start, dtype=torch.float64)

        def derivative(items: Tensor, v: Tensor, y: Tensor) -> Tensor:
            all_y[items], all_v[items] = y, v
            level = denoise.schedule(denoise.schedule.inverse(log_snr_at_flow_time(-all_v)))
            r = broadcast_like(radius(level), x_t)
            x, eps, _ = denoise((r * all_y[:, :-1].reshape(x_t.shape)).to(x_t.dtype), level)
            rate = -flow_velocity(x, eps, level)
            return torch.cat([rate.flatten(1), torch.zeros_like(all_y[:, :1])], 1)[items]

        y, calls = self._integrator()(derivative, y, start, end)
        return broadcast_like(radius(s), x_t) * y[:, :-1].reshape(x_t.shape), calls

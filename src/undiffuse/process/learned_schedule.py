"""A learned schedule: log_snr falls along a monotone curve whose shape and ends are parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, as_float64, check_ascending, check_time, vp_level


class LearnedSchedule(nn.Module):
    """log_snr = high + (low − high) m(t), m = Σ p_j g_j(t), m(0) = 0, m(1) = 1, variance preserving [VDM21 app. H].

    A one-layer network with positive weights p_j: the units g_j are ``width`` smooth ramps, each over its interval of
    [0, 1], and add up to a straight line, so that the equal weights of the start are exactly the linear schedule.
    ``ends`` are ``"learned"`` or ``"fixed"``. Results are differentiable in the parameters, which stay float64 on the
    CPU when the model is cast or moved. Raises `ConfigError`.
    """

    chain_length = None
    t_min = 0.0

    def __init__(self, high: float = 13.3, low: float = -5.0, ends: str = "learned", width: int = 32) -> None:
        super().__init__()
        check_ascending(low, high, "low", "high")
        if ends not in ("learned", "fixed"):
            raise ConfigError("SCHEDULE", f"ends = {ends!r}", "unknown", "Use 'learned' or 'fixed'")
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 4096:
            raise ConfigError("SCHEDULE", f"width = {width!r}", "not a whole number from 1 to 4096", "Change the width")
        self.width, self.learns_ends = width, ends == "learned"
        self.high, self.low = (nn.Parameter(end) if self.learns_ends else end for end in map(as_float64, (high, low)))
        self.log_slopes = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedSchedule:
        """Itself, unchanged by ``.to``, ``.cuda`` and ``.bfloat16`` of the model."""
        return self

    def forward(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        return self.levels_from_shape(t, *self.shape(t))[0]

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m, dm/dt) of ``t``'s shape: everything that depends on the parameters of the shape."""
        ramps, slopes = self._units(t)
        weight = torch.exp(self.log_slopes)
        total = self._units(torch.ones((), dtype=torch.float64))[0] @ weight
        return (ramps @ weight) / total, (slopes @ weight) / total

    def levels_from_shape(self, t: Tensor, m: Tensor, slope: Tensor) -> tuple[NoiseLevel, Tensor]:
        """The levels and d log_snr / dt for the values of `shape`."""
        fall = self.low - self.high
        return vp_level(t, self.high + fall * m), fall * slope

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        t = check_time(t)
        return self.levels_from_shape(t, *self.shape(t))[1]

    @torch.no_grad()
    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The t of this ``log_snr``, detached, by bisection of [0, 1] to float64 precision."""
        goal = (as_float64(log_snr) - self.high) / (self.low - self.high)
        low, high = torch.zeros_like(goal), torch.ones_like(goal)
        for _ in range(54):
            middle = (low + high) / 2
            below = self.shape(middle)[0] < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def _units(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(g_j(t), dg_j/dt), each (*t.shape, width): dg_j/dt = p(e_j) − p(e_{j+1}) for edges e_j = (j − 1)/width.

        p(e) = sigmoid(k(t − e)) with k = 4 width, except p(0) = 1 and p(1) = 0.
        """
        k = 4.0 * self.width
        z = k * (t[..., None] - torch.arange(1, self.width, dtype=torch.float64) / self.width)
        passed = torch.sigmoid(z)
        since = (logsigmoid(-(z - k * t[..., None])) - logsigmoid(-z)) / k
        edges = [torch.ones_like(t)[..., None], passed, torch.zeros_like(t)[..., None]]
        lengths = [t[..., None], since, torch.zeros_like(t)[..., None]]
        return -torch.cat(lengths, -1).diff(dim=-1), -torch.cat(edges, -1).diff(dim=-1)

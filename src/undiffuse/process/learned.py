"""A schedule that is learned: log_snr falls along a monotone curve whose shape, and ends, are parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, descending, double, preserving, time_of


class Learned(nn.Module):
    """log_snr = high + (low − high) m(t), m = Σ p_j g_j(t), m(0) = 0, m(1) = 1, variance preserving [VDM21 app. H].

    A network of one layer with positive weights: the units g_j are ``width`` smooth ramps side by side, each
    over its share of [0, 1], which add up to a straight line; so equal weights are exactly the linear
    schedule, where it starts. ``ends`` are ``"learned"`` or ``"fixed"``. What depends on parameters is
    in their graph. They are float64 on the CPU whatever the model is cast or moved to. Raises `ConfigError`.
    """

    steps = None
    t_min = 0.0

    def __init__(self, high: float = 13.3, low: float = -5.0, ends: str = "learned", width: int = 32) -> None:
        super().__init__()
        descending(low, high, "low", "high")
        if ends not in ("learned", "fixed"):
            raise ConfigError("SCHEDULE", f"ends = {ends!r}", "unknown", "Use 'learned' or 'fixed'")
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 4096:
            raise ConfigError("SCHEDULE", f"width = {width!r}", "no whole number from 1 to 4096", "Choose such a width")
        self.width, self.learns_ends = width, ends == "learned"
        self.high, self.low = (nn.Parameter(end) if self.learns_ends else end for end in map(double, (high, low)))
        self.log_share = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learned:
        """Itself: the model's ``.to``, ``.cuda`` and ``.bfloat16`` pass it by."""
        return self

    def forward(self, t: Tensor | float) -> NoiseLevel:
        t = time_of(t)
        return self.bend(t, *self.curve(t))[0]

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m, dm/dt) of ``t``'s shape, all that the shape's parameters have a say in."""
        ramps, slopes = self._units(t)
        weight = torch.exp(self.log_share)
        whole = self._units(torch.ones((), dtype=torch.float64))[0] @ weight
        return (ramps @ weight) / whole, (slopes @ weight) / whole

    def bend(self, t: Tensor, m: Tensor, slope: Tensor) -> tuple[NoiseLevel, Tensor]:
        """The levels, and d log_snr / dt, of a `curve`."""
        fall = self.low - self.high
        return preserving(t, self.high + fall * m), fall * slope

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        t = time_of(t)
        return self.bend(t, *self.curve(t))[1]

    @torch.no_grad()
    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The t of this ``log_snr``, outside the graph, by halving [0, 1] until it has no more doubles."""
        goal = (double(log_snr) - self.high) / (self.low - self.high)
        low, high = torch.zeros_like(goal), torch.ones_like(goal)
        for _ in range(54):
            middle = (low + high) / 2
            below = self.curve(middle)[0] < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def _units(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(g_j(t), dg_j/dt), (*t.shape, width): a unit rises where its left edge is passed and its right one not yet.

        Passing an edge e is sigmoid(k(t − e)), k = 4 width; the edge at 0 is passed everywhere, that at 1 nowhere.
        """
        k = 4.0 * self.width
        z = k * (t[..., None] - torch.arange(1, self.width, dtype=torch.float64) / self.width)
        passed = torch.sigmoid(z)
        since = (logsigmoid(-(z - k * t[..., None])) - logsigmoid(-z)) / k
        edges = [torch.ones_like(t)[..., None], passed, torch.zeros_like(t)[..., None]]
        lengths = [t[..., None], since, torch.zeros_like(t)[..., None]]
        return -torch.cat(lengths, -1).diff(dim=-1), -torch.cat(edges, -1).diff(dim=-1)

"""Solvers with a mistake planted in them: what a wrong subscript costs, and a coefficient that is often printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from undiffuse.solvers import Multistep
from undiffuse.solvers.exponential import gap, moments


@dataclass(frozen=True)
class WrongSubscript(Multistep):
    """Takes x̂ of two levels before for that of one level before."""

    def step(self, denoise, x_t, t, s, state, noise):
        wrong = ((state[1][0], state[0][1]),) if len(state) == 2 else state
        x_s, known = super().step(denoise, x_t, t, s, wrong, noise)
        return x_s, (*known, *state[:1])


@dataclass(frozen=True)
class OtherThird(Multistep):
    """3M whose last term is ``times`` (H φ_3) the second divided difference in units of h; exact is 2.

    With M_2 = 2 H φ_3 it is added to ours as (times/2 − 1) M_2, and ``more`` besides.
    """

    points: int = 3
    rule: str = "bh2"
    start: str = "low"
    times: float = 1.0
    more: float = 0.0

    def step(self, denoise, x_t, t, s, state, noise):
        x_s, known = super().step(denoise, x_t, t, s, state, noise)
        h = gap(t, s)
        if len(state) < 2 or math.isinf(h):
            return x_s, known
        new, old, oldest = known[0][0], state[0][0], state[1][0]
        r, q = (-gap(t, at) / h for _, at in state)
        second = ((new - old) / r - (old - oldest) / (q - r)) / q
        off = (self.times / 2 - 1) * moments((1 + self.eta) * h, 3)[2] + self.more
        return x_s + float(s.alpha) * off * second, known

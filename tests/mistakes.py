"""Solvers with planted mistakes: a wrong subscript, and a coefficient that is often printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.exponential import half_log_snr_gap, moments


@dataclass(frozen=True)
class WrongSubscript(Multistep):
    """Uses x̂ of two levels before in place of that of one level before."""

    def step(self, denoise, x_t, t, s, state, noise):
        last, *known = state
        wrong = [(known[1][0], known[0][1])] if len(known) == 2 else known
        x_s, after = super().step(denoise, x_t, t, s, (last, *wrong), noise)
        return x_s, (*after, *known[:1])


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
        x_s, after = super().step(denoise, x_t, t, s, state, noise)
        h, (_, *known) = half_log_snr_gap(t, s), state
        if len(known) < 2 or math.isinf(h):
            return x_s, after
        new, old, oldest = after[1][0], known[0][0], known[1][0]
        r, q = (-half_log_snr_gap(t, at) / h for _, at in known)
        second = ((new - old) / r - (old - oldest) / (q - r)) / q
        off = (self.times / 2 - 1) * moments((1 + self.eta) * h, 3)[2] + self.more
        return x_s + float(s.alpha) * off * second, after

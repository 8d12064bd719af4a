"""The table of solvers: each with a reference written from its paper in NumPy, and the order it declares.

A reference is a plain function of a `Hand`: no levels, no schedules, no tensors of the package. On Gaussian data
every solver is an affine map, so `test_affine.py` compares both on basis vectors, without randomness, and
`test_order.py` measures every order. A solver is one row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import exponential_references as by_lambda
import numpy as np
from numpy import ndarray as Array

from undiffuse.process import schedule as S
from undiffuse.solvers import (
    DDIM,
    Ancestral,
    Multistep,
    Product,
    SingleStep,
    Solver,
    UniPC,
)


@dataclass(frozen=True)
class Process:
    """A noise process by formula: ``at(t)`` = (alpha, sigma), and ``kind`` says how they go with log-SNR."""

    schedule: S.Schedule
    at: Callable[[float], tuple[float, float]]
    kind: str  # "vp": alpha² + sigma² = 1; "ve": alpha = 1; "flow": alpha + sigma = 1

    def at_ratio(self, ratio: float) -> tuple[float, float]:
        """(alpha, sigma) where sigma/alpha is ``ratio``."""
        under = {"vp": math.hypot(1, ratio), "ve": 1.0, "flow": 1 + ratio}[self.kind]
        return 1 / under, ratio / under


def table(beta: Array) -> Callable[[float], tuple[float, float]]:
    log_bar = np.concatenate(
        [[0.0], np.cumsum(np.log1p(-beta[:-1])), [np.log1p(-beta).sum() if beta[-1] < 1 else -np.inf]]
    )

    def at(t: float) -> tuple[float, float]:
        k = t * len(beta)
        k = round(k) if abs(k - round(k)) < 1e-9 else k
        low, high = log_bar[math.floor(k)], log_bar[math.ceil(k)]
        log_alpha_bar = low if low == high else low + (k - math.floor(k)) * (high - low)
        return math.exp(0.5 * log_alpha_bar), math.sqrt(-math.expm1(log_alpha_bar))

    return at


def by_log_snr(t: float) -> tuple[float, float]:
    odds = math.exp(13.3 - 18.3 * t)
    return math.sqrt(odds / (1 + odds)), math.sqrt(1 / (1 + odds))


PROCESSES = {
    "linear": Process(S.linear(), table(np.linspace(1e-4, 0.02, 1000)), "vp"),
    "zero terminal": Process(S.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0]), table(np.array([0.1, 0.2, 0.3, 0.5, 1.0])), "vp"),
    "log-SNR": Process(S.LinearLogSNR(), by_log_snr, "vp"),
    "flow": Process(S.Flow(), lambda t: (1 - t, t), "flow"),
    "exploding": Process(S.VarianceExploding(), lambda t: (1.0, 0.01 * 5000**t), "ve"),
}


@dataclass(frozen=True)
class Hand:
    """What a reference is given: ``x`` (n, d) at times[0], ``noise`` (steps, draws, n, d), ``times`` falling.

    ``predict(x, alpha, sigma)`` is x̂ (n, d); ε̂ follows from x = alpha x̂ + sigma ε̂. ``nu`` is what the denoiser
    says of its variance.
    """

    x: Array
    noise: Array
    times: list[float]
    process: Process
    predict: Callable[[Array, float, float], Array]
    nu: float = 0.3

    @property
    def levels(self) -> list[tuple[float, float]]:
        return [self.process.at(t) for t in self.times]


Reference = Callable[[Hand], Array]


class Row(NamedTuple):
    """``solver`` against ``reference``; of ``order`` in strength (``draws`` = 0) or weakly; None has none.

    ``calls(steps)`` is how often it calls the denoiser on a chain with finite ends. ``signal``: it needs alpha > 0.
    """

    solver: Solver
    reference: Reference
    order: int | None
    draws: int = 0
    calls: Callable[[int], int] = lambda steps: steps
    signal: bool = False


def stepwise(step: Callable[..., Array]) -> Reference:
    """A reference of single steps: step(hand, x, z, (alpha_t, sigma_t), (alpha_s, sigma_s)) = x_s."""

    def reference(hand: Hand) -> Array:
        x, levels = hand.x, hand.levels
        for k in range(len(levels) - 1):
            x = step(hand, x, hand.noise[k], levels[k], levels[k + 1])
        return x

    return reference


def in_preserving(rule: Callable[..., tuple[float, float, float, float]]) -> Reference:
    """A step stated for alpha² + sigma² = 1, in units of r: (weights of x_t, x̂ and ε̂, std), from ᾱ_t and ᾱ_s."""

    def step(hand, x, z, t, s):
        (a_t, s_t), (a_s, s_s) = t, s
        r_t, r_s = math.hypot(a_t, s_t), math.hypot(a_s, s_s)
        bar_t, bar_s = (a_t / r_t) ** 2, (a_s / r_s) ** 2
        clean = hand.predict(x, a_t, s_t)
        eps = (x / r_t - math.sqrt(bar_t) * clean) / math.sqrt(1 - bar_t)
        on_x_t, on_x, on_eps, std = rule(bar_t, bar_s, r_t, r_s, hand.nu)
        out = on_x_t * x / r_t + on_x * clean + on_eps * eps
        return r_s * (out + std * z[0] if len(z) else out)

    return stepwise(step)


def ancestral(variance: str) -> Reference:
    def rule(bar_t, bar_s, r_t, r_s, nu):
        """Ho 2020 eq. 7 and §3.2."""
        beta = 1 - bar_t / bar_s
        small, large = beta * (1 - bar_s) / (1 - bar_t), beta * (r_t / r_s) ** 2
        with np.errstate(divide="ignore"):
            std = {
                "small": math.sqrt(small),
                "large": math.sqrt(large),
                "learned": math.exp(0.5 * (nu * np.log(large) + (1 - nu) * np.log(small))),
            }[variance]
        keep = math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t)
        return keep, math.sqrt(bar_s) * beta / (1 - bar_t), 0.0, 0.0 if bar_s == 1 else std

    return in_preserving(rule)


def ddim(eta: float) -> Reference:
    def rule(bar_t, bar_s, r_t, r_s, nu):
        """Song 2021 (DDIM) eq. 12 and 16."""
        fresh = eta**2 * (1 - bar_t / bar_s) / (1 - bar_t)  # their std² over 1 − ᾱ_s
        return 0.0, math.sqrt(bar_s), math.sqrt((1 - bar_s) * (1 - min(fresh, 1.0))), math.sqrt((1 - bar_s) * fresh)

    return in_preserving(rule)


ROWS: dict[str, Row] = {
    "ancestral small": Row(Ancestral(), ancestral("small"), 1, 1),
    "ancestral large": Row(Ancestral("large"), ancestral("large"), 1, 1),
    "ancestral learned": Row(Ancestral("learned"), ancestral("learned"), 1, 1),
    "ddim 0": Row(DDIM(), ddim(0.0), 1),
    "ddim 0.3": Row(DDIM(0.3), ddim(0.3), 1, 1),
    "ddim 1": Row(DDIM(eta=1.0), ddim(1.0), 1, 1),
    "dpm++ 2s": Row(SingleStep(2), by_lambda.single(2), 2, calls=lambda steps: 2 * steps),
    "dpm++ 3s": Row(SingleStep(3), by_lambda.single(3), 3, calls=lambda steps: 3 * steps),
    "dpm++ 2m": Row(Multistep(2, rule="bh2"), by_lambda.two_m, 2),
    "dpm++ 3m": Row(Multistep(3), by_lambda.adams(3), 3, calls=lambda steps: steps + 1),
    "dpm++ 2m sde": Row(Multistep(2, 1.0, "bh2"), by_lambda.two_m_sde, 2, 1),
    "exponential 1 sde": Row(Multistep(1, 0.4), by_lambda.adams(1, 0.4), 1, 1),
    "exponential 2 sde": Row(Multistep(2, 0.4), by_lambda.adams(2, 0.4), 2, 1),
    "exponential 2": Row(Multistep(2), by_lambda.adams(2), 2),
    "unipc 1": Row(UniPC(1), by_lambda.unipc(1, "bh2"), 2),
    "unipc 2": Row(UniPC(2), by_lambda.unipc(2, "bh2"), 3),
    "unipc 2 bh1": Row(UniPC(2, "bh1"), by_lambda.unipc(2, "bh1"), 3),
    "unipc 3": Row(UniPC(3), by_lambda.unipc(3, "bh2"), 4, calls=lambda steps: steps + 2),
    # those whose order shows late: test_exponential.py
    "exponential 4": Row(Multistep(4), by_lambda.adams(4), None, calls=lambda steps: steps + 2 * min(steps, 2)),
    "dpm++ 3m from low": Row(Multistep(3, start="low"), by_lambda.adams(3, low=True), None),
    "dpm++ 3m sde": Row(Multistep(3, 1.0), by_lambda.adams(3, 1.0), None, 1),
    "unipc 3 from low": Row(UniPC(3, "bh1", "low"), by_lambda.unipc(3, "bh1", True), None),
    "product": Row(Product(), ancestral("small"), None, 1),  # with a factor: test_product.py
}

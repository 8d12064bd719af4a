"""The table of solvers: each with a reference written from its paper in NumPy, and the order it declares.

A reference is a plain function of a `Hand`: no levels, no schedules, no tensors of the package. On Gaussian data
every solver is an affine map, so `test_affine.py` compares both on basis vectors, without randomness, and
`test_order.py` measures every order. A new solver adds one row here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import exponential_references as by_lambda
import numpy as np
from numpy import ndarray as Array

from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.consistency import ConsistencySampling
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.dpm_singlestep import SingleStep
from undiffuse.sampling.solvers.edm import EDM
from undiffuse.sampling.solvers.euler_maruyama import EulerMaruyama
from undiffuse.sampling.solvers.flow_map import FlowMapSampling
from undiffuse.sampling.solvers.langevin import AnnealedLangevin
from undiffuse.sampling.solvers.predictor_corrector import PredictorCorrector
from undiffuse.sampling.solvers.product import Product
from undiffuse.sampling.solvers.runge_kutta import RungeKutta
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.solvers.unipc import UniPC


@dataclass(frozen=True)
class Process:
    """A noise process by formula: ``at(t)`` = (alpha, sigma); ``kind`` is the relation of the two."""

    schedule: S.Schedule
    at: Callable[[float], tuple[float, float]]
    kind: str  # "vp": alpha² + sigma² = 1; "ve": alpha = 1; "flow": alpha + sigma = 1
    rates: Callable[[float], tuple[float, float]]  # (dalpha/dt, dsigma/dt), those of the step below where they jump

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


def table_rates(beta: Array) -> Callable[[float], tuple[float, float]]:
    """alpha = exp(½ log ᾱ), whose exponent is linear between the table's times, and sigma² = 1 − alpha²."""
    at = table(beta)

    def rates(t: float) -> tuple[float, float]:
        k = t * len(beta)
        slope = 0.5 * len(beta) * math.log1p(-beta[math.ceil(k - 1e-9) - 1])
        alpha, sigma = at(t)
        return slope * alpha, -slope * alpha**2 / sigma

    return rates


def by_log_snr(t: float) -> tuple[float, float]:
    odds = math.exp(13.3 - 18.3 * t)
    return math.sqrt(odds / (1 + odds)), math.sqrt(1 / (1 + odds))


def rates_by_log_snr(t: float) -> tuple[float, float]:
    alpha, sigma = by_log_snr(t)
    return -9.15 * alpha * sigma**2, 9.15 * alpha**2 * sigma


LINEAR, SHORT = np.linspace(1e-4, 0.02, 1000), np.array([0.1, 0.2, 0.3, 0.5, 1.0])
PROCESSES = {
    "linear": Process(DS.linear(), table(LINEAR), "vp", table_rates(LINEAR)),
    "zero terminal": Process(DS.Tabulated(SHORT.tolist()), table(SHORT), "vp", table_rates(SHORT)),
    "log-SNR": Process(S.LinearLogSNR(), by_log_snr, "vp", rates_by_log_snr),
    "flow": Process(S.Flow(), lambda t: (1 - t, t), "flow", lambda t: (-1.0, 1.0)),
    "exploding": Process(
        S.VarianceExploding(), lambda t: (1.0, 0.01 * 5000**t), "ve", lambda t: (0.0, 0.01 * 5000**t * math.log(5000))
    ),
}


@dataclass(frozen=True)
class Hand:
    """Arguments of a reference: ``x`` (n, d) at times[0], ``noise`` (steps, noises per step, n, d), falling ``times``.

    ``predict(x, alpha, sigma)`` is x̂ (n, d); ε̂ follows from x = alpha x̂ + sigma ε̂. ``var_interp`` is the variance that
    the denoiser predicts.
    """

    x: Array
    noise: Array
    times: list[float]
    process: Process
    predict: Callable[[Array, float, float], Array]
    var_interp: float = 0.3

    @property
    def levels(self) -> list[tuple[float, float]]:
        return [self.process.at(t) for t in self.times]


Reference = Callable[[Hand], Array]


class Row(NamedTuple):
    """``solver`` against ``reference``, with its ``order``: strong if it draws no noise, else weak; None for none.

    ``calls(steps)`` is how often it calls the denoiser on a chain with finite ends. ``signal``: it needs alpha > 0.
    ``finest``: by schedule, the steps at which its order shows if those are more than the 128 of `test_order.py`.
    ``name``: the name in `SOLVERS` that builds this very solver.
    """

    solver: Solver
    reference: Reference
    order: int | None
    noises_per_step: int = 0
    calls: Callable[[int], int] = lambda steps: steps
    signal: bool = False
    finest: Mapping[str, int] = {}
    name: str = ""


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
        on_x_t, on_x, on_eps, std = rule(bar_t, bar_s, r_t, r_s, hand.var_interp)
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


def by_ddim_at_the_ends(
    step: Callable[..., Array], regular: Callable[[Process, bool, bool], bool] = lambda process, noise, data: False
) -> Reference:
    """``step`` (which takes the times) between finite log-SNRs; else DDIM's, alpha_s x̂ + sigma_s ε̂.

    ``regular(process, noise, data)``: a step out of pure ``noise`` or into ``data`` is not DDIM's either.
    """

    def reference(hand: Hand) -> Array:
        x = hand.x
        for k, (t, s) in enumerate(pairwise(hand.times)):
            (a_t, s_t), (a_s, s_s) = hand.process.at(t), hand.process.at(s)
            if (a_t > 1e-14 and s_s > 0) or regular(hand.process, a_t < 1e-14, s_s == 0):
                x = step(hand, x, hand.noise[k], t, s)
            else:
                clean = hand.predict(x, a_t, s_t)
                x = a_s * clean + s_s * (x - a_t * clean) / s_t
        return x

    return reference


def flow_in(variable: str, hand: Hand) -> tuple[Callable, Callable, Callable]:
    """(u of a time, the divisor of x_t there, dy/du as a function of (u, y)) of the probability flow."""
    process = hand.process

    def split(x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
        clean = hand.predict(x, alpha, sigma)
        return clean, (x - alpha * clean) / sigma if sigma > 0 else 0 * x  # data do not depend on their noise

    if variable == "ratio":  # Karras 2022 eq. 4 with s(t) = 1

        def slope(u, y):
            alpha, sigma = process.at_ratio(u)
            return split(alpha * y, alpha, sigma)[1]

        return lambda t: process.at(t)[1] / process.at(t)[0], lambda t: process.at(t)[0], slope
    if variable == "angle":  # Salimans 2022 app. D, for x_t/r

        def slope(u, y):
            alpha, sigma = process.at_ratio(math.tan(u))
            clean, eps = split(math.hypot(alpha, sigma) * y, alpha, sigma)
            return math.cos(u) * eps - math.sin(u) * clean

        return lambda t: math.atan2(process.at(t)[1], process.at(t)[0]), lambda t: math.hypot(*process.at(t)), slope

    def slope(u, y):  # Lipman 2023 eq. 1 and 15, at the mean of dx_t/dt
        clean, eps = split(y, *process.at(u))
        alpha_rate, sigma_rate = process.rates(u)
        return alpha_rate * clean + sigma_rate * eps

    return lambda t: t, lambda t: 1.0, slope


def runge_kutta(method: str, variable: str, end: str = "high") -> Reference:
    def regular(process: Process, noise: bool, data: bool) -> bool:
        """sigma/alpha is infinite at noise; a table has no levels, and dalpha/dt is 0 times inf, at either end."""
        if variable == "t" or process.schedule.chain_length or (noise and variable == "ratio"):
            return False
        return not (data and end == "low")

    def step(hand, x, z, t, s):
        clock, scale, slope = flow_in(variable, hand)
        u, h, y = clock(t), clock(s) - clock(t), x / scale(t)
        k1 = slope(u, y)
        if method == "euler":
            y = y + h * k1
        elif method == "heun":
            y = y + h / 2 * (k1 + slope(u + h, y + h * k1))
        else:
            k2 = slope(u + h / 2, y + h / 2 * k1)
            k3 = slope(u + h / 2, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h, y + h * k3))
        return scale(s) * y

    return by_ddim_at_the_ends(step, regular)


def edm(churn: float, low: float, high: float, inflation: float) -> Reference:
    """Karras 2022 alg. 2 for x_t/alpha, with at most the noise of the noisiest level."""

    def reference(hand: Hand) -> Array:
        process, x = hand.process, hand.x
        last = process.at(1.0)
        if last[0] < 1e-14:  # a table ends one step before, and the flow at log_snr = −20
            last = process.at(0.8) if process.kind == "vp" else (1.0, math.exp(10))

        def slope(u, y):
            alpha, _ = process.at_ratio(u)
            return (y - hand.predict(alpha * y, *process.at_ratio(u))) / u

        for k, (t, s) in enumerate(pairwise(hand.times)):
            (a_t, s_t), (a_s, s_s) = process.at(t), process.at(s)
            if a_t < 1e-14:
                clean = hand.predict(x, a_t, s_t)
                x = a_s * clean + s_s * x / s_t
                continue
            u, after, y = s_t / a_t, s_s / a_s, x / a_t
            more = min(churn / (len(hand.times) - 1), math.sqrt(2) - 1) if low <= u <= high else 0.0
            up = min(u * (1 + more), last[1] / last[0])
            if up > u:
                y = y + inflation * math.sqrt(up**2 - u**2) * hand.noise[k][0]
            d = slope(up, y)
            euler = y + (after - up) * d
            x = a_s * (euler if after == 0 else y + (after - up) * (d + slope(after, euler)) / 2)
        return x

    return reference


def euler_maruyama(hand, x, z, t, s):
    """Song 2021 eq. 6: dx = (f x − g² ∇log p) dt + g dw, f = d log alpha/dt, g² = dsigma²/dt − 2 f sigma²."""
    alpha, sigma = hand.process.at(t)
    alpha_rate, sigma_rate = hand.process.rates(t)
    f = alpha_rate / alpha
    g = math.sqrt(2 * sigma * sigma_rate - 2 * f * sigma**2)
    score = (alpha * hand.predict(x, alpha, sigma) - x) / sigma**2
    return x + (f * x - g**2 * score) * (s - t) + g * math.sqrt(t - s) * z[0]


def ddim_then_langevin(step_size: float, each: int) -> Reference:
    """Song 2021 alg. 2 with the probability flow as predictor; the corrector's ε is 2 step_size sigma²."""

    def step(hand, x, z, t, s):
        (a_t, s_t), (a_s, s_s) = t, s
        clean = hand.predict(x, a_t, s_t)
        x = a_s * clean + s_s * (x - a_t * clean) / s_t
        for fresh in z[:each] if s_s > 0 else ():
            size = step_size * s_s**2
            x = x + size * (a_s * hand.predict(x, a_s, s_s) - x) / s_s**2 + math.sqrt(2 * size) * fresh
        return x

    return stepwise(step)


def consistency(hand: Hand) -> Array:
    """Song 2023 (consistency models) algorithm 1: x = f(x, t), then x + fresh noise, for x_t = alpha x + sigma eps."""
    x, levels = hand.x, hand.levels
    for k, (alpha, sigma) in enumerate(levels[:-1]):
        clean, (a_s, s_s) = hand.predict(x, alpha, sigma), levels[k + 1]
        x = a_s * clean if k == len(levels) - 2 else a_s * clean + s_s * hand.noise[k][0]
    return x


def twice(steps: int) -> int:
    return 2 * steps


def four_times(steps: int) -> int:
    return 4 * steps


ROWS: dict[str, Row] = {
    "ancestral small": Row(Ancestral(), ancestral("small"), 1, 1, name="ancestral"),
    "ancestral large": Row(Ancestral("large"), ancestral("large"), 1, 1),
    "ancestral learned": Row(Ancestral("learned"), ancestral("learned"), 1, 1),
    "ddim 0": Row(DDIM(), ddim(0.0), 1, name="ddim"),
    "ddim 0.3": Row(DDIM(0.3), ddim(0.3), 1, 1),
    "ddim 1": Row(DDIM(eta=1.0), ddim(1.0), 1, 1),
    "euler": Row(RungeKutta("euler"), runge_kutta("euler", "ratio"), 1, name="euler"),
    "euler in t": Row(RungeKutta("euler", "t"), runge_kutta("euler", "t"), 1),
    "euler in the angle": Row(RungeKutta("euler", "angle"), runge_kutta("euler", "angle"), 1),
    "heun": Row(RungeKutta("heun"), runge_kutta("heun", "ratio"), 2, calls=twice),
    "heun in t": Row(RungeKutta("heun", "t"), runge_kutta("heun", "t"), 2, calls=twice),
    "heun in the angle": Row(RungeKutta("heun", "angle"), runge_kutta("heun", "angle"), 2, calls=twice, name="heun"),
    "rk4": Row(RungeKutta("rk4"), runge_kutta("rk4", "ratio"), 4, calls=four_times),
    "rk4 in t": Row(RungeKutta("rk4", "t"), runge_kutta("rk4", "t"), 4, calls=four_times),
    "rk4 to low": Row(RungeKutta("rk4", "angle", "low"), runge_kutta("rk4", "angle", "low"), 4, calls=four_times),
    "rk4 in the angle": Row(RungeKutta("rk4", "angle"), runge_kutta("rk4", "angle"), 4, calls=four_times, name="rk4"),
    "edm": Row(EDM(), edm(40.0, 0.05, 50.0, 1.003), None, 1, twice, name="edm"),
    "edm in part": Row(EDM(0.5, 0.3, 4.0, 1.1), edm(0.5, 0.3, 4.0, 1.1), None, 1, twice),
    "edm exact": Row(EDM(1.0, 0.0, math.inf, 1.0), edm(1.0, 0.0, math.inf, 1.0), 2, 1, twice),
    "edm without churn": Row(EDM(0.0), runge_kutta("heun", "ratio", "low"), 2, calls=twice),
    "euler-maruyama": Row(
        EulerMaruyama(),
        by_ddim_at_the_ends(euler_maruyama),
        1,
        1,
        finest={"flow": 256, "exploding": 512},
        name="euler_maruyama",
    ),
    "predictor-corrector": Row(
        PredictorCorrector(DDIM(), AnnealedLangevin(0.1, 2)),
        ddim_then_langevin(0.1, 2),
        None,
        2,
        lambda steps: 3 * steps,
        signal=True,
    ),
    "dpm++ 2s": Row(SingleStep(2), by_lambda.single(2), 2, calls=lambda steps: 2 * steps, name="dpm++2s"),
    "dpm++ 3s": Row(SingleStep(3), by_lambda.single(3), 3, calls=lambda steps: 3 * steps, name="dpm++3s"),
    "dpm++ 2m": Row(Multistep(2, rule="bh2"), by_lambda.two_m, 2, finest={"flow": 256}, name="dpm++2m"),
    "dpm++ 3m": Row(
        Multistep(3), by_lambda.adams(3), 3, calls=lambda steps: steps + 1, finest={"exploding": 256}, name="dpm++3m"
    ),
    "dpm++ 2m sde": Row(
        Multistep(2, 1.0, "bh2"), by_lambda.two_m_sde, 2, 1, finest={"exploding": 512}, name="dpm++2m_sde"
    ),
    "exponential 1 sde": Row(Multistep(1, 0.4), by_lambda.adams(1, 0.4), 1, 1),
    "exponential 2 sde": Row(Multistep(2, 0.4), by_lambda.adams(2, 0.4), 2, 1),
    "exponential 3 sde": Row(
        Multistep(3, 2.5), by_lambda.adams(3, 2.5), 2, 1, finest={"log-SNR": 512, "flow": 1024, "exploding": 1024}
    ),
    "exponential 2": Row(Multistep(2), by_lambda.adams(2), 2, finest={"flow": 256}),
    "unipc 1": Row(UniPC(1), by_lambda.unipc(1, "bh2"), 2),
    "unipc 2": Row(UniPC(2), by_lambda.unipc(2, "bh2"), 3, finest={"flow": 256}, name="unipc"),
    "unipc 2 bh1": Row(UniPC(2, "bh1"), by_lambda.unipc(2, "bh1"), 3),
    "unipc 3": Row(
        UniPC(3), by_lambda.unipc(3, "bh2"), 4, calls=lambda steps: steps + 2, finest={"flow": 512, "exploding": 256}
    ),
    "exponential 4": Row(
        Multistep(4),
        by_lambda.adams(4),
        4,
        calls=lambda steps: steps + 2 * min(steps, 2),
        finest={"log-SNR": 512, "flow": 1024, "exploding": 512},
        name="exponential",
    ),
    # of order 2 by its first step, and "to low" by its last
    "dpm++ 3m from low": Row(
        Multistep(3, start="low"),
        by_lambda.adams(3, low=True),
        2,
        finest={"log-SNR": 512, "flow": 2048, "exploding": 512},
    ),
    "dpm++ 3m sde": Row(
        Multistep(3, 1.0),
        by_lambda.adams(3, 1.0),
        2,
        1,
        finest={"log-SNR": 256, "flow": 2048, "exploding": 1024},
        name="dpm++3m_sde",
    ),
    "dpm++ 2m sde to low": Row(
        Multistep(2, 1.0, "bh2", end="low"),
        by_lambda.ended(by_lambda.two_m_sde, 1.0),
        2,
        1,
        finest={"flow": 256, "exploding": 256},
    ),
    "dpm++ 3m to low": Row(
        Multistep(3, end="low"),
        by_lambda.ended(by_lambda.adams(3, low=True)),
        2,
        finest={"log-SNR": 512, "flow": 256, "exploding": 256},
    ),
    "unipc 3 from low": Row(
        UniPC(3, "bh1", "low"),
        by_lambda.unipc(3, "bh1", True),
        3,
        finest={"log-SNR": 1024, "flow": 6144, "exploding": 2048},
    ),
    "flow map": Row(FlowMapSampling(), ddim(0.0), 1, name="flow_map"),  # the denoisers here have one time
    "consistency": Row(ConsistencySampling(), consistency, None, 1, name="consistency"),
    "product": Row(Product(), ancestral("small"), None, 1),  # with a factor: test_product.py
}
WITHOUT_REFERENCE = {
    "adaptive": "test_adaptive.py",
    "annealed_langevin": "test_langevin.py",
    "predictor_corrector": "test_predictor_corrector.py",
}
"""Solvers without a row, and where they are tested."""

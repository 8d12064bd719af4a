"""The exponential family written from its papers in NumPy, in the symbols of each paper, for `solver_table.py`.

Levels are pairs (alpha, sigma), lambda = log(alpha/sigma). Where it is infinite a step is DDIM's by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy import ndarray as Array

NODES, WEIGHTS = (v / 2 for v in np.polynomial.legendre.leggauss(40))
NODES = NODES + 0.5  # for integrals over [0, 1]


def lam(level: tuple[float, float]) -> float:
    return math.log(level[0] / level[1])


def is_finite(t, s) -> bool:
    return t[0] > 1e-14 and s[1] > 0


def halfway(hand, t, s, share: float) -> tuple[float, float]:
    return hand.process.at_ratio(math.exp(-lam(t) - share * (lam(s) - lam(t))))


def ends(hand, x: Array, t, s, eta: float, z: Array) -> Array:
    """Into data: x̂. Out of pure noise: alpha_s x̂ + sigma_s ε, the old ε without an SDE and a new one with it."""
    clean = hand.predict(x, *t)
    return s[0] * clean + s[1] * (z[0] if eta else (x - t[0] * clean) / t[1])


def integral(x: Array, t, s, points: list[tuple[Array, float]], eta: float = 0.0, z: Array | None = None) -> Array:
    """Lu 2022b prop. 4.1 by quadrature, x̂ through ``points`` = (x̂, lambda)."""
    h, a = lam(s) - lam(t), 1 + eta
    total = np.zeros_like(x)
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        at = lam(t) + node * h
        value = sum(
            p * math.prod((at - other) / (own - other) for _, other in points if other != own) for p, own in points
        )
        total = total + weight * h * a * math.exp(-a * h * (1 - node)) * value
    out = s[1] / t[1] * math.exp(-eta * h) * x + s[0] * total
    return out if z is None else out + s[1] * math.sqrt(1 - math.exp(-2 * eta * h)) * z


def two_s(hand, x: Array, t, s) -> Array:
    """Lu 2022b algorithm 1 with r = 1/2."""
    r, m, h = 0.5, halfway(hand, t, s, 0.5), lam(s) - lam(t)
    first = hand.predict(x, *t)
    u = m[1] / t[1] * x - m[0] * (math.exp(-r * h) - 1) * first
    D = (1 - 1 / (2 * r)) * first + 1 / (2 * r) * hand.predict(u, *m)
    return s[1] / t[1] * x - s[0] * (math.exp(-h) - 1) * D


def three_s(hand, x: Array, t, s) -> Array:
    """DPM-Solver-3 (Lu 2022 algorithm 2) for x̂ in place of ε̂, with r1 = 1/3 and r2 = 2/3."""
    r1, r2, h = 1 / 3, 2 / 3, lam(s) - lam(t)
    one, two = halfway(hand, t, s, r1), halfway(hand, t, s, r2)
    first = hand.predict(x, *t)

    def phi_2(h):
        return (math.exp(-h) - 1) / h + 1

    u1 = one[1] / t[1] * x - one[0] * (math.exp(-r1 * h) - 1) * first
    D1 = hand.predict(u1, *one) - first
    u2 = two[1] / t[1] * x - two[0] * (math.exp(-r2 * h) - 1) * first + two[0] * r2 / r1 * phi_2(r2 * h) * D1
    D2 = hand.predict(u2, *two) - first
    return s[1] / t[1] * x - s[0] * (math.exp(-h) - 1) * first + s[0] / r2 * phi_2(h) * D2


def single(order: int):
    def reference(hand) -> Array:
        x = hand.x
        for t, s in pairwise(hand.levels):
            step = {2: two_s, 3: three_s}[order] if is_finite(t, s) else lambda *args: ends(*args, 0.0, None)
            x = step(hand, x, t, s)
        return x

    return reference


def two_m(hand) -> Array:
    """Lu 2022b algorithm 2."""
    x, last = hand.x, None
    for t, s in pairwise(hand.levels):
        if not is_finite(t, s):
            x, last = ends(hand, x, t, s, 0.0, None), None
            continue
        D = clean = hand.predict(x, *t)
        h = lam(s) - lam(t)
        if last is not None:
            r = (lam(t) - last[1]) / h
            D = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * last[0]
        x = s[1] / t[1] * x - s[0] * (math.exp(-h) - 1) * D
        last = (clean, lam(t))
    return x


def two_m_sde(hand) -> Array:
    """Lu 2022b §5, SDE-DPM-Solver++(2M)."""
    x, last = hand.x, None
    for k, (t, s) in enumerate(pairwise(hand.levels)):
        z = hand.noise[k]
        if not is_finite(t, s):
            x, last = ends(hand, x, t, s, 1.0, z), None
            continue
        clean = hand.predict(x, *t)
        h = lam(s) - lam(t)
        gain = s[0] * (1 - math.exp(-2 * h))
        after = s[1] / t[1] * math.exp(-h) * x + gain * clean + s[1] * math.sqrt(1 - math.exp(-2 * h)) * z[0]
        if last is not None:
            r = (lam(t) - last[1]) / h
            after = after + gain / 2 * (clean - last[0]) / r
        x, last = after, (clean, lam(t))
    return x


def adams(points: int, eta: float = 0.0, low: bool = False):
    """Exponential Adams–Bashforth (Hochbruck and Ostermann 2010, §4), with our start or (``low``) the usual one."""

    def reference(hand) -> Array:
        x, known = hand.x, []
        for k, (t, s) in enumerate(pairwise(hand.levels)):
            z = hand.noise[k]
            if not is_finite(t, s):
                x, known = ends(hand, x, t, s, eta, z), []
                continue
            known = [(hand.predict(x, *t), lam(t)), *known][:points]
            if not low and eta == 0 and len(known) < points - 1:
                x = {3: two_s, 4: three_s}[points](hand, x, t, s)
            else:
                x = integral(x, t, s, known, eta, z[0] if eta else None)
        return x

    return reference


def ended(full, eta: float = 0.0):
    """``full`` but for its last step, DPM-Solver++ 1 or its SDE (as in the code of Lu 2022b for few steps)."""

    def reference(hand) -> Array:
        *_, t, s = hand.levels
        x, z = full(replace(hand, times=hand.times[:-1])), hand.noise[len(hand.levels) - 2]
        if not is_finite(t, s):
            return ends(hand, x, t, s, eta, z)
        return integral(x, t, s, [(hand.predict(x, *t), lam(t))], eta, z[0] if eta else None)

    return reference


def unipc(p: int, variant: str, low: bool = False):
    """Zhao 2023 algorithms 5 to 8 for x̂: UniP-p's step, and UniC-p's correction of the one before by its prediction."""

    def B(h):
        return h if variant == "bh1" else math.expm1(h)

    def coefficients(r: list[float], h: float) -> Array:
        """a of R_p(h) a B(h) = φ_p(h), φ by the paper's recursion; for x̂ h is −h; one alone is 1/2."""
        if len(r) == 1:
            return np.array([0.5])
        R, phi, vector = np.array([[v**n for v in r] for n in range(len(r))]), math.expm1(h) / h - 1, []
        for n in range(1, len(r) + 1):
            vector.append(phi * math.factorial(n) / B(h))
            phi = phi / h - 1 / math.factorial(n + 1)
        return np.linalg.solve(R, np.array(vector))

    def step(x, t, s, first, others):
        """``others``: (x̂ less the first, (lambda less lambda_t)/h)."""
        h = lam(t) - lam(s)
        out = s[1] / t[1] * x - s[0] * math.expm1(h) * first
        if others:
            a = coefficients([r for _, r in others], h)
            out = out - s[0] * B(h) * sum(w * D / r for w, (D, r) in zip(a, others, strict=True))
        return out

    def reference(hand) -> Array:
        x, known, base, before = hand.x, [], None, None
        for t, s in pairwise(hand.levels):
            clean = hand.predict(x, *t)
            if base is not None and (low or len(known) >= p - 1):
                h, (first, origin) = lam(t) - lam(before), known[0]
                others = [(m - first, (at - origin) / h) for m, at in known[1:]]
                x = step(base, before, t, first, [*others, (clean - first, 1.0)])
            if not is_finite(t, s):
                h_is_infinite = s[0] * clean + s[1] / t[1] * x
                x, known, base = h_is_infinite, [], None
                continue
            known, base, before = [(clean, lam(t)), *known][:p], x, t
            if not low and len(known) < p - 1:
                x = three_s(hand, x, t, s)
            else:
                h = lam(s) - lam(t)
                x = step(x, t, s, clean, [(m - clean, (at - lam(t)) / h) for m, at in known[1:]])
        return x

    return reference

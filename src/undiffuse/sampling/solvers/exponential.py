"""The formula of the exponential family: the flow, or its SDE, in lambda = log(alpha/sigma), with x̂ a polynomial.

With h = lambda_s − lambda_t the exact solution is [Lu22b prop. 4.1; §5 where eta = 1]

    x_s = (sigma_s/sigma_t) e^(−eta h) x_t + alpha_s ∫_0^h a e^(−a (h − u)) x̂(lambda_t + u) du
          + sigma_s √(1 − e^(−2 eta h)) z

with a = 1 + eta. DPM-Solver++, exponential Adams methods and UniPC differ only in the points that x̂ goes through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.process.noise_level import NoiseLevel, broadcast_like, transition_frac

Point = tuple[Tensor, NoiseLevel]
"""A prediction x̂ and the level at which it was made."""

RULES = ("exact", "bh1", "bh2")


def half_log_snr_gap(t: NoiseLevel, s: NoiseLevel) -> float:
    """lambda_s − lambda_t = −½ log(1 − frac), lambda = log(alpha/sigma); inf where sigma_s or alpha_t is 0."""
    frac = transition_frac(t, s)
    exact = -0.5 * torch.log1p(-frac) if float(frac) < 0.5 else 0.5 * (s.log_snr - t.log_snr)
    return float(exact)


def moments(H: float, n: int) -> list[float]:
    """M_k = H ∫_0^1 e^(−H(1 − v)) v^k dv = H k! φ_(k+1)(−H) for k < ``n``, to 14 digits for any ``H`` ≥ 0.

    By parts M_k = 1 − k M_(k−1)/H. Upward recursion loses digits as H falls to 0, so for H < 1 the recursion runs
    downward, where an error shrinks by H/k.
    """
    if H >= 1:
        M = [-math.expm1(-H)]
        for k in range(1, n):
            M.append(1 - k * M[-1] / H)
        return M
    M = [0.0]
    for k in range(n + 20, 0, -1):
        M.append(H / k * (1 - M[-1]))
    return M[::-1][:n]


def weights(H: float, nodes: Sequence[float], rule: str = "exact") -> list[float]:
    """W_j = H ∫_0^1 e^(−H(1 − v)) l_j(v) dv, the weight of x̂_j − x̂_0: l_j is 1 at nodes[j], 0 at the others and at 0.

    ``rule`` is for a single node v: ``"exact"`` M_1/v; ``"bh2"`` M_0/(2v) as DPM-Solver++ and UniPC-B2; ``"bh1"``
    H/(2v) as UniPC-B1 [Lu22b alg. 2; Zhao23].
    """
    M = moments(H, len(nodes) + 1)
    if rule != "exact" and len(nodes) == 1:
        return [(M[0] if rule == "bh2" else H) / (2 * nodes[0])]
    result = []
    for j, node in enumerate(nodes):
        basis = [0.0, 1 / node]  # ascending coefficients of v/v_j Π (v − v_i)/(v_j − v_i)
        for other in [*nodes[:j], *nodes[j + 1 :]]:
            by_v, by_1 = [0.0, *basis], [*basis, 0.0]
            basis = [(a - other * b) / (node - other) for a, b in zip(by_v, by_1, strict=True)]
        result.append(math.fsum(c * m for c, m in zip(basis, M, strict=True)))
    return result


def advance(
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    points: Sequence[Point],
    rule: str = "exact",
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_s = (sigma_s/sigma_t) e^(−eta h) x_t + alpha_s (M_0 x̂_0 + Σ_j W_j (x̂_j − x̂_0)) + sigma_s √(1 − e^(−2 eta h)) z.

    points[0] was predicted at ``t``, the others at other levels; ``noise`` (B, ...) is read if ``eta`` > 0. Where h is
    infinite, into data or out of pure noise, only points[0] is used: the step is the formula's limit, DDIM with eta 0,
    or with eta 1 if ``eta`` > 0.
    """
    h = half_log_snr_gap(t, s)
    if math.isinf(h):
        points = points[:1]
    decay = eta * h if eta else 0.0
    (first, _), *others = points
    x = moments((1 + eta) * h, 1)[0] * first
    nodes = [half_log_snr_gap(t, at) / h for _, at in others]
    for weight, (other, _) in zip(weights((1 + eta) * h, nodes, rule), others, strict=True):
        x = x + weight * (other - first)
    x_s = broadcast_like(s.sigma / t.sigma * math.exp(-decay), x_t) * x_t + broadcast_like(s.alpha, x_t) * x
    if noise is not None:
        x_s = x_s + broadcast_like(s.sigma * math.sqrt(-math.expm1(-2 * decay)), x_t) * noise
    return x_s

"""Bounds made tighter by several draws: −log of the mean of the importance weights [Burda16 eq. 8]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.likelihood.discrete import Edges, flat_sum
from undiffuse.likelihood.nll import NLL, nll
from undiffuse.likelihood.ode import Prior, prior_log_prob
from undiffuse.process.gaussian import Gaussian, Variance, posterior, reverse
from undiffuse.process.level import NoiseLevel, like
from undiffuse.randomness import Noise


def importance(log_weights: Tensor) -> Tensor:
    """−log((1/K) Σ_k exp(log_weights_k)), (B,) nats from (K, B): no more, in expectation, than with fewer draws."""
    return math.log(len(log_weights)) - torch.logsumexp(log_weights, 0)


def tighten(draws: Sequence[NLL]) -> NLL:
    """−log((1/K) Σ_k exp(−total_k)) of K independent single-draw bounds on the same items [Burda16 eq. 8].

    They are draws of `ode_nll` with a dequantiser, or of `chain_nll`; those of `vlb` will not do, whose steps are
    expectations; nor those of `ode_nll` whose divergence is estimated, whose noise would make the result too low.
    ``prior``, ``steps`` and ``per_step`` are means over the draws; what the draws gain together is in
    ``decoder``; ``calls`` are added up.
    """
    prior, steps, per_step = (
        torch.stack([getattr(d, f) for d in draws]).mean(0) for f in ("prior", "steps", "per_step")
    )
    total = importance(-torch.stack([d.total for d in draws]))
    return nll(prior, steps, total - prior - steps, sum(d.calls for d in draws), per_step)


def importance_weighted(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise,
    *,
    draws: int,
    cond: Condition | None = None,
    variance: Variance = "small",
    first_large: str = "beta",
    edges: Edges | None = None,
    prior: Prior | None = None,
) -> NLL:
    """−log p(x) ≤ −log((1/K) Σ_k p(x, x_1..x_T)/q(x_1..x_T given x)) over K = ``draws`` trajectories [Burda16 eq. 8].

    The arguments are those of `vlb`, whose expectation it has for K = 1. It falls to −log p(x) of the chain as K
    grows. ``noise(1)`` gives the numbers of a step, trajectory by trajectory; each costs the chain's calls.
    """
    return tighten([
        chain_nll(
            denoise, x, levels, noise, cond=cond, variance=variance, first_large=first_large, edges=edges, prior=prior
        )
        for _ in range(draws)
    ])  # fmt: skip


def chain_nll(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise,
    *,
    cond: Condition | None = None,
    variance: Variance = "small",
    first_large: str = "beta",
    edges: Edges | None = None,
    prior: Prior | None = None,
) -> NLL:
    """log q(x_1..x_T given x) − log p(x, x_1..x_T), (B,) nats: minus the log-weight of one trajectory drawn from q.

    x_T ~ q(x_T given x), then x_s ~ q(x_s given x_t, x) [Ho20 eq. 7] down to data; terms and parts as in `vlb`, at
    the drawn states in place of their KLs.
    """
    data, top, clean = x.double(), levels[0], levels[-1]
    jump = Gaussian(like(top.alpha, data) * data, like(2 * torch.log(top.sigma), data))
    x_t = jump.sample(noise(1)[0].double())
    first = flat_sum(jump.log_prob(x_t)) - prior_log_prob(x_t, top, prior)
    terms: list[Tensor] = []
    for t, s in pairwise(levels):
        said = denoise(x_t.to(x.dtype), t, cond, s)
        said = Prediction(*(None if p is None else p.to(data) for p in said))  # type: ignore[arg-type]
        model = reverse(said, x_t, t, s, variance, first_large)
        if bool(s.sigma == 0):
            terms.append(_decode(model, data, edges))
            break
        q = posterior(x_t, data, t, s)
        x_t = q.sample(noise(1)[0].double())
        terms.append(flat_sum(q.log_prob(x_t) - model.log_prob(x_t)))
    per_step = torch.stack(terms[::-1], 1)
    if bool(clean.sigma == 0):
        decoder, steps = per_step[:, 0], per_step[:, 1:].sum(1)
    else:
        last = Gaussian(x_t / like(clean.alpha, data), like(2 * torch.log(clean.sigma / clean.alpha), data))
        decoder, steps = _decode(last, data, edges), per_step.sum(1)
    return nll(first, steps, decoder, len(terms), per_step)


def _decode(model: Gaussian, x: Tensor, edges: Edges | None) -> Tensor:
    return -flat_sum(model.log_prob(x) if edges is None else model.bin_log_prob(edges))

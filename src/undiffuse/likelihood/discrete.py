"""The variational bound of a chain: L_T + Σ L_{t−1} + L_0 [Ho20 eq. 5]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.likelihood.nll import NLL, nll
from undiffuse.process.gaussian import Gaussian, Variance, diffuse, posterior, reverse
from undiffuse.process.level import NoiseLevel, like, stack
from undiffuse.randomness import Noise
from undiffuse.sample import prior_scale

Edges = tuple[Tensor, Tensor]


def vlb(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise,
    *,
    cond: Condition | None = None,
    variance: Variance = "small",
    first_large: str = "beta",
    edges: Edges | None = None,
    prior: Gaussian | None = None,
    strata: Sequence[Tensor] | None = None,
) -> NLL:
    """−log p(x) ≤ KL(q(x_T|x) to p(x_T)) + Σ KL(q(x_s|x_t, x) to p(x_s|x_t)) − log p(x|the last).

    ``x`` (B, ...) in the codec's units; ``levels`` from noise to data, a chain of N steps; ``noise``
    gives each step's fresh eps by ``noise(1)``. ``edges`` are the bins of x (of discrete data), without
    which the decoder is a density. Where the chain ends at sigma 0 its last step is the decoder;
    where it stays finite the decoder is N(z_0/alpha_0, sigma_0²/alpha_0²) and all N steps are KLs.
    ``prior`` is N(0, I), or N(0, sigma_T²) for schedules that do not preserve variance, unless given.
    ``strata``, one (B,) tensor of step numbers a stratum (see `stratify`), evaluates those steps only,
    each for its stratum's size. Terms are float64 nats; the network sees ``x``'s dtype.
    """
    N = len(levels) - 1
    ladder = stack(levels)
    data = x.double()
    ends_in_data = float(levels[-1].sigma) == 0
    if strata is None:
        visits = [(torch.full((len(x),), k), 1) for k in range(1, N + 1)]
    else:
        sizes = _sizes(N, len(strata))
        visits = list(zip(strata, sizes, strict=True))

    per_step = torch.full((len(x), N), math.nan, dtype=torch.float64, device=x.device)
    steps, decoder = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for k, size in visits:
        t, s = ladder.take(N - k), ladder.take(N - k + 1)
        x_t = diffuse(data, t, noise(1)[0].double())
        prediction = denoise(x_t.to(x.dtype), t, cond, s)
        term = flat_sum(step_nll(prediction, data, x_t, t, s, variance, first_large, edges))
        per_step.scatter_(1, (k.to(x.device) - 1)[:, None], term[:, None])
        is_decoder = (s.sigma == 0).to(x.device)
        steps = steps + torch.where(is_decoder, 0, size * term)
        decoder = decoder + torch.where(is_decoder, size * term, 0)

    if not ends_in_data:
        decoder = decoder + flat_sum(clean_nll(data, levels[-1], noise(1)[0].double(), edges))
    return nll(flat_sum(prior_kl(data, levels[0], prior)), steps, decoder, len(visits), per_step)


def step_nll(
    prediction: Prediction,
    x: Tensor,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    variance: Variance = "small",
    first_large: str = "beta",
    edges: Edges | None = None,
) -> Tensor:
    """KL(q(x_s|x_t, x) to p(x_s|x_t)), or −log p(x|x_t) where sigma_s is 0: one step's term per element, nats."""
    model = reverse(Prediction(*(None if p is None else p.to(x) for p in prediction)), x_t, t, s, variance, first_large)  # type: ignore[arg-type]
    to_data = s.sigma == 0
    if bool(to_data.all()):
        return -_log_prob(model, x, edges)
    kl = posterior(x_t, x, t, s).kl(model)
    if not bool(to_data.any()):
        return kl
    return torch.where(like(to_data, x).bool(), -_log_prob(model, x, edges), kl)


def clean_nll(x: Tensor, level: NoiseLevel, eps: Tensor, edges: Edges | None = None) -> Tensor:
    """−log N(x; z/alpha, sigma²/alpha²) per element at z = alpha x + sigma eps, or −log of the bin's share, nats.

    The decoder of a chain whose clean end, ``level``, stays finite.
    """
    last = Gaussian(diffuse(x, level, eps) / like(level.alpha, x), like(-level.log_snr, x))
    return -_log_prob(last, x, edges)


def prior_kl(x: Tensor, level: NoiseLevel, prior: Gaussian | None = None) -> Tensor:
    """KL(q(x_T given x) to p(x_T)) per element, nats; N(0, I) or N(0, sigma_T²) unless ``prior`` is given."""
    at = level.like(x)
    if prior is None:
        prior = Gaussian(torch.zeros_like(x), torch.full_like(x, 2 * math.log(prior_scale(level))))
    return Gaussian(at.alpha * x, 2 * torch.log(at.sigma)).kl(prior)


def stratify(N: int, m: int, u: Tensor) -> list[Tensor]:
    """One step of each of m equal strata of 1..N for each item, m tensors (B,), from uniform ``u`` (m, B) in [0, 1)."""
    ends = [round(N * j / m) for j in range(m + 1)]
    spans = zip(ends[:-1], ends[1:], u, strict=True)
    return [(a + 1 + (u_j * (b - a)).floor().clamp(max=b - a - 1)).long() for a, b, u_j in spans]


def _sizes(N: int, m: int) -> list[int]:
    return [round(N * (j + 1) / m) - round(N * j / m) for j in range(m)]


def _log_prob(p: Gaussian, x: Tensor, edges: Edges | None) -> Tensor:
    return p.log_prob(x) if edges is None else p.bin_log_prob(edges)


def flat_sum(values: Tensor) -> Tensor:
    """Sum over all but the first dimension."""
    return values.flatten(1).sum(1)

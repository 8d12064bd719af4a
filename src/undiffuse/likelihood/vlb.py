"""The variational bound of a chain: L_T + Σ L_{t−1} + L_0 [Ho20 eq. 5]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.likelihood.decoder import Decoder, Edges, clean_end_decoder, clean_nll, decoder_nll
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.process.gaussian import Gaussian, diffuse, posterior
from undiffuse.process.noise_level import NoiseLevel, broadcast_like, stack
from undiffuse.process.prior import prior_kl
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_sum


class Stratum(NamedTuple):
    """Steps (B,) of the numbers 1..N, one for each item, drawn from ``size`` consecutive ones."""

    steps: Tensor
    size: int


def vlb(
    chain: ReverseChain,
    x: Tensor,
    noise: Noise,
    *,
    edges: Edges | None = None,
    decode: Decoder | None = None,
    prior: Gaussian | None = None,
    strata: Sequence[Stratum] | None = None,
) -> NLL:
    """−log p(x) ≤ KL(q(x_T given x) to p(x_T)) + Σ KL(q(x_s given x_t, x) to p(x_s given x_t)) − log p(x given x_1).

    ``x`` (B, ...) is in the model's units; the chain has N steps, and ``noise(1)`` gives the fresh eps of each.
    If the chain ends at sigma 0 its last step is the decoder, the mass of the bins ``edges`` of discrete data, or a
    density without them. Otherwise all N steps are KLs, and ``decode`` gives p(x given z_0), by default the density
    N(z_0/alpha_0, sigma_0²/alpha_0²) of continuous data. ``prior`` is by default N(0, I), or N(0, sigma_T²) if the
    schedule does not preserve variance.

    With ``strata`` (see `stratify`) only their steps are evaluated, each weighted by the size of its stratum. Nats,
    float64; the network gets ``x``'s dtype. Raises `ConfigError` for discrete data without a decoder at a finite end.
    """
    levels, N = stack(chain.noise_levels), len(chain.noise_levels) - 1
    data = x.double()
    visits = strata or [Stratum(torch.full((len(x),), k), 1) for k in range(1, N + 1)]

    per_step = torch.full((len(x), N), math.nan, dtype=torch.float64, device=x.device)
    diffusion_nats, decoder = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for k, size in visits:
        t, s = levels.take(N - k), levels.take(N - k + 1)
        x_t = diffuse(data, t, noise(1)[0].double())
        term = item_sum(step_nll(chain.step(x_t, t, s, x.dtype), data, x_t, t, s, edges))
        per_step.scatter_(1, (k.to(x.device) - 1)[:, None], term[:, None])
        is_decoder = (s.sigma == 0).to(x.device)
        diffusion_nats = diffusion_nats + torch.where(is_decoder, 0, size * term)
        decoder = decoder + torch.where(is_decoder, size * term, 0)

    top, clean = chain.noise_levels[0], chain.noise_levels[-1]
    calls = len(visits)
    if float(clean.sigma.detach()) > 0:
        decode = clean_end_decoder(decode, edges)
        decoder, calls = decoder + item_sum(clean_nll(x, clean, noise(1)[0], decode)), calls + decode.calls
    return make_nll(item_sum(prior_kl(data, top, prior)), diffusion_nats, decoder, calls, per_step)


def step_nll(
    model: Gaussian, x: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, edges: Edges | None = None
) -> Tensor:
    """KL(q(x_s given x_t, x) to p(x_s given x_t)), or −log p(x given x_t) where sigma_s is 0: nats per element.

    ``model`` is p(x_s given x_t), such as `ReverseChain.step`; ``t`` and ``s`` are () or (B,).
    """
    to_data = s.sigma == 0
    if bool(to_data.all()):
        return decoder_nll(model, x, edges)
    kl = posterior(x_t, x, t, s).kl(model)
    if not bool(to_data.any()):
        return kl
    return torch.where(broadcast_like(to_data, x).bool(), decoder_nll(model, x, edges), kl)


def strata_ends(log_snr: Tensor, m: int) -> list[int]:
    """0 = n_0 < … < n_m = N: the steps n_j + 1 to n_(j+1) are stratum j of m ≤ N, of about equal spans of log-SNR.

    ``log_snr`` (N + 1,) is that of the levels 0 to N and decreases. A step to infinite log-SNR is a stratum of its own
    where m > 1: as the decoder it may cost as many bits as all other steps together.
    """
    N = len(log_snr) - 1
    ends = [0, 1] if m > 1 and log_snr[0] == math.inf else [0]
    first, parts = ends[-1], m + 1 - len(ends)
    finite = log_snr[first:].clamp(*log_snr[log_snr.isfinite()].aminmax())
    depth = parts * (finite[0] - finite) / (finite[0] - finite[-1])
    for j in range(1, parts):
        nearest = first + int((depth - j).abs().argmin())
        ends.append(min(max(nearest, ends[-1] + 1), N - parts + j))
    return [*ends, N]


def stratify(ends: Sequence[int], u: Tensor) -> list[Stratum]:
    """One step of each stratum (see `strata_ends`) for each item, from uniform ``u`` (strata, B) in [0, 1)."""
    return [
        Stratum((a + 1 + (u_j * (b - a)).floor().clamp(max=b - a - 1)).long(), b - a)
        for (a, b), u_j in zip(pairwise(ends), u, strict=True)
    ]

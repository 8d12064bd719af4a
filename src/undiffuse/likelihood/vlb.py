"""The variational bound of a chain: L_T + Σ L_{t−1} + L_0 [Ho20 eq. 5]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.likelihood.decoder import Decoder, Edges, clean_end_decoder, clean_nll, decoder_nll
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.process.gaussian import Gaussian, diffuse, posterior
from undiffuse.process.noise_level import NoiseLevel, broadcast_like, stack
from undiffuse.process.prior import prior_kl
from undiffuse.process.schedule import MIN_LOG_SNR
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_sum

UNIFORM_FRACTION = 0.1
"""Part of a step's probability in `draw_steps` that does not depend on its range of log-SNR."""


class Visit(NamedTuple):
    """A step 1..N for each item, ``steps`` (B,), and the ``weights`` (B,) of their terms in the bound."""

    steps: Tensor
    weights: Tensor


def vlb(
    chain: ReverseChain,
    x: Tensor,
    noise: Noise,
    *,
    edges: Edges | None = None,
    decode: Decoder | None = None,
    prior: Gaussian | None = None,
    visits: Sequence[Visit] | None = None,
) -> NLL:
    """−log p(x) ≤ KL(q(x_T given x) to p(x_T)) + Σ KL(q(x_s given x_t, x) to p(x_s given x_t)) − log p(x given x_1).

    ``x`` (B, ...) is in the model's units; the chain has N steps, and ``noise(1)`` gives the fresh eps of each.
    If the chain ends at sigma 0 its last step is the decoder, the mass of the bins ``edges`` of discrete data, or a
    density without them. Otherwise all N steps are KLs, and ``decode`` gives p(x given z_0), by default the density
    N(z_0/alpha_0, sigma_0²/alpha_0²) of continuous data. ``prior`` is by default N(0, I), or N(0, sigma_T²) if the
    schedule does not preserve variance.

    With ``visits`` (see `draw_steps`) only their steps are evaluated. Nats, float64; the network gets ``x``'s dtype.
    Raises `ConfigError` for discrete data without a decoder at a finite end.
    """
    levels, N = stack(chain.noise_levels), len(chain.noise_levels) - 1
    data = x.double()
    if visits is None:
        visits = [Visit(torch.full((len(x),), k), torch.ones(len(x))) for k in range(1, N + 1)]

    per_step = torch.full((len(x), N), math.nan, dtype=torch.float64, device=x.device)
    diffusion_nats, decoder = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for k, weight in visits:
        t, s = levels.take(N - k), levels.take(N - k + 1)
        x_t = diffuse(data, t, noise(1)[0].double())
        term = item_sum(step_nll(chain.step(x_t, t, s, x.dtype), data, x_t, t, s, edges))
        per_step.scatter_(1, (k.to(x.device) - 1)[:, None], term[:, None])
        is_decoder, weighted = (s.sigma == 0).to(x.device), weight.to(x.device) * term
        diffusion_nats = diffusion_nats + torch.where(is_decoder, 0, weighted)
        decoder = decoder + torch.where(is_decoder, weighted, 0)

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


def draw_steps(log_snr: Tensor, u: Tensor) -> list[Visit]:
    """m random steps for each item, by uniform ``u`` (m, B). The mean of their weighted terms' sum is the bound.

    ``log_snr`` (N + 1,) is that of the levels 0 to N and decreases. A step's probability is nine tenths its share of
    the range of log-SNR above `MIN_LOG_SNR`, below which steps cost almost nothing, and one tenth 1/N; draw j is from
    the j-th of m equally probable ranges of steps. A step of infinite range, which is the decoder of a chain that ends
    at the data, or a first step from pure noise, is visited by every item: it may cost as many bits as all others
    together.
    """
    log_snr = log_snr.double()
    finite = log_snr.diff().isfinite()
    visits = [Visit(torch.full(u.shape[1:], int(k) + 1), torch.ones(u.shape[1:])) for k in (~finite).nonzero()]
    if not finite.any():
        return visits
    spans = torch.where(finite, -log_snr.clamp(min=MIN_LOG_SNR).diff(), 0)
    p = (1 - UNIFORM_FRACTION) * spans / spans.sum() + UNIFORM_FRACTION * finite.float() / finite.sum()
    ends, last, m = p.cumsum(0), int(finite.nonzero()[-1]), len(u)
    for j in range(m):
        k = torch.searchsorted(ends / ends[-1], (j + u[j].double()) / m, right=True).clamp(max=last)
        visits.append(Visit(k + 1, 1 / (m * p[k])))
    return visits

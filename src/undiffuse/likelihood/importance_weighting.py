"""Tighter bounds from several samples: −log of the mean importance weight [Burda16 eq. 8]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.likelihood.decoder import Decoder, Edges, clean_end_decoder, decoder_nll
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.process.gaussian import Gaussian, posterior
from undiffuse.process.noise_level import broadcast_like
from undiffuse.process.prior import Prior, prior_log_prob
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_sum


def log_mean_exp_nll(log_weights: Tensor) -> Tensor:
    """−log((1/K) Σ_k exp(log_weights_k)), (B,) nats, from (K, B); its expectation does not grow with K."""
    return math.log(len(log_weights)) - torch.logsumexp(log_weights, 0)


def iwae_bound(samples: Sequence[NLL]) -> NLL:
    """−log((1/K) Σ_k exp(−total_k)) of K independent single-sample bounds on the same items [Burda16 eq. 8].

    Valid samples are results of `chain_nll`, or of `ode_nll` with a dequantizer and the exact trace. Not valid are
    results of `vlb`, whose terms are expectations, and of `ode_nll` with an estimated trace, whose noise would make
    the result too low. ``prior``, ``diffusion_nats``, ``extra`` and ``per_step`` are means over the samples; the gain
    from averaging the weights is in ``decoder``; ``calls`` is the sum.
    """
    extra = {name: torch.stack([sample.extra[name] for sample in samples]).mean(0) for name in samples[0].extra}
    prior, diffusion_nats, per_step = (
        torch.stack([getattr(sample, field) for sample in samples]).mean(0)
        for field in ("prior", "diffusion_nats", "per_step")
    )
    total = log_mean_exp_nll(-torch.stack([sample.total for sample in samples]))
    calls = sum(sample.calls for sample in samples)
    decoder = total - prior - diffusion_nats
    for part in extra.values():
        decoder = decoder - part
    return make_nll(prior, diffusion_nats, decoder, calls, per_step, extra)


def chain_nll(
    chain: ReverseChain,
    x: Tensor,
    noise: Noise,
    *,
    edges: Edges | None = None,
    decode: Decoder | None = None,
    prior: Prior | None = None,
) -> NLL:
    """log q(x_1..x_T given x) − log p(x, x_1..x_T), (B,) nats: minus the log-weight of one trajectory drawn from q.

    x_T ~ q(x_T given x), then x_s ~ q(x_s given x_t, x) [Ho20 eq. 7] down to the data. The terms are those of `vlb`,
    with log q − log p at the drawn states in place of the KLs.
    """
    data, top, clean = x.double(), chain.noise_levels[0], chain.noise_levels[-1]
    q = Gaussian(broadcast_like(top.alpha, data) * data, broadcast_like(2 * torch.log(top.sigma), data))
    x_t = q.sample(noise(1)[0].double())
    prior_nats = item_sum(q.log_prob(x_t)) - prior_log_prob(x_t, top, prior)
    terms: list[Tensor] = []
    for t, s in pairwise(chain.noise_levels):
        model = chain.step(x_t, t, s, x.dtype)
        if bool(s.sigma == 0):
            terms.append(item_sum(decoder_nll(model, data, edges)))
            break
        q = posterior(x_t, data, t, s)
        x_t = q.sample(noise(1)[0].double())
        terms.append(item_sum(q.log_prob(x_t) - model.log_prob(x_t)))
    per_step, calls = torch.stack(terms[::-1], 1), len(terms)
    if bool(clean.sigma == 0):
        decoder, diffusion_nats = per_step[:, 0], per_step[:, 1:].sum(1)
    else:
        decode = clean_end_decoder(decode, edges)
        decoder, diffusion_nats = -item_sum(decode(x, x_t, clean)), per_step.sum(1)
        calls += decode.calls
    return make_nll(prior_nats, diffusion_nats, decoder, calls, per_step)

"""An estimate of −log p(x) by a few calls of a flow map, from data to noise.

The density is that of the map x ↦ X_{0→1}(x), which has an exact Jacobian, under the prior. It is neither a bound nor
the density of samples: those are the inverse map only as far as X_{1→0} inverts X_{0→1}, which a learned map does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.denoising.two_times import flow_map
from undiffuse.likelihood.dequantization import Dequantizer, dequantize
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.likelihood.probability_flow import check_exact_trace
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.prior import Prior, prior_log_prob
from undiffuse.process.seeded_noise import Noise


@torch.no_grad()
def flow_map_log_det(
    denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, cond: Condition | None = None
) -> tuple[Tensor, Tensor]:
    """X_{t→s}(x_t) (B, ...) and log|det ∂X_{t→s}/∂x_t| (B,), float64, by a backward pass for each dimension.

    ``x_t`` (B, ...); the network gets its dtype. Raises `ConfigError` for items of too many dimensions.
    """
    check_exact_trace(dims := x_t[0].numel())
    with torch.enable_grad():
        at = x_t.detach().requires_grad_()
        x_s = flow_map(denoise, at, t, s, cond).flatten(1)
        rows = [torch.autograd.grad(x_s[:, i].sum(), at, retain_graph=True)[0].flatten(1) for i in range(dims)]
    jacobian = torch.stack(rows, 1).double()
    return x_s.detach().double().reshape(x_t.shape), torch.linalg.slogdet(jacobian).logabsdet


@torch.no_grad()
def few_call_nll(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise | None = None,
    *,
    cond: Condition | None = None,
    prior: Prior | None = None,
    dequantizer: Dequantizer | None = None,
) -> NLL:
    """−log p(x_1) − Σ log|det ∂X_{t→s}/∂x_t| − log|det dx_0/dx| over the steps of ``levels``, from data to noise.

    x_0 = alpha_0 x at levels[0], x_1 at levels[-1]; log-SNR is finite at all of them. ``x`` (B, ...) is in the model's
    units; discrete data need a ``dequantizer``, which adds log q. The parts are those of `ode_nll`; ``calls`` counts
    the network's calls, not their backward passes. Raises `ConfigError`.
    """
    z, log_q = dequantize(x, noise, dequantizer)
    x_t, log_det = z * broadcast_like(levels[0].alpha, z), z.new_zeros(len(z))
    for t, s in pairwise(levels):
        moved, step = flow_map_log_det(denoise, x_t.to(x.dtype), t, s, cond)
        x_t, log_det = moved, log_det + step
    decoder = log_q - x[0].numel() * math.log(float(levels[0].alpha))
    return make_nll(-prior_log_prob(x_t, levels[-1], prior), -log_det, decoder, len(levels) - 1, z.new_zeros(len(z), 0))

"""An estimate of −log p(x) by a few calls of a flow map, from data to noise.

A step moves x to X_{t→s}(x) and returns the integral of the flow's divergence on the way, which the map has learned
beside it. It is neither a bound nor a density: both are those of the flow only as far as the map has learned them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.denoising.two_times import MapDenoiser, map_log_det, pair_at, predict_to_with_slope
from undiffuse.likelihood.dequantization import Dequantizer, dequantize
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.prior import Prior, prior_log_prob
from undiffuse.process.seeded_noise import Noise


@torch.no_grad()
def few_call_nll(
    denoise: MapDenoiser,
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
    units; discrete data need a ``dequantizer``, which adds log q. The parts are those of `ode_nll`, with the
    determinant of `map_log_det`. Raises `ConfigError`.
    """
    z, log_q = dequantize(x, noise, dequantizer)
    x_t, log_det = z * broadcast_like(levels[0].alpha, z), z.new_zeros(len(z))
    for t, s in pairwise(levels):
        prediction, slope = predict_to_with_slope(denoise, x_t.to(x.dtype), t, s, cond)
        x_t, log_det = pair_at(prediction, s).double(), log_det + map_log_det(slope, t, s)
    decoder = log_q - x[0].numel() * math.log(float(levels[0].alpha))
    return make_nll(-prior_log_prob(x_t, levels[-1], prior), -log_det, decoder, len(levels) - 1, z.new_zeros(len(z), 0))

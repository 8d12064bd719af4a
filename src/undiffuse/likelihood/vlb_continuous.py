"""The variational bound in continuous time: an integral over log-SNR [VDM21 §5]."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.likelihood.decoder import Decoder, Density, clean_nll
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import Gaussian, diffuse
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import prior_kl
from undiffuse.process.schedule import Schedule
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_sum
from undiffuse.process.time_sampling import TimeDistribution


def vlb_continuous(
    denoise: Denoiser,
    x: Tensor,
    top: NoiseLevel,
    clean: NoiseLevel,
    noise: Noise,
    u: Tensor,
    *,
    points: int = 32,
    times: TimeDistribution | None = None,
    cond: Condition | None = None,
    decode: Decoder | None = None,
    prior: Gaussian | None = None,
) -> NLL:
    """−log p(x) ≤ KL(q(z_1|x) to p(z_1)) + ½ ∫ E‖eps − ε̂‖² d log_snr − log p(x|z_0) [VDM21 §3.5, §5].

    The limit of `vlb` for infinitely many steps. The integral goes from the log_snr of ``top`` to that of ``clean``,
    two levels of the denoiser's schedule (see `finite_ends`), and depends on nothing else of the schedule.
    ``decode`` gives p(x|z_0), by default the density N(z_0/alpha_0, sigma_0²/alpha_0²) of continuous data.

    The ``points`` times of an item are the quantiles (i + u)/points of the density ``times``, by default uniform in
    log_snr; ``u`` (B,) in [0, 1) is the item's offset, so that no item's value depends on the others'. ``noise(1)``
    gives the eps of each point, then that of the decoder. ``per_step`` (B, points) goes from data to noise; column i
    is an unbiased estimate of the integral between the quantiles i/points and (i + 1)/points. Nats, float64; the
    network gets ``x``'s dtype. Raises `ConfigError`.
    """
    _check_ends(top, clean)
    data, terms = x.double(), []
    levels, width = levels_at_quantiles(denoise.schedule, top, clean, quantiles(u, points), times)
    for i in range(points):
        level, eps = levels.take(i), noise(1)[0].double()
        prediction = denoise(diffuse(data, level, eps).to(x.dtype), level, cond)
        terms.append(0.5 * width[i].to(data) / points * item_sum((eps - prediction.eps.double()) ** 2))
    per_step = torch.stack(terms, 1)
    decode = decode or Density()
    decoder = item_sum(clean_nll(x, clean, noise(1)[0], decode))
    return make_nll(item_sum(prior_kl(data, top, prior)), per_step.sum(1), decoder, points + decode.calls, per_step)


def quantiles(u: Tensor, points: int) -> Tensor:
    """(i + u)/points, (points, B): a low-discrepancy set per item; its i-th number is uniform on its interval.

    The same numbers as those of `time_sampling.low_discrepancy` for the offset u/points.
    """
    return (torch.arange(points, dtype=torch.float64)[:, None] + u.double()) / points


def levels_at_quantiles(
    schedule: Schedule, top: NoiseLevel, clean: NoiseLevel, v: Tensor, times: TimeDistribution | None = None
) -> tuple[NoiseLevel, Tensor]:
    """(levels, |d log_snr/dt|/density) at the quantiles ``v`` of ``times``: the integrand's levels and weights.

    For any ``times`` the mean weight is the range of log_snr. Times outside of the two ends have the weight 0.
    """
    if times is None:
        width = clean.log_snr - top.log_snr
        return schedule(schedule.inverse(clean.log_snr - width * v)), width.expand(v.shape)
    _check_density(times, top, clean)
    drawn = times.sample(v)
    t = drawn.clamp(clean.t, top.t)
    width = torch.exp(torch.log(-schedule.log_snr_rate(t)) - times.log_prob(t))
    return schedule(t), torch.where(t == drawn, width, 0.0)


def _check_ends(top: NoiseLevel, clean: NoiseLevel) -> None:
    low, high = (float(level.log_snr.detach()) for level in (top, clean))
    if not (-torch.inf < low < high < torch.inf):
        cause = "the integral goes from a finite log-SNR to a higher finite one"
        fix = "Give both ends a level with signal and noise, see finite_ends(schedule)"
        raise ConfigError("BOUND_ENDS", f"log_snr from {low:g} to {high:g}", cause, fix)


def _check_density(times: TimeDistribution, top: NoiseLevel, clean: NoiseLevel) -> None:
    probe = clean.t + (top.t - clean.t) * (torch.arange(64, dtype=torch.float64) + 0.5) / 64.37
    if not bool(torch.isfinite(times.log_prob(probe)).all()):
        cause = f"this density of times is 0 in a part of [{float(clean.t):g}, {float(top.t):g}]"
        raise ConfigError("TIMES", repr(times), cause, "Use a density that covers the range, or none")

"""The variational bound in continuous time: an integral over log-SNR [VDM21 §5]."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.likelihood.discrete import Edges, clean_nll, flat_sum, prior_kl
from undiffuse.likelihood.nll import NLL, nll
from undiffuse.process.gaussian import Gaussian, diffuse
from undiffuse.process.level import NoiseLevel
from undiffuse.process.schedule import Schedule
from undiffuse.process.times import Times
from undiffuse.randomness import Noise

FAINT = -20.0
"""log-SNR at which an endless schedule is cut: there an item of |x| = 1 costs the prior 1.03e-9 nats a dimension."""


def vlb_continuous(
    denoise: Denoiser,
    x: Tensor,
    top: NoiseLevel,
    clean: NoiseLevel,
    noise: Noise,
    u: Tensor,
    *,
    points: int = 32,
    times: Times | None = None,
    cond: Condition | None = None,
    edges: Edges | None = None,
    prior: Gaussian | None = None,
) -> NLL:
    """−log p(x) ≤ KL(q(z_1|x) to p(z_1)) + ½ ∫ E‖eps − ε̂‖² d log_snr − log p(x|z_0) [VDM21 §3.5, §5].

    The integral goes from ``top``'s log_snr to ``clean``'s, both levels of the denoiser's schedule (see
    `finite_ends`); p(x|z_0) is N(z_0/alpha_0, sigma_0²/alpha_0²), of the bins ``edges`` or a density. No other
    trait of the schedule has a part in it. It is the limit of `vlb` for ever finer steps.

    An item's ``points`` times are the quantiles (i + u)/points of the density ``times``, by default uniform in
    log_snr, and ``u`` (B,) in [0, 1) is its offset: they cover the density, and no item's value depends on the
    others'. ``noise(1)`` gives each point's eps, and the decoder's last. ``per_step`` (B, points) goes from data to
    noise; column i is an unbiased estimate of the integral's share between the quantiles i/points and
    (i + 1)/points. Float64 nats; the network sees ``x``'s dtype. Raises `ConfigError`.
    """
    _check_ends(top, clean)
    data, shares = x.double(), []
    levels, width = spread(denoise.schedule, top, clean, quantiles(u, points), times)
    for i in range(points):
        level, eps = levels.take(i), noise(1)[0].double()
        prediction = denoise(diffuse(data, level, eps).to(x.dtype), level, cond)
        shares.append(0.5 * width[i].to(data) / points * flat_sum((eps - prediction.eps.double()) ** 2))
    per_step = torch.stack(shares, 1)
    decoder = flat_sum(clean_nll(data, clean, noise(1)[0].double(), edges))
    return nll(flat_sum(prior_kl(data, top, prior)), per_step.sum(1), decoder, points, per_step)


@torch.no_grad()
def finite_ends(schedule: Schedule) -> tuple[NoiseLevel, NoiseLevel]:
    """(top, clean): the levels at t = 1, or where log_snr is `FAINT` if it is −∞ there, and at t_min.

    A table that ends without signal is cut one step before, at t = 1 − 1/T.
    """
    top = schedule(1.0)
    if not bool(torch.isfinite(top.log_snr)):
        top = schedule(schedule.inverse(FAINT))
    return top, schedule(schedule.t_min)


def quantiles(u: Tensor, points: int) -> Tensor:
    """(i + u)/points, (points, B): a low-discrepancy set an item, whose i-th number is uniform on its own interval.

    The numbers are those of `times.low_discrepancy` for the offset u/points.
    """
    return (torch.arange(points, dtype=torch.float64)[:, None] + u.double()) / points


def spread(
    schedule: Schedule, top: NoiseLevel, clean: NoiseLevel, v: Tensor, times: Times | None = None
) -> tuple[NoiseLevel, Tensor]:
    """The levels at the quantiles ``v`` of ``times``, and |d log_snr/dt|/density: of mean top to clean, whatever times.

    What falls outside of the ends has the weight 0.
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


def _check_density(times: Times, top: NoiseLevel, clean: NoiseLevel) -> None:
    probe = clean.t + (top.t - clean.t) * (torch.arange(64, dtype=torch.float64) + 0.5) / 64.37
    if not bool(torch.isfinite(times.log_prob(probe)).all()):
        cause = f"this density of times leaves a part of [{float(clean.t):g}, {float(top.t):g}] out"
        raise ConfigError("TIMES", repr(times), cause, "Use one that covers it, or none")

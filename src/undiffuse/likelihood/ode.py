"""−log p(x) by the probability flow: an ordinary differential equation that carries data to noise.

Only the two ends of a schedule matter, not how its levels are spread between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.errors import ConfigError
from undiffuse.likelihood.dequantise import Dequantiser
from undiffuse.likelihood.discrete import flat_sum
from undiffuse.likelihood.divergence import check_exact, divergence, signs
from undiffuse.likelihood.integrate import Integrator, clock, log_snr_at
from undiffuse.likelihood.nll import NLL, nll
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import Schedule
from undiffuse.randomness import Noise
from undiffuse.sample import prior_scale

ADAPTIVE = Integrator()
Prior = Gaussian | Callable[[Tensor], Tensor]
"""A Gaussian, or a function of x_T (B, ...) that gives log p(x_T), (B,)."""


class Carried(NamedTuple):
    """Where the flow carries items: ``x`` (B, ...), ``log_det`` (B,) of the map's Jacobian, ``calls`` (B,)."""

    x: Tensor
    log_det: Tensor
    calls: Tensor


@torch.no_grad()
def ode_nll(
    denoise: Denoiser,
    x: Tensor,
    top: NoiseLevel,
    clean: NoiseLevel,
    noise: Noise | None = None,
    *,
    cond: Condition | None = None,
    trace: str = "exact",
    probes: int = 1,
    integrator: Integrator = ADAPTIVE,
    prior: Prior | None = None,
    dequantise: Dequantiser | None = None,
) -> NLL:
    """−log p(x) = −log p(x_1) − log|det dx_1/dx_0| − log|det dx_0/dx|, x_0 = alpha_0 x [Song21 eq. 39].

    x_0 is at the level ``clean`` and x_1 at ``top``, both of the denoiser's schedule (see `finite_ends`); p(x) is the
    density of x_0/alpha_0, as what a sampler draws. ``x`` (B, ...) is in the codec's units. Discrete data need
    ``dequantise``, which adds log q and makes the result a bound. ``prior`` is N(0, I), or N(0, sigma_1²) where the
    schedule does not preserve variance, unless given.

    ``trace`` is ``"exact"`` or ``"hutchinson"``: an unbiased estimate from ``probes`` random signs, the same all
    along the path. ``noise`` gives the dequantiser's numbers, then the probes; without either it is not needed.
    The tolerances of ``integrator`` are those of x_t/√(alpha² + sigma²) and of the log-determinant per dimension.

    Nats, float64; the network sees ``x``'s dtype. The three terms are ``prior``, ``steps`` and (with log q)
    ``decoder``; ``calls`` is the mean over the items, rounded up (`carry` knows each item's); ``per_step`` is (B, 0).
    Raises `ConfigError` and `NonFiniteError`.
    """
    z, log_q = (x.double(), torch.zeros(len(x), dtype=torch.float64)) if dequantise is None else dequantise(x, noise)
    dims = x[0].numel()
    top, clean = _still(top), _still(clean)
    signs_ = None
    if trace == "exact":
        check_exact(dims)
    elif trace == "hutchinson" and noise is not None and probes > 0:
        signs_ = signs(noise(probes))
    else:
        raise ConfigError(
            "TRACE",
            f"trace = {trace!r}, probes = {probes}",
            "no such trace" if noise is not None else "there is no noise to estimate it from",
            "Use 'exact', or 'hutchinson' with noise and one probe or more",
        )
    x_0 = z * like(clean.alpha, z)
    end = carry(denoise, x_0, clean, top, cond=cond, probes=signs_, integrator=integrator, dtype=x.dtype)
    decoder = log_q.to(z) - dims * math.log(float(clean.alpha))
    calls = math.ceil(float(end.calls.double().mean()))
    return nll(-prior_log_prob(end.x, top, prior), -end.log_det, decoder, calls, decoder.new_zeros(len(x), 0))


def prior_log_prob(x: Tensor, level: NoiseLevel, prior: Prior | None = None) -> Tensor:
    """log p(x_T), (B,) nats: of N(0, I) or N(0, sigma_T²) unless ``prior`` is given."""
    if prior is None:
        prior = Gaussian(torch.zeros_like(x), torch.full_like(x, 2 * math.log(prior_scale(level))))
    return flat_sum(prior.log_prob(x)) if isinstance(prior, Gaussian) else prior(x)


@torch.no_grad()
def carry(
    denoise: Denoiser,
    x_s: Tensor,
    s: NoiseLevel,
    t: NoiseLevel,
    *,
    cond: Condition | None = None,
    probes: Tensor | None = None,
    integrator: Integrator = ADAPTIVE,
    dtype: torch.dtype | None = None,
) -> Carried:
    """x_t and log|det dx_t/dx_s| of the probability flow's map from level s to t [Song21 eq. 13; Chen18 eq. 8].

    With r² = alpha² + sigma² and the angle tan(θ) = sigma/alpha, x_t/r = cos(θ) x̂ + sin(θ) ε̂ moves at
    cos(θ) ε̂ − sin(θ) x̂ an angle, whatever the schedule; dθ/du = sin(θ) on the clock of `integrate`. ``x_s`` (B, ...);
    ``probes`` (P, B, ...) estimate the divergence, which is exact without them; the network sees ``dtype``, by
    default x_s's. The denoiser is told levels of its own schedule.
    """
    schedule, shape, dims = denoise.schedule, x_s.shape[1:], x_s[0].numel()
    dtype, s, t = dtype or x_s.dtype, _still(s), _still(t)
    _check_ends(schedule, s, t)
    if float(t.alpha) == 0:
        _check_answer(denoise(x_s[:1].to(dtype), t, cond and cond.take(slice(1))))
    flat_probes = None if probes is None else probes.to(x_s.device).double().flatten(2)

    def rate(items: Tensor, u: Tensor, y: Tensor) -> Tensor:
        level = schedule(schedule.inverse(log_snr_at(u)))
        at = level.like(y)
        r = torch.hypot(at.alpha, at.sigma)
        with torch.enable_grad():
            place = y[:, :-1].detach().requires_grad_()
            x_t = (r * place).reshape(-1, *shape).to(dtype)
            x, eps = (p.double().flatten(1) for p in denoise(x_t, level, cond and cond.take(items))[:2])
            move = at.sigma / r * (at.alpha / r * eps - at.sigma / r * x)
            spread = divergence(move, place, None if flat_probes is None else flat_probes[:, items])
        return torch.cat([move.detach(), spread[:, None] / dims], 1)

    r_s, r_t = (float(torch.hypot(v.alpha, v.sigma)) for v in (s, t))
    start = torch.cat([x_s.double().flatten(1) / r_s, x_s.new_zeros(len(x_s), 1, dtype=torch.float64)], 1)
    y, calls = integrator(rate, start, float(clock(s.log_snr)), float(clock(t.log_snr)))
    log_det = dims * (y[:, -1] + math.log(r_t / r_s))
    return Carried(r_t * y[:, :-1].reshape(x_s.shape), log_det, calls)


def _still(level: NoiseLevel) -> NoiseLevel:
    """The level outside the graph of a learned schedule."""
    return NoiseLevel(level.t.detach(), level.alpha.detach(), level.sigma.detach(), level.log_snr.detach())


def _check_ends(schedule: Schedule, s: NoiseLevel, t: NoiseLevel) -> None:
    """Raises `ConfigError` where ``schedule`` has no way from ``s`` to ``t``."""
    where = f"from t = {float(s.t):g} to {float(t.t):g}"
    if float(s.t) < schedule.t_min * (1 - 1e-9) or not math.isfinite(float(s.log_snr)):
        cause = "at the clean end the model knows no density: there is no noise, or less than it was trained with"
        raise ConfigError("ODE_END", where, cause, f"Begin at t = {schedule.t_min:g}, see finite_ends(schedule)")
    if not float(t.log_snr) < float(s.log_snr):
        raise ConfigError("ODE_END", where, "the flow goes from the cleaner level to the noisier", "Exchange them")
    if schedule.steps and float(t.alpha) == 0:
        cause = "a table whose last level has no signal is not continuous in its last step"
        raise ConfigError("ODE_END", where, cause, f"End at t = {1 - 1 / schedule.steps:g}")


def _check_answer(said: Prediction) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in said[:2]):
        cause = "the model does not say what x is where there is no signal"
        fix = "End at a level with some, such as t = 0.999, or use a model with the target 'v' or 'x'"
        raise ConfigError("ODE_END", "the noisy end", cause, fix)

"""−log p(x) by the probability flow, an ordinary differential equation that maps data to noise.

Of a schedule only its two ends matter, not the levels between them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.errors import ConfigError
from undiffuse.likelihood.dequantization import Dequantizer, dequantize
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.ode_integrator import Integrator, flow_time, flow_velocity, log_snr_at_flow_time, radius
from undiffuse.process.prior import Prior, prior_log_prob
from undiffuse.process.schedule import Schedule
from undiffuse.process.seeded_noise import Noise

ADAPTIVE = Integrator()
EXACT_TRACE_LIMIT = 4096
"""Largest number of dimensions of an item for the exact trace."""

# --- the likelihood ---------------------------------------------------------------------------------------------------


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
    dequantizer: Dequantizer | None = None,
) -> NLL:
    """−log p(x) = −log p(x_1) − log|det dx_1/dx_0| − log|det dx_0/dx|, x_0 = alpha_0 x [Song21 eq. 39].

    x_0 is at the level ``clean`` and x_1 at ``top``, both of the denoiser's schedule (see `finite_ends`); p(x) is the
    density of x_0/alpha_0, that of samples. ``x`` (B, ...) is in the model's units. Discrete data need a
    ``dequantizer``, which adds log q and makes the result a bound. ``prior`` is by default N(0, I), or
    N(0, sigma_1²) if the schedule does not preserve variance.

    ``trace`` is ``"exact"`` or ``"hutchinson"``: an unbiased estimate from ``probes`` random signs, the same along
    the whole path. ``noise`` gives the dequantizer's numbers, then the probes; without either it is not needed.
    The tolerances of ``integrator`` are those of x_t/√(alpha² + sigma²) and of the log-determinant per dimension.

    Nats, float64; the network gets ``x``'s dtype. The three terms are ``prior``, ``diffusion_nats`` and (with log q)
    ``decoder``; ``calls`` is the mean over the items, rounded up (`integrate_flow` returns each item's);
    ``per_step`` is (B, 0). Raises `ConfigError` and `NonFiniteError`.
    """
    z, log_q = dequantize(x, noise, dequantizer)
    dims = x[0].numel()
    top, clean = detach_level(top), detach_level(clean)
    probe_signs = None
    if trace == "exact":
        check_exact_trace(dims)
    elif trace == "hutchinson" and noise is not None and probes > 0:
        probe_signs = rademacher(noise(probes))
    else:
        raise ConfigError(
            "TRACE",
            f"trace = {trace!r}, probes = {probes}",
            "no such trace" if noise is not None else "there is no noise to estimate it from",
            "Use 'exact', or 'hutchinson' with noise and one probe or more",
        )
    x_0 = z * broadcast_like(clean.alpha, z)
    end = integrate_flow(denoise, x_0, clean, top, cond=cond, probes=probe_signs, integrator=integrator, dtype=x.dtype)
    decoder = log_q - dims * math.log(float(clean.alpha))
    calls = math.ceil(float(end.calls.double().mean()))
    return make_nll(-prior_log_prob(end.x, top, prior), -end.log_det, decoder, calls, decoder.new_zeros(len(x), 0))


# --- the flow ---------------------------------------------------------------------------------------------------------


class FlowResult(NamedTuple):
    """The flow's end points: ``x`` (B, ...), ``log_det`` (B,) of the map's Jacobian, ``calls`` (B,)."""

    x: Tensor
    log_det: Tensor
    calls: Tensor


@torch.no_grad()
def integrate_flow(
    denoise: Denoiser,
    x_s: Tensor,
    s: NoiseLevel,
    t: NoiseLevel,
    *,
    cond: Condition | None = None,
    probes: Tensor | None = None,
    integrator: Integrator = ADAPTIVE,
    dtype: torch.dtype | None = None,
) -> FlowResult:
    """x_t and log|det dx_t/dx_s| of the probability flow's map from level s to t [Song21 eq. 13; Chen18 eq. 8].

    With r² = alpha² + sigma² and tan(θ) = sigma/alpha, y = x_t/r = cos(θ) x̂ + sin(θ) ε̂ obeys
    dy/dθ = cos(θ) ε̂ − sin(θ) x̂ for any schedule; dθ/du = sin(θ) in the flow time u of `ode_integrator`.
    ``x_s`` (B, ...); ``probes`` (P, B, ...) estimate the divergence, which is exact without them; the network gets
    ``dtype``, by default x_s's. The denoiser is called with levels of its own schedule.
    """
    schedule, shape, dims = denoise.schedule, x_s.shape[1:], x_s[0].numel()
    dtype, s, t = dtype or x_s.dtype, detach_level(s), detach_level(t)
    _check_ends(schedule, s, t)
    if float(t.alpha) == 0:
        _check_finite_prediction(denoise(x_s[:1].to(dtype), t, cond and cond.take(slice(1))))
    flat_probes = None if probes is None else probes.to(x_s.device).double().flatten(2)

    def derivative(items: Tensor, u: Tensor, y: Tensor) -> Tensor:
        level = schedule(schedule.inverse(log_snr_at_flow_time(u)))
        r = broadcast_like(radius(level), y)
        with torch.enable_grad():
            position = y[:, :-1].detach().requires_grad_()
            x_t = (r * position).reshape(-1, *shape).to(dtype)
            x, eps = (p.double().flatten(1) for p in denoise(x_t, level, cond and cond.take(items))[:2])
            velocity = flow_velocity(x, eps, level)
            trace = divergence(velocity, position, None if flat_probes is None else flat_probes[:, items])
        return torch.cat([velocity.detach(), trace[:, None] / dims], 1)

    r_s, r_t = (float(radius(v)) for v in (s, t))
    start = torch.cat([x_s.double().flatten(1) / r_s, x_s.new_zeros(len(x_s), 1, dtype=torch.float64)], 1)
    y, calls = integrator(derivative, start, float(flow_time(s.log_snr)), float(flow_time(t.log_snr)))
    log_det = dims * (y[:, -1] + math.log(r_t / r_s))
    return FlowResult(r_t * y[:, :-1].reshape(x_s.shape), log_det, calls)


def detach_level(level: NoiseLevel) -> NoiseLevel:
    """The level outside the graph of a learned schedule."""
    return NoiseLevel(level.t.detach(), level.alpha.detach(), level.sigma.detach(), level.log_snr.detach())


def _check_ends(schedule: Schedule, s: NoiseLevel, t: NoiseLevel) -> None:
    """Raises `ConfigError` if the flow of ``schedule`` cannot go from ``s`` to ``t``."""
    where = f"from t = {float(s.t):g} to {float(t.t):g}"
    if float(s.t) < schedule.t_min * (1 - 1e-9) or not math.isfinite(float(s.log_snr)):
        cause = "the model has no density at the clean end: no noise, or less than in training"
        raise ConfigError("ODE_END", where, cause, f"Begin at t = {schedule.t_min:g}, see finite_ends(schedule)")
    if not float(t.log_snr) < float(s.log_snr):
        raise ConfigError("ODE_END", where, "the flow goes from the cleaner level to the noisier", "Exchange the ends")
    if schedule.chain_length and float(t.alpha) == 0:
        cause = "a table whose last level has no signal is not continuous in its last step"
        raise ConfigError("ODE_END", where, cause, f"End at t = {1 - 1 / schedule.chain_length:g}")


def _check_finite_prediction(prediction: Prediction) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in prediction[:2]):
        cause = "the model does not predict a finite x where there is no signal"
        fix = "End at a level with signal, such as t = 0.999, or use a model with the target 'v' or 'x'"
        raise ConfigError("ODE_END", "the noisy end", cause, fix)


# --- the divergence ---------------------------------------------------------------------------------------------------


def divergence(value: Tensor, at: Tensor, probes: Tensor | None = None) -> Tensor:
    """tr J = Σ_i ∂value_i/∂at_i of each row, (b,); with ``probes`` (P, b, n) the mean of eᵀ J e [Hutchinson90].

    ``value`` (b, n) is in the graph of ``at`` (b, n), each row a function of its own row only. Each dimension, or
    each probe, takes one backward pass.
    """
    total = at.new_zeros(len(at))
    if probes is None:
        for i in range(at.shape[1]):
            total = total + _vjp(value[:, i].sum(), at)[:, i]
        return total
    for probe in probes:
        total = total + (_vjp((value * probe).sum(), at) * probe).sum(1)
    return total / len(probes)


def _vjp(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def rademacher(noise: Tensor) -> Tensor:
    """Rademacher probes e, 1 where ``noise`` is above 0 and −1 elsewhere, float64: eᵀ e is always n."""
    return torch.where(noise > 0, 1.0, -1.0).double()


def check_exact_trace(dims: int) -> None:
    """Raises `ConfigError` if the exact trace would take more than `EXACT_TRACE_LIMIT` backward passes per call."""
    if dims > EXACT_TRACE_LIMIT:
        raise ConfigError(
            "TRACE",
            "trace = 'exact'",
            f"every call needs a backward pass for each of an item's {dims:,} dimensions",
            f"Use trace='hutchinson', or items of at most {EXACT_TRACE_LIMIT:,} dimensions",
        )

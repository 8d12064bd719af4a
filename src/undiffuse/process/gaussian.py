"""Gaussians of the forward and the reverse process, as functions of two noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import (
    NoiseLevel,
    broadcast_like,
    broadcast_together,
    log_var_large,
    log_var_small,
    transition_frac,
)

Variance = str | Callable[[NoiseLevel, NoiseLevel], Tensor]
"""``"small"``, ``"large"``, ``"learned"``, or a function of (t, s) that returns the log-variance."""


class Gaussian(NamedTuple):
    """A diagonal Gaussian; ``log_var`` broadcasts to ``mean``. Results are per element, in nats."""

    mean: Tensor
    log_var: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """x = mean + exp(log_var/2) noise."""
        return self.mean + torch.exp(0.5 * self.log_var) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = −½ (log 2π + log_var + (x − mean)² exp(−log_var))."""
        return -0.5 * (math.log(2 * math.pi) + self.log_var + (x - self.mean) ** 2 * torch.exp(-self.log_var))

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self to other) = ½ (expm1(d) − d + (mean − mean')² exp(−log_var')), d = log_var − log_var'."""
        d = self.log_var - other.log_var
        return 0.5 * (torch.expm1(d) - d + (self.mean - other.mean) ** 2 * torch.exp(-other.log_var))

    def times(self, other: Gaussian) -> tuple[Gaussian, Tensor]:
        """(N(mean, var), log Z) of self(x) other(x) = Z N(x; mean, var).

        1/var = 1/var' + 1/var'', mean = var (mean'/var' + mean''/var''), Z = N(mean'; mean'', var' + var'').
        ``log_var`` = inf is the constant factor 1 (log Z = 0), −inf a point mass. For two point masses at different
        places log Z is −inf and the mean lies halfway.
        """
        weight = torch.sigmoid(torch.nan_to_num(self.log_var - other.log_var))
        product = Gaussian(torch.lerp(self.mean, other.mean, weight), -torch.logaddexp(-self.log_var, -other.log_var))
        spread = torch.logaddexp(self.log_var, other.log_var)
        gap = (self.mean - other.mean) ** 2
        far = torch.where(gap > 0, gap * torch.exp(-spread), 0)
        log_z = -0.5 * (math.log(2 * math.pi) + spread + far)
        return product, torch.where(spread == math.inf, 0, torch.where(far == math.inf, -math.inf, log_z))

    def bin_log_prob(self, edges: tuple[Tensor, Tensor]) -> Tensor:
        """log(Φ((high − mean)/std) − Φ((low − mean)/std)) in float64, for bins of any width.

        ``edges`` = (low, high), low < high, each of ``mean``'s shape, possibly infinite. A bin above the mean is
        mirrored, so that log Φ is evaluated where it is accurate: log(e^b − e^a) = b + log(−expm1(a − b)).
        """
        low, high = mirrored_edges(edges, self.mean.double(), torch.exp(-0.5 * self.log_var.double()))
        a, b = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return b + torch.log(-torch.expm1(a - b))


def mirrored_edges(edges: tuple[Tensor, Tensor], mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) of bins in units of 1/``scale`` from the ``mean``, those of a bin above it mirrored to below."""
    low, high = (_standard_edge(edge.to(mean), mean, scale) for edge in edges)
    above = low > 0
    return torch.where(above, -high, low), torch.where(above, -low, high)


def _standard_edge(edge: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(edge − mean) scale; an infinite edge becomes ±1e15, so that its gradient is 0 and not NaN."""
    finite = torch.isfinite(edge)
    inside = (torch.where(finite, edge, torch.zeros_like(edge)) - mean) * scale
    return torch.where(finite, inside, torch.sign(edge) * 1e15)


class PredictionLike(Protocol):
    """The part of a denoiser's prediction that `reverse` needs."""

    @property
    def x(self) -> Tensor: ...
    @property
    def var_interp(self) -> Tensor | None: ...


def diffuse(x: Tensor, level: NoiseLevel, eps: Tensor) -> Tensor:
    """x_t = alpha x + sigma eps, of ``x``'s shape [Ho20 eq. 4]."""
    at = level.broadcast_like(x)
    return at.alpha * x + at.sigma * eps


def forward_marginal(x: Tensor, level: NoiseLevel) -> Gaussian:
    """q(x_t given x) = N(alpha x, sigma²) of ``x``'s shape, a point mass (log-variance −inf) at data [Ho20 eq. 4]."""
    at = level.broadcast_like(x)
    return Gaussian(at.alpha * x, 2 * torch.log(at.sigma))


def forward(x_s: Tensor, s: NoiseLevel, t: NoiseLevel) -> Gaussian:
    """q(x_t given x_s) = N((alpha_t/alpha_s) x_s, sigma_t² frac), of ``x_s``'s shape (B, ...) [Ho20 eq. 2].

    ``s`` is cleaner than ``t``, both () or (B,); frac is `transition_frac`.
    """
    scale, log_var = broadcast_together([t.alpha / s.alpha, log_var_large(t, s)], x_s)
    return Gaussian(scale * x_s, log_var)


def posterior_scales(t: NoiseLevel, s: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(A, B) of the posterior mean A x_t + B x: A = (alpha_t/alpha_s)(sigma_s/sigma_t)², B = alpha_s frac."""
    return (t.alpha / s.alpha) * (s.sigma / t.sigma) ** 2, s.alpha * transition_frac(t, s)


def posterior(x_t: Tensor, x: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
    """q(x_s given x_t, x) = N((alpha_t/alpha_s)(sigma_s²/sigma_t²) x_t + alpha_s frac x, sigma_s² frac) [Ho20 eq. 7].

    ``x_t`` and ``x`` are (B, ...), ``t`` and the cleaner ``s`` () or (B,); frac is `transition_frac`. Where sigma_s is
    0 the mean is x and the log-variance ``s.final_log_var`` (see `log_var_small`).
    """
    a, b, log_var = broadcast_together([*posterior_scales(t, s), log_var_small(t, s)], x_t)
    return Gaussian(a * x_t + b * x, log_var)


def reverse(
    prediction: PredictionLike,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    variance: Variance = "small",
    first_large: str = "beta",
) -> Gaussian:
    """p(x_s given x_t) = N(A x_t + B x̂, exp(log_var)), the `posterior` at the predicted x̂ [Ho20 eq. 11, §3.2].

    ``variance`` is ``"small"`` (sigma_s² frac), ``"large"`` (sigma_t² frac, Ho's beta_t), ``"learned"`` (their logs
    interpolated by the prediction's ``var_interp``) [Nichol21 eq. 15], or a function of (t, s) that returns the
    log-variance, of any shape that broadcasts to ``x_t``. ``first_large="clipped"`` uses the small variance in the
    step that ends in data, as improved-diffusion does. Raises `ConfigError`.
    """
    a, b = broadcast_together(posterior_scales(t, s), x_t)
    return Gaussian(a * x_t + b * prediction.x, step_log_var(x_t, t, s, variance, prediction.var_interp, first_large))


def step_log_var(
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    variance: Variance = "small",
    var_interp: Tensor | None = None,
    first_large: str = "beta",
) -> Tensor:
    """The log-variance of the reverse step from t to s in ``x_t``'s dtype; see `reverse`."""
    if callable(variance):
        log_var = variance(t, s)
        if log_var.shape == t.t.shape:
            return broadcast_like(log_var, x_t)
        return log_var.to(x_t.device, torch.promote_types(x_t.dtype, torch.float32))
    small, large = log_var_small(t, s), log_var_large(t, s)
    if variance == "small":
        return broadcast_like(small, x_t)
    if variance == "large":
        if first_large not in ("beta", "clipped"):
            raise ConfigError(
                "FIRST_LARGE",
                repr(first_large),
                "unknown",
                "Use 'beta' or 'clipped'",
            )
        return broadcast_like(large if first_large == "beta" else torch.where(s.sigma > 0, large, small), x_t)
    if variance == "learned":
        if var_interp is None:
            raise ConfigError(
                "VARIANCE",
                "variance='learned'",
                "this model does not predict a variance",
                "Use 'small' or 'large', or train with a learned variance",
            )
        small, large = broadcast_together([small, large], x_t)
        return var_interp * large + (1 - var_interp) * small
    raise ConfigError(
        "VARIANCE", f"variance={variance!r}", "unknown", "Use 'small', 'large', 'learned' or a function of (t, s)"
    )

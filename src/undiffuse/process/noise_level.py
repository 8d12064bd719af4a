"""Noise levels: pairs (alpha, sigma) with x_t = alpha x + sigma eps, and the variances of a step between two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.runtime.device import to_device


class NoiseLevel(NamedTuple):
    """One noise level, or a batch of them: float64 on the CPU, of shape () or (B,).

    ``t`` in [0, 1] (0 data, 1 noise); ``alpha`` and ``sigma`` are scales; ``log_snr`` is log(alpha²/sigma²).
    ``final_log_var``: log-variance to use for the last step, where sigma_s = 0 would give −inf; set by `chain` to the
    previous step's value (Ho et al.'s clipping). ``frac_fn``: the schedule's own formula for `transition_frac` of two
    times, which keeps the digits that a difference of log-SNRs loses.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    final_log_var: Tensor | None = None
    frac_fn: Callable[[Tensor, Tensor], Tensor] | None = None

    def broadcast_like(self, x: Tensor) -> NoiseLevel:
        """The level in ``x``'s dtype (at least float32), on its device, shaped to broadcast with it."""
        t, alpha, sigma, log_snr, *final = broadcast_together([v for v in self if isinstance(v, Tensor)], x)
        return NoiseLevel(t, alpha, sigma, log_snr, final[0] if final else None, self.frac_fn)

    def take(self, items: Tensor | slice | int) -> NoiseLevel:
        """The levels of the given ``items`` of a batch."""
        return NoiseLevel(*(v[items] if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]


def vp_level(t: Tensor, log_snr: Tensor) -> NoiseLevel:
    """alpha² = sigmoid(log_snr), sigma² = sigmoid(−log_snr): the variance-preserving level."""
    return NoiseLevel(t, torch.exp(0.5 * logsigmoid(log_snr)), torch.exp(0.5 * logsigmoid(-log_snr)), log_snr)


def stack(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    """A chain's single ``levels`` as one batch, with the ``final_log_var`` of the last."""
    t, alpha, sigma, log_snr = (torch.stack(column) for column in zip(*(level[:4] for level in levels), strict=True))
    final = levels[-1].final_log_var
    final = None if final is None else final.expand(len(levels))
    return NoiseLevel(t, alpha, sigma, log_snr, final, levels[0].frac_fn)


def as_float64(value: Tensor | float | Sequence[float]) -> Tensor:
    """``value`` as float64 on the CPU, detached."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def check_time(t: Tensor | float) -> Tensor:
    """``t`` as float64 on the CPU. Raises ValueError unless every time is in [0, 1]."""
    t = as_float64(t)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"a time must be in [0, 1], 0 for data and 1 for noise; got {t.flatten()[:3].tolist()}")
    return t


def broadcast_like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in ``x``'s dtype (at least float32), on its device; (B,) becomes (B, 1, ..., 1), () (1, ..., 1).

    A tensor of shape () would not do: torch would then compute in the dtype of a bfloat16 ``x``.
    """
    value = to_device(value, x.device, torch.promote_types(x.dtype, torch.float32))
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def broadcast_together(values: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """`broadcast_like` of each of the ``values``, which are on the CPU, with one conversion and one copy for all."""
    stacked = torch.stack(torch.broadcast_tensors(*values))
    stacked = to_device(stacked, x.device, torch.promote_types(x.dtype, torch.float32))
    return list(stacked.reshape(stacked.shape + (1,) * (x.ndim + 1 - stacked.ndim)).unbind())


def transition_frac(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """frac = −expm1(log_snr_t − log_snr_s), the posterior variance divided by sigma_s² [VDM21 app. A; Ho20 eq. 7].

    In [0, 1] for ``s`` cleaner than ``t``; 1 where s has sigma 0; beta_t/(1 − alpha_bar_t) for neighbours of a table.
    For two levels of one schedule it is the schedule's own formula, ``frac_fn``.
    """
    if t.frac_fn is not None and t.frac_fn == s.frac_fn:
        return t.frac_fn(t.t, s.t).clamp(max=1)
    return -torch.expm1(t.log_snr - s.log_snr)


def log_var_large(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """log(sigma_t² frac), the log-variance of q(x_t given x_s); log beta_t in a table [Ho20 eq. 2, §3.2]."""
    return 2 * torch.log(t.sigma) + torch.log(transition_frac(t, s))


def log_var_small(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """log(sigma_s² frac), the posterior log-variance [Ho20 eq. 7]; ``s.final_log_var`` where sigma_s is 0.

    If that is None (a chain of one step), `log_var_large` there: log beta_1.
    """
    final = log_var_large(t, s) if s.final_log_var is None else s.final_log_var
    return torch.where(s.sigma > 0, 2 * torch.log(s.sigma) + torch.log(transition_frac(t, s)), final)


def check_ascending(low: float, high: float, low_name: str, high_name: str) -> None:
    """Raise `ConfigError` unless both are finite and ``low`` is below ``high``."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            "SCHEDULE",
            f"{low_name} = {low:g}, {high_name} = {high:g}",
            f"{low_name} must be below {high_name}",
            "The log-SNR of a schedule falls from data to noise",
        )

"""A noise level is a pair (alpha, sigma): x_t = alpha x + sigma eps. Everything else follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError


class NoiseLevel(NamedTuple):
    """One noise level, or a batch of them: float64 on the CPU, of shape () or (B,).

    ``t`` in [0, 1] (0 data, 1 noise); ``alpha`` and ``sigma`` are scales; ``log_snr`` is
    log(alpha²/sigma²). ``floor`` is what the log of the small variance becomes in a step that ends
    at this level where its sigma is 0: the value of the chain's next noisier step. ``between`` is its
    schedule's own formula of `frac` for two times, which keeps the digits that a difference of
    log-SNRs loses.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    floor: Tensor | None = None
    between: Callable[[Tensor, Tensor], Tensor] | None = None

    def like(self, x: Tensor) -> NoiseLevel:
        """The level in ``x``'s dtype (float32 at least), on its device, shaped to broadcast to it."""
        return NoiseLevel(*(like(v, x) if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]

    def take(self, items: Tensor | slice | int) -> NoiseLevel:
        """The levels of some ``items`` of a batch."""
        return NoiseLevel(*(v[items] if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]


def preserving(t: Tensor, log_snr: Tensor) -> NoiseLevel:
    """The variance-preserving level of a ``log_snr``: alpha² = sigmoid(log_snr), sigma² = sigmoid(−log_snr)."""
    return NoiseLevel(t, torch.exp(0.5 * logsigmoid(log_snr)), torch.exp(0.5 * logsigmoid(-log_snr)), log_snr)


def stack(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    """The batch of a chain's single ``levels``, with the floor of its last."""
    t, alpha, sigma, log_snr = (torch.stack(column) for column in zip(*(level[:4] for level in levels), strict=True))
    floor = levels[-1].floor
    floor = None if floor is None else floor.expand(len(levels))
    return NoiseLevel(t, alpha, sigma, log_snr, floor, levels[0].between)


def double(value: Tensor | float | Sequence[float]) -> Tensor:
    """``value`` as float64 on the CPU, outside any graph."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def time_of(t: Tensor | float) -> Tensor:
    """``t`` as float64 on the CPU. Raises ValueError unless all of it is in [0, 1]."""
    t = double(t)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"a time must be in [0, 1], 0 for data and 1 for noise; got {t.flatten()[:3].tolist()}")
    return t


def like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in ``x``'s dtype (float32 at least) and on its device; (B,) becomes (B, 1, ..., 1), () (1, ..., 1).

    Not even () stays without dimensions: torch would compute in a bfloat16 ``x``'s dtype then.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    value = value.to(device=x.device, dtype=dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def frac(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """frac = −expm1(log_snr_t − log_snr_s), the share of the cleaner variance that a step from t removes.

    In [0, 1] for ``s`` cleaner than ``t``; 1 where s has sigma 0. It is the posterior variance over
    sigma_s², and beta_t/(1 − alpha_bar_t) for neighbours of a table [VDM21 app. A; Ho20 eq. 7]. Two
    levels of one schedule take its own formula, `NoiseLevel.between`.
    """
    if t.between is not None and t.between == s.between:
        return t.between(t.t, s.t).clamp(max=1)
    return -torch.expm1(t.log_snr - s.log_snr)


def log_var_large(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """log(sigma_t² frac), the log-variance of q(x_t given x_s): log beta_t in a table [Ho20 eq. 2, §3.2]."""
    return 2 * torch.log(t.sigma) + torch.log(frac(t, s))


def log_var_small(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """log(sigma_s² frac), the posterior log-variance [Ho20 eq. 7]; ``s.floor`` where sigma_s is 0.

    Without a floor (a chain of one step) it is the large one there: log beta_1.
    """
    floor = log_var_large(t, s) if s.floor is None else s.floor
    return torch.where(s.sigma > 0, 2 * torch.log(s.sigma) + torch.log(frac(t, s)), floor)


def descending(low: float, high: float, low_name: str, high_name: str) -> None:
    """Raises `ConfigError` unless both are finite and ``low`` is below ``high``."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            "SCHEDULE",
            f"{low_name} = {low:g}, {high_name} = {high:g}",
            f"{low_name} must be below {high_name}",
            "The log-SNR of a schedule falls from data to noise",
        )

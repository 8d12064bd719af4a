"""Discrete chains: tables of T + 1 noise levels computed from ``beta`` [Ho20 §2, §4].

Only this module uses ``beta`` and ``alpha_bar``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, as_float64, check_ascending, check_time

MAX_LEARNED_LENGTH = 1000
"""The most steps of a learned chain: every step of it is computed in every step of training."""


class Table:
    """The levels of a chain by its log alpha_bar at t = k/T, between which it is linear: a constant rate of beta.

    log_snr is +inf at t = 0. ``beta`` (T,) and three more tensors are those of a sub-class: ``_log_alpha_bar`` (T + 1,)
    and its rounding errors ``_lost``, and the log-variance ``_final_log_var`` of the last step.
    """

    chain_length: int
    beta: Tensor
    _log_alpha_bar: Tensor
    _lost: Tensor
    _final_log_var: Tensor

    def _position(self, t: Tensor) -> Tensor:
        position = t * self.chain_length
        nearest = position.round()
        return torch.where((position - nearest).abs() < 1e-9 * self.chain_length, nearest, position)

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha_bar at ``t``, and its rounding error."""
        position = self._position(t)
        below = position.floor().long()
        above, on = (below + 1).clamp(max=self.chain_length), position == below
        low, high = self._log_alpha_bar[below], self._log_alpha_bar[above]
        return torch.where(on, low, low + (position - below) * (high - low)), self._lost[below] * on

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        log_alpha_bar, _ = self._at(t)
        variance = -torch.expm1(log_alpha_bar)
        log_snr, final = log_alpha_bar - torch.log(variance), self._final_log_var.expand(t.shape)
        return NoiseLevel(t, torch.exp(0.5 * log_alpha_bar), torch.sqrt(variance), log_snr, final, self.frac_between)

    def frac_between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = −expm1(log alpha_bar_t − log alpha_bar_s)/(1 − alpha_bar_t)."""
        (at_t, lost_t), (at_s, lost_s) = self._at(t), self._at(s)
        return torch.expm1(at_t - at_s + (lost_t - lost_s)) / torch.expm1(at_t)

    @torch.no_grad()
    def inverse(self, log_snr: Tensor | float) -> Tensor:
        depth = -logsigmoid(as_float64(log_snr))
        grid = -self._log_alpha_bar
        k = (torch.searchsorted(grid, depth.contiguous()) - 1).clamp(0, self.chain_length - 1)
        fraction = torch.where(depth == grid[k + 1], 1, (depth - grid[k]) / (grid[k + 1] - grid[k]))
        return ((k + fraction) / self.chain_length).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        level = self(t)
        k = self._position(level.t).ceil().long().clamp(min=1)
        return torch.log1p(-self.beta[k - 1]) * self.chain_length / level.sigma**2


class Tabulated(Table):
    """The chain of a table ``beta`` (T,): each in (0, 1), the last may be 1 [Ho20 eq. 2, 4].

    log alpha_bar_t = Σ log(1 − beta_i) is a compensated sum, whose rounding errors are kept for `frac_between`.
    Raises `ConfigError`.
    """

    def __init__(self, beta: Tensor | Sequence[float]) -> None:
        beta = as_float64(beta)
        if beta.ndim != 1 or not 1 <= len(beta) <= 1_000_000:
            raise ConfigError(
                "SCHEDULE",
                "beta",
                f"expected a list of T numbers, got the shape {tuple(beta.shape)}",
                "Pass one beta per step",
            )
        bad = ~((beta > 0) & (beta < 1))
        bad[-1] &= beta[-1] != 1
        if bad.any():
            k = int(bad.nonzero()[0])
            raise ConfigError(
                "SCHEDULE",
                f"beta[{k}] = {float(beta[k]):g}",
                "every beta must lie in (0, 1), the last may be 1",
                "Correct the table, or use a schedule that fits this T (linear_rescaled, cosine)",
            )
        self.beta, self.chain_length, self.t_min = beta, len(beta), 1.0 / len(beta)
        self._log_alpha_bar, self._lost = compensated_cumsum(torch.log1p(-beta))
        variance = -torch.expm1(self._log_alpha_bar)
        self._final_log_var = torch.log(beta[0] if self.chain_length == 1 else beta[1] * variance[1] / variance[2])

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence if beta falls in a step, or in none rises; the schedules of the literature rise [Ho20 §2]."""
        falls = (self.beta[1:] < self.beta[:-1]).nonzero().flatten()
        if len(falls):
            k = int(falls[0]) + 1
            values = f"beta[{k}] = {float(self.beta[k]):g} after {float(self.beta[k - 1]):g}"
            return (f"the table of beta falls in {len(falls)} of its {self.chain_length} steps, first at {values}",)
        if self.chain_length > 1 and bool(self.beta[0] == self.beta[-1]):
            return (f"the table of beta does not rise: every step has {float(self.beta[0]):g}",)
        return ()


class LearnedChain(nn.Module, Table):
    """beta_k = sigmoid(b_k) for k = 2 ... ``T``, and beta_1 = ``first``, which does not learn [SohlDickstein15 §2.4].

    Any b_k make a chain whose log-SNR falls. At first it falls linearly, from that of beta_1 to ``low``. Levels are
    differentiable in the b_k, which stay float64 on the CPU when the model is cast or moved. Raises `ConfigError`.
    """

    def __init__(self, T: int = 40, first: float = 1e-4, low: float = -5.0) -> None:
        super().__init__()
        if isinstance(T, bool) or not isinstance(T, int) or not 2 <= T <= MAX_LEARNED_LENGTH:
            fix = f"Give a whole number from 2 to {MAX_LEARNED_LENGTH:,}"
            raise ConfigError("SCHEDULE", f"T = {T!r}", "out of range for a learned chain", fix)
        if not 0 < first < 1:
            raise ConfigError("SCHEDULE", f"first = {first:g}", "beta must lie in (0, 1)", "Give a small number")
        high = math.log1p(-first) - math.log(first)
        check_ascending(low, high, "low", "log-SNR after the first step")
        self.chain_length, self.t_min = T, 1.0 / T
        kept = logsigmoid(torch.linspace(high, low, T, dtype=torch.float64)).diff()  # log(1 - beta)
        self.first = as_float64(math.log(first) - math.log1p(-first))
        self.logits = nn.Parameter(torch.log(-torch.expm1(kept)) - kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedChain:
        """Itself, unchanged by ``.to``, ``.cuda`` and ``.bfloat16`` of the model."""
        return self

    @property
    def beta(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.sigmoid(self._all_logits)

    @property
    def _all_logits(self) -> Tensor:
        return torch.cat([self.first[None], self.logits])

    @property
    def _log_alpha_bar(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, logsigmoid(-self._all_logits).cumsum(0)])

    @property
    def _lost(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.zeros(self.chain_length + 1, dtype=torch.float64)

    @property
    def _final_log_var(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        variance = -torch.expm1(self._log_alpha_bar)
        return torch.log(self.beta[1] * variance[1] / variance[2])

    def forward(self, t: Tensor | float) -> NoiseLevel:
        return Table.__call__(self, t)


def compensated_cumsum(terms: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, errors): 0 and the running sums of ``terms``, and the rounding error of each (Neumaier)."""
    sums, total, lost = [(0.0, 0.0)], 0.0, 0.0
    for term in terms.tolist():
        new = total + term
        if math.isfinite(new):
            lost += (total - new) + term if abs(total) >= abs(term) else (term - new) + total
        total, rounded = new, new + lost
        sums.append((rounded, total - rounded + lost if math.isfinite(new) else 0.0))
    high, low = torch.tensor(sums, dtype=torch.float64).unbind(1)
    return high, low


def _length(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or not 1 <= T <= 10_000:
        raise ConfigError(
            "SCHEDULE", f"T = {T}", "the number of steps must be a whole number from 1 to 10,000", "Change T"
        )
    return T


def _line(first: float, last: float, T: int) -> Tensor:
    return torch.linspace(first, last, _length(T), dtype=torch.float64)


def linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """beta linear from ``first`` to ``last`` [Ho20 §4]."""
    return Tabulated(_line(first, last, T))


def linear_rescaled(T: int = 1000, first: float = 1e-4, last: float = 0.02, limit: float = 0.999) -> Tabulated:
    """beta linear with both ends multiplied by 1000/T, at most ``limit`` [Dhariwal21's code]."""
    return Tabulated(_line(first * 1000 / _length(T), last * 1000 / T, T).clamp(max=limit))


def quadratic(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """√beta linear from √``first`` to √``last``; diffusers calls it scaled_linear [Song21 DDIM's code]."""
    return Tabulated(_line(math.sqrt(first), math.sqrt(last), T) ** 2)


def cosine(T: int = 1000, s: float = 0.008, limit: float = 0.999) -> Tabulated:
    """beta_t = 1 − f(t)/f(t−1) ≤ ``limit``, f = cos²(π/2 (t/T + s)/(1 + s)) [Nichol21 eq. 17].

    Computed as beta_t = sin(c_{t−1} − c_t) sin(c_{t−1} + c_t)/sin² c_{t−1} with the complement c_t of the angle, so
    that f = sin² c_t; alpha_bar is the product of 1 − beta after the limit.
    """
    scale = math.pi / 2 / (1 + s) / _length(T)
    c = scale * torch.arange(T, -1, -1, dtype=torch.float64)
    beta = math.sin(scale) * torch.sin(c[:-1] + c[1:]) / torch.sin(c[:-1]) ** 2
    return Tabulated(beta.clamp(max=limit))


def diffusers(
    T: int = 1000,
    first: float = 1e-4,
    last: float = 0.02,
    kind: str = "linear",
    trained: Sequence[float] | None = None,
    zero_end: bool = False,
) -> Tabulated:
    """The table of ``alpha_bar`` that diffusers' DDPMScheduler computes in float32: beta_t = 1 − ᾱ_t/ᾱ_{t−1} of it.

    ``kind`` is its beta_schedule: ``linear``, ``scaled_linear`` (√beta linear), ``squaredcos_cap_v2`` (`cosine`) or
    ``sigmoid`` (beta = first + (last − first)/(1 + e^−z), z linear from −6 to 6), in place of which ``trained`` gives
    every beta. ``zero_end`` (rescale_betas_zero_snr): √ᾱ is shifted and scaled so that the first value stays and the
    last becomes 0 [Lin23 alg. 1].
    """
    T, single = _length(T), torch.float32
    if trained is not None:
        if len(trained) != T:
            raise ConfigError("SCHEDULE", "trained", f"it has {len(trained)} numbers for T = {T}", "Give one per step")
        beta = torch.tensor(trained, dtype=single)
    elif kind == "linear":
        beta = torch.linspace(first, last, T, dtype=single)
    elif kind == "scaled_linear":
        beta = torch.linspace(first**0.5, last**0.5, T, dtype=single) ** 2
    elif kind == "squaredcos_cap_v2":
        bar = [math.cos((k / T + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(T + 1)]
        beta = torch.tensor([min(1 - bar[k + 1] / bar[k], 0.999) for k in range(T)], dtype=single)
    elif kind == "sigmoid":
        beta = torch.sigmoid(torch.linspace(-6, 6, T, dtype=single)) * (last - first) + first
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2 or sigmoid"
        raise ConfigError("SCHEDULE", f"kind {kind!r}", "no such table of diffusers", f"Use {known}")
    if zero_end:
        root = torch.cumprod(1 - beta, 0).double().sqrt().to(single)  # torch's float32 root is not exact on every CPU
        start, end = root[0].clone(), root[-1].clone()
        alpha_bar = ((root - end) * (start / (start - end))) ** 2
        beta = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    alpha_bar = torch.cumprod(1 - beta, 0).double()
    return Tabulated(1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]]))

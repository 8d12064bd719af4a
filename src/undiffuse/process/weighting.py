"""Weights w of the loss w(t, s) ‖eps − ε̂‖².

`Target.weight` converts a weight to the frame of another target. How often training visits a noise level is a separate
setting (`undiffuse.process.time_sampling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.process.gaussian import Variance, step_log_var
from undiffuse.process.noise_level import NoiseLevel, transition_frac


def simple(t: NoiseLevel) -> Tensor:
    """w = 1 [Ho20 eq. 14]."""
    return torch.ones_like(t.alpha)


def bound(t: NoiseLevel, s: NoiseLevel, variance: Variance = "small") -> Tensor:
    """w = ½ (alpha_s frac sigma_t/alpha_t)² exp(−log_var): one step's term of the bound, nats [Ho20 eq. 12].

    In Ho's notation beta_t²/(2 σ² (1 − beta_t)(1 − alpha_bar_t)); for the small variance it is
    ½ expm1(log_snr_s − log_snr_t) [VDM21 eq. 14].
    """
    shift = s.alpha * transition_frac(t, s) * t.sigma / t.alpha
    return 0.5 * shift**2 * torch.exp(-step_log_var(t.alpha, t, s, variance))


def truncated_snr(t: NoiseLevel) -> Tensor:
    """w = max(1, exp(−log_snr)), max(SNR, 1) on x [Salimans22 §4]."""
    return torch.clamp(torch.exp(-t.log_snr), min=1.0)


def min_snr(t: NoiseLevel, limit: float = 5.0) -> Tensor:
    """w = min(1, limit exp(−log_snr)), min(SNR, limit) on x [Hang23 §3.4]."""
    return torch.clamp(limit * torch.exp(-t.log_snr), max=1.0)


def p2(t: NoiseLevel, k: float = 1.0, power: float = 1.0) -> Tensor:
    """w = (k + exp(log_snr))^−power [Choi22 eq. 8]."""
    return (k + torch.exp(t.log_snr)) ** -power


def edm(t: NoiseLevel, sigma_data: float = 1.0, limit: float = math.inf) -> Tensor:
    """w = 1 + exp(−log_snr)/sigma_data²: weight 1 in the frame of EDM's F [Karras22 table 1].

    With sigma_data = 1 on variance-preserving levels it is weight 1 in the frame of v. ``limit`` is the largest weight
    on x, which otherwise has no bound near the data; JiT's is 400 [Li25b].
    """
    noise_to_signal = torch.exp(-t.log_snr)
    w = 1 + noise_to_signal / sigma_data**2
    return w if limit == math.inf else torch.minimum(w, limit * noise_to_signal)


def sigmoid(t: NoiseLevel, bias: float = 2.0) -> Tensor:
    """w = sigmoid(bias − log_snr) [Kingma23 §5; Hoogeboom24 §3.1]."""
    return torch.sigmoid(bias - t.log_snr)


@dataclass(frozen=True)
class Weight:
    """A named weight with its settings; w(t, s) is float64 of ``t``'s shape."""

    name: str
    rule: Callable[..., Tensor]
    needs_next_level: bool = False
    settings: tuple[tuple[str, float], ...] = ()

    def __call__(self, t: NoiseLevel, s: NoiseLevel | None = None) -> Tensor:
        if not self.needs_next_level:
            return self.rule(t, **dict(self.settings))
        if s is None:
            raise ConfigError(
                "WEIGHT",
                self.name,
                "this weight is defined between two levels, and only one was given",
                "Pass s, the level that the step ends at",
            )
        return self.rule(t, s, **dict(self.settings))


WEIGHTS = {
    "simple": Weight("simple", simple),
    "bound": Weight("bound", bound, needs_next_level=True),
    "truncated_snr": Weight("truncated_snr", truncated_snr),
    "min_snr": Weight("min_snr", min_snr),
    "p2": Weight("p2", p2),
    "edm": Weight("edm", edm),
    "sigmoid": Weight("sigmoid", sigmoid),
}


def build(name: str, **settings: float) -> Weight:
    """The weight ``name`` of `WEIGHTS`, with its settings. Raises `ConfigError`."""
    if name not in WEIGHTS:
        raise unknown_name("WEIGHT", name, "weight", WEIGHTS)
    row = WEIGHTS[name]
    allowed = row.rule.__code__.co_varnames[2 if row.needs_next_level else 1 : row.rule.__code__.co_argcount]
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                "WEIGHT", f"weight {name!r}", f"no setting {key!r}", f"It has {', '.join(allowed) or 'none'}"
            )
    return Weight(row.name, row.rule, row.needs_next_level, tuple(settings.items()))

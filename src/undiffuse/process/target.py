"""Targets of the network: y = a x + b eps + c z, with fresh noise z.

With D = alpha b − sigma a, x = (b x_t − sigma y)/D and eps = (alpha y − a x_t)/D. A target is a row of `TARGETS`; its
frame (a, b, c) is a function of the noise level t, and of the cleaner level s where ``needs_next_level``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.process.gaussian import posterior_scales
from undiffuse.process.noise_level import NoiseLevel, broadcast_together, transition_frac

Frame = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Target:
    """A named frame. ``needs_next_level``: it also depends on the level s at which the step from t ends."""

    name: str
    rule: Callable[..., tuple[Tensor | float, Tensor | float, Tensor | float]]
    needs_next_level: bool = False
    settings: tuple[tuple[str, float], ...] = ()

    def frame(self, t: NoiseLevel, s: NoiseLevel | None = None) -> Frame:
        """(a, b, c) of y = a x + b eps + c z at ``t`` (and ``s``), float64 of ``t``'s shape."""
        if self.needs_next_level and s is None:
            raise ConfigError(
                "TARGET",
                self.name,
                "this target is defined between two levels, and only one was given",
                "Pass s, the level that the step ends at",
            )
        frame = self.rule(t, s, **dict(self.settings)) if self.needs_next_level else self.rule(t, **dict(self.settings))
        a, b, c = (torch.as_tensor(v, dtype=t.alpha.dtype).expand(t.alpha.shape) for v in frame)
        return a, b, c

    def determinant(self, t: NoiseLevel, s: NoiseLevel | None = None) -> Tensor:
        """D = alpha b − sigma a, which must not be 0 where the network is called."""
        a, b, _ = self.frame(t, s)
        return t.alpha * b - t.sigma * a

    def combine(
        self, x: Tensor, eps: Tensor, t: NoiseLevel, s: NoiseLevel | None = None, z: Tensor | None = None
    ) -> Tensor:
        """y = a x + b eps + c z, the target of the network, of ``x``'s shape; without ``z``, y = a x + b eps."""
        a, b, c = broadcast_together(self.frame(t, s), x)
        y = a * x + b * eps
        return y if z is None else y + c * z

    def solve(self, y: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel | None = None) -> tuple[Tensor, Tensor]:
        """(x, eps) = ((b x_t − sigma y)/D, (alpha y − a x_t)/D), each of ``x_t``'s shape (B, ...)."""
        a, b, _ = self.frame(t, s)
        d = t.alpha * b - t.sigma * a
        a, b, alpha, sigma = broadcast_together([a / d, b / d, t.alpha / d, t.sigma / d], x_t)
        return b * x_t - sigma * y, alpha * y - a * x_t

    def weight(self, w_eps: Tensor, t: NoiseLevel, s: NoiseLevel | None = None) -> Tensor:
        """w_y = w_eps (alpha/D)², so that w_y ‖y − ŷ‖² = w_eps ‖eps − ε̂‖²."""
        return w_eps * (t.alpha / self.determinant(t, s)) ** 2

    def check(self, levels: NoiseLevel, s: NoiseLevel | None = None) -> None:
        """Raise `ConfigError` if x and eps cannot be recovered at some of ``levels`` (a batch)."""
        d = self.determinant(levels, s)
        bad = ~torch.isfinite(d) | (d == 0)
        if bad.any():
            t = float(levels.t.expand(d.shape)[bad].max())
            zero = bool((levels.alpha == 0).any())
            cause = (
                "the schedule ends at zero signal (zero-terminal SNR), where x cannot be recovered from it"
                if zero
                else f"x cannot be recovered from it at t = {t:g}"
            )
            raise ConfigError(
                "TARGET",
                f"target {self.name!r}",
                cause,
                "Use the target 'v' or 'x', or a schedule that keeps some signal at t = 1",
            )


def _edm(t: NoiseLevel, sigma_data: float = 1.0) -> tuple[Tensor, Tensor, float]:
    # F = (x − c_skip x_t)/c_out [Karras22 table 1] with sigma/alpha for their sigma, without a division by alpha
    root = torch.sqrt(t.sigma**2 + sigma_data**2 * t.alpha**2)
    return t.sigma / (sigma_data * root), -sigma_data * t.alpha / root, 0.0


def _posterior_mean(t: NoiseLevel, s: NoiseLevel) -> tuple[Tensor, Tensor, float]:
    a, b = posterior_scales(t, s)
    return a * t.alpha + b, a * t.sigma, 0.0


def _previous(t: NoiseLevel, s: NoiseLevel) -> tuple[Tensor, Tensor, Tensor]:
    a, b, _ = _posterior_mean(t, s)
    return a, b, s.sigma * torch.sqrt(transition_frac(t, s))


# functions rather than lambdas, which cannot be pickled: a model is pickled with the frame of its target
def _x(t: NoiseLevel) -> tuple[float, float, float]:
    return 1.0, 0.0, 0.0


def _eps(t: NoiseLevel) -> tuple[float, float, float]:
    return 0.0, 1.0, 0.0


def _v(t: NoiseLevel) -> tuple[Tensor, Tensor, float]:
    return -t.sigma, t.alpha, 0.0


def _score(t: NoiseLevel) -> tuple[float, Tensor, float]:
    return 0.0, -1 / t.sigma, 0.0


def _flow(t: NoiseLevel) -> tuple[float, float, float]:
    return -1.0, 1.0, 0.0


TARGETS = {
    "x": Target("x", _x),
    "eps": Target("eps", _eps),  # Ho20 eq. 14
    "v": Target("v", _v),  # Salimans22 §4
    "score": Target("score", _score),  # Song21 eq. 7
    "flow": Target("flow", _flow),  # Lipman23 eq. 23, noise minus data
    "edm": Target("edm", _edm),  # Karras22 eq. 7
    "posterior": Target("posterior", _posterior_mean, needs_next_level=True),  # Ho20 eq. 8
    "previous": Target("previous", _previous, needs_next_level=True),  # x_{t−1} itself
}


def build(name: str, **settings: float) -> Target:
    """The target ``name`` of `TARGETS`, with its settings (``sigma_data`` of ``edm``). Raises `ConfigError`."""
    if name not in TARGETS:
        raise unknown_name("TARGET", name, "target", TARGETS)
    if settings and (name != "edm" or set(settings) != {"sigma_data"}):
        raise ConfigError(
            "TARGET", f"target {name!r}", f"no such setting: {', '.join(settings)}", "Only 'edm' has one, sigma_data"
        )
    row = TARGETS[name]
    return Target(row.name, row.rule, row.needs_next_level, tuple(settings.items()))

"""The divergence of a vector field: exactly, or estimated from random probes."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

LARGEST = 4096
"""Numbers an item may have for the exact trace."""


def divergence(value: Tensor, at: Tensor, probes: Tensor | None = None) -> Tensor:
    """tr J = Σ_i ∂value_i/∂at_i of each row, (b,); with ``probes`` (P, b, n) the mean of eᵀ J e [Hutchinson90].

    ``value`` (b, n) is in the graph of ``at`` (b, n), and its rows depend on their own rows alone. Each number, or
    each probe, is a backward pass.
    """
    total = at.new_zeros(len(at))
    if probes is None:
        for i in range(at.shape[1]):
            total = total + _pull(value[:, i].sum(), at)[:, i]
        return total
    for probe in probes:
        total = total + (_pull((value * probe).sum(), at) * probe).sum(1)
    return total / len(probes)


def _pull(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def signs(noise: Tensor) -> Tensor:
    """Rademacher probes, 1 where ``noise`` is above 0 and −1 elsewhere, float64: their eᵀ e is always n."""
    return torch.where(noise > 0, 1.0, -1.0).double()


def check_exact(dims: int) -> None:
    """Raises `ConfigError` where the exact trace would take more than `LARGEST` backward passes a call."""
    if dims > LARGEST:
        raise ConfigError(
            "TRACE",
            "trace = 'exact'",
            f"it takes a backward pass for each of an item's {dims:,} numbers at every call",
            f"Use trace='hutchinson', or items of at most {LARGEST:,} numbers",
        )

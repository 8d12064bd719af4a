"""Patches of cells as channels, and sizes that patches and halvings divide."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def fold(x: Tensor, patch: int) -> Tensor:
    """Space to depth: (B, C, *size) to (B, C patch^dims, *size/patch); ``unfold`` is its inverse."""
    dims = x.ndim - 2
    for axis in range(2, 2 * dims + 2, 2):
        x = x.unflatten(axis, (-1, patch))
    order = [0, 1, *range(3, 2 * dims + 2, 2), *range(2, 2 * dims + 2, 2)]
    return x.permute(order).flatten(1, dims + 1)


def unfold(y: Tensor, patch: int) -> Tensor:
    """Depth to space: (B, C patch^dims, *size) to (B, C, *size patch)."""
    dims = y.ndim - 2
    y = y.unflatten(1, (-1, *[patch] * dims))
    order = [0, 1, *(axis for d in range(dims) for axis in (2 + dims + d, 2 + d))]
    y = y.permute(order)
    for axis in range(2, dims + 2):
        y = y.flatten(axis, axis + 1)
    return y


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x (B, C, *size) with its last cells repeated, so that each side is a multiple of ``multiple``."""
    pad = [end for n in reversed(x.shape[2:]) for end in (0, -n % multiple)]
    return F.pad(x, pad, mode="replicate") if any(pad) else x

"""Linear maps with their adjoints: how an observation y = A x + noise_std n comes from an item x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """A: items x (B, *shape) to y (B, *seen), each item by itself, with its adjoint A': <A x, y> = <x, A' y>.

    ``forward`` is any linear function that autograd can follow. ``back`` is its adjoint where that is known; without
    it the adjoint is the vector-Jacobian product of ``forward``.
    """

    forward: Map
    shape: tuple[int, ...]
    back: Map | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """A x, (B, *seen)."""
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, (B, *shape)."""
        if self.back is not None:
            return self.back(y)
        graph = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x = y.new_zeros(len(y), *self.shape, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y, create_graph=graph)[0]

    def __matmul__(self, first: Linear) -> Linear:
        """x ↦ A (first x), whose adjoint is y ↦ first' (A' y)."""
        return Linear(lambda x: self(first(x)), first.shape, lambda y: first.adjoint(self.adjoint(y)))

    @property
    def seen(self) -> tuple[int, ...]:
        """The shape of y."""
        return tuple(self(torch.zeros(1, *self.shape)).shape[1:])


def identity(shape: Sequence[int]) -> Linear:
    """x ↦ x: what is left to do is to take away the noise."""
    return Linear(lambda x: x, tuple(shape), lambda y: y)


def mask(known: Tensor, shape: Sequence[int]) -> Linear:
    """x ↦ the numbers of x where ``known`` (which broadcasts to an item's ``shape``) is true, (B, n) in their order."""
    where = known.expand(*shape).flatten().nonzero()[:, 0]

    def back(y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), math.prod(shape))
        return x.index_copy(1, where.to(y.device), y).reshape(-1, *shape)

    return Linear(lambda x: x.flatten(1)[:, where.to(x.device)], tuple(shape), back)


def separable(matrices: Sequence[Tensor], shape: Sequence[int]) -> Linear:
    """x ↦ matrices[i] (m_i, n_i) applied along the i-th of the last axes of items of ``shape`` (..., n_1, ..., n_k)."""

    def along(x: Tensor, turned: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(turned, start=-len(turned)):
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.to(x), -1, axis)
        return x

    return Linear(lambda x: along(x, [m.mT for m in matrices]), tuple(shape), lambda y: along(y, matrices))


def mean_pool(factor: int, shape: Sequence[int]) -> Linear:
    """x ↦ the means of its blocks of ``factor`` numbers along every axis but the channel's, for super-resolution.

    ``shape`` is (C, ...). Raises `ConfigError` where ``factor`` does not divide it.
    """
    if factor < 1 or any(n % factor for n in shape[1:]):
        sides = " x ".join(map(str, shape[1:]))
        cause = f"{factor} does not divide the sides of an item, {sides}"
        raise ConfigError("OPERATOR", f"factor = {factor}", cause, "Give a whole number that does")
    block = torch.full((1, factor), 1 / factor, dtype=torch.float64)
    return separable([torch.kron(torch.eye(n // factor, dtype=torch.float64), block) for n in shape[1:]], shape)


def blur(std: float, shape: Sequence[int]) -> Linear:
    """x ↦ its Gaussian blur along every axis but the channel's: weights ∝ exp(−(i − j)²/(2 std²)), of sum 1.

    ``std`` in pixels; at the edges the weights of what is inside are taken. Raises `ConfigError`.
    """
    if not 0 < std < math.inf:
        raise ConfigError("OPERATOR", f"blur of std {std:g}", "it must be above 0", "Give the width in pixels")

    def weights(n: int) -> Tensor:
        place = torch.arange(n, dtype=torch.float64)
        return torch.softmax(-0.5 * ((place[:, None] - place) / std) ** 2, 1)

    return separable([weights(n) for n in shape[1:]], shape)

"""Linear maps with their adjoints: how an observation y = A x + noise_std n comes from an item x."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

TensorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearOperator:
    """A: items x (B, *shape) to y (B, *out_shape), each item on its own, with its adjoint A': <A x, y> = <x, A' y>.

    ``forward`` is any linear function that autograd can differentiate. ``transpose`` is its adjoint if given, else the
    adjoint is the vector-Jacobian product of ``forward``.
    """

    forward: TensorMap
    shape: tuple[int, ...]
    transpose: TensorMap | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """A x, (B, *out_shape)."""
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, (B, *shape)."""
        if self.transpose is not None:
            return self.transpose(y)
        graph = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x = y.new_zeros(len(y), *self.shape, requires_grad=True)
            return torch.autograd.grad(self.forward(x), x, y, create_graph=graph)[0]

    def __matmul__(self, first: LinearOperator) -> LinearOperator:
        """x ↦ A (first x), whose adjoint is y ↦ first' (A' y)."""
        return LinearOperator(lambda x: self(first(x)), first.shape, lambda y: first.adjoint(self.adjoint(y)))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of y."""
        return tuple(self(torch.zeros(1, *self.shape)).shape[1:])


def identity(shape: Sequence[int]) -> LinearOperator:
    """x ↦ x, for denoising alone."""
    return LinearOperator(lambda x: x, tuple(shape), lambda y: y)


def mask(known: Tensor, shape: Sequence[int]) -> LinearOperator:
    """x ↦ the elements of x where ``known`` (broadcasts to an item's ``shape``) is true, (B, n) in their order."""
    where = known.expand(*shape).flatten().nonzero()[:, 0]

    def transpose(y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), math.prod(shape))
        return x.index_copy(1, where.to(y.device), y).reshape(-1, *shape)

    return LinearOperator(lambda x: x.flatten(1)[:, where.to(x.device)], tuple(shape), transpose)


def separable(matrices: Sequence[Tensor], shape: Sequence[int]) -> LinearOperator:
    """x ↦ matrices[i] (m_i, n_i) applied along the i-th of the last axes of items of ``shape`` (..., n_1, ..., n_k)."""

    def along(x: Tensor, right: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(right, start=-len(right)):
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.to(x), -1, axis)
        return x

    return LinearOperator(lambda x: along(x, [m.mT for m in matrices]), tuple(shape), lambda y: along(y, matrices))


def mean_pool(factor: int, shape: Sequence[int]) -> LinearOperator:
    """x ↦ the means over blocks of ``factor`` elements along every axis but the channels, for super-resolution.

    ``shape`` is (C, ...). Raises `ConfigError` where ``factor`` does not divide it.
    """
    if factor < 1 or any(n % factor for n in shape[1:]):
        sides = " x ".join(map(str, shape[1:]))
        cause = f"{factor} does not divide the sides of an item, {sides}"
        raise ConfigError("OPERATOR", f"factor = {factor}", cause, "Give a divisor of the sides")
    block = torch.full((1, factor), 1 / factor, dtype=torch.float64)
    return separable([torch.kron(torch.eye(n // factor, dtype=torch.float64), block) for n in shape[1:]], shape)


def blur(std: float, shape: Sequence[int]) -> LinearOperator:
    """x ↦ its Gaussian blur along every axis but the channels: weights ∝ exp(−(i − j)²/(2 std²)), of sum 1.

    ``std`` in pixels; at the edges the weights of the pixels inside are normalised to 1. Raises `ConfigError`.
    """
    if not 0 < std < math.inf:
        raise ConfigError("OPERATOR", f"blur of std {std:g}", "it must be above 0", "Give the width in pixels")

    def weights(n: int) -> Tensor:
        i = torch.arange(n, dtype=torch.float64)
        return torch.softmax(-0.5 * ((i[:, None] - i) / std) ** 2, 1)

    return separable([weights(n) for n in shape[1:]], shape)

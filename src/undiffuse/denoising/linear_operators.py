"""Linear maps with their adjoints: how an observation y = A x + noise_std n comes from an item x, or from latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

TensorMap = Callable[[Tensor], Tensor]
DECODER_STEP = 0.01
"""Root mean square of the change of z in the derivative of a decoder; standardized z have standard deviation 1."""


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

    def linearize(self, x: Tensor) -> tuple[Tensor, LinearOperator]:
        """(A x, the derivative of A at x, which is A)."""
        return self(x), self

    def __matmul__(self, first: LinearOperator) -> LinearOperator:
        """x ↦ A (first x), whose adjoint is y ↦ first' (A' y)."""
        return LinearOperator(lambda x: self(first(x)), first.shape, lambda y: first.adjoint(self.adjoint(y)))

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of y."""
        return tuple(self(torch.zeros(1, *self.shape)).shape[1:])


@dataclass(frozen=True)
class DecodedOperator:
    """z ↦ A decode(z) of latents z (B, *shape), not linear: ``operator`` A observes what ``decode`` makes of z."""

    operator: LinearOperator
    decode: TensorMap
    shape: tuple[int, ...]

    def __call__(self, z: Tensor) -> Tensor:
        """A decode(z)."""
        return self.operator(self.decode(z))

    def linearize(self, z: Tensor) -> tuple[Tensor, LinearOperator]:
        """(A decode(z), its derivative J at z): J u by a central difference of `DECODER_STEP`, J' v by autograd."""
        graph = torch.is_grad_enabled() and z.requires_grad
        with torch.enable_grad():
            leaf = z if graph else z.detach().requires_grad_()
            y = self(leaf)

        def forward(u: Tensor) -> Tensor:
            rms = u.detach().flatten(1).square().mean(1).sqrt().clamp(min=1e-20)
            h = DECODER_STEP / rms.reshape(-1, *[1] * (u.ndim - 1))
            return (self(z + h * u) - self(z - h * u)) / (2 * h.reshape(-1, *[1] * (y.ndim - 1)))

        def transpose(v: Tensor) -> Tensor:
            return torch.autograd.grad(y, leaf, v, retain_graph=True, create_graph=graph)[0]

        return y if graph else y.detach(), LinearOperator(forward, self.shape, transpose)


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

    ``std`` in pixels; at the edges the weights of the pixels inside are normalized to 1. Raises `ConfigError`
    for a ``std`` above the largest side too.
    """
    where, fix = f"blur = {std:g}", "Give the standard deviation in pixels"
    if not 0 < std < math.inf:
        raise ConfigError("OPERATOR", where, "it must be finite and above 0", fix)
    if std > (largest := max(shape[1:], default=math.inf)):
        raise ConfigError("OPERATOR", where, f"it is more than the largest side of an item, {largest}", fix)

    def weights(n: int) -> Tensor:
        i = torch.arange(n, dtype=torch.float64)
        return torch.softmax(-0.5 * ((i[:, None] - i) / std) ** 2, 1)

    return separable([weights(n) for n in shape[1:]], shape)

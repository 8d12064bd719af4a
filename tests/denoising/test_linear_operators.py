"""Linear operators against dense matrices, and their adjoints by the identity <A x, y> = <x, A' y>."""

import math

import numpy as np
import pytest
import torch

from undiffuse.denoising.linear_operators import (
    DecodedOperator,
    LinearOperator,
    blur,
    identity,
    mask,
    mean_pool,
    separable,
)
from undiffuse.errors import ConfigError

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(operator: LinearOperator) -> torch.Tensor:
    """The matrix (elements of y, elements of x)."""
    n = math.prod(operator.shape)
    return operator(torch.eye(n, dtype=F64).reshape(n, *operator.shape)).flatten(1).T


KNOWN = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.4
OPERATORS = {
    "identity": (identity((3, 5)), (3, 5)),
    "mask": (mask(KNOWN, (3, 6, 4)), (3 * int(KNOWN.sum()),)),
    "mask of a vector": (mask(torch.tensor([True, False, True]), (3,)), (2,)),
    "mask of channels": (mask(torch.tensor([[True], [False]]), (2, 4)), (4,)),
    "separable": (separable([random(2, 5), random(7, 3, seed=1)], (2, 5, 3)), (2, 2, 7)),
    "pool 1-d": (mean_pool(2, (3, 8)), (3, 4)),
    "pool 2-d": (mean_pool(3, (2, 6, 9)), (2, 2, 3)),
    "pool 3-d": (mean_pool(2, (1, 2, 4, 6)), (1, 1, 2, 3)),
    "blur 1-d": (blur(1.3, (2, 7)), (2, 7)),
    "blur 2-d": (blur(0.7, (3, 5, 6)), (3, 5, 6)),
    "a function": (LinearOperator(lambda x: x.flip(1).cumsum(1)[:, ::2] * 3, (6, 2)), (3, 2)),
    "composed": (mean_pool(2, (2, 6, 4)) @ blur(1.0, (2, 6, 4)), (2, 3, 2)),
    "composed thrice": (mask(KNOWN[:3, :2], (2, 3, 2)) @ mean_pool(2, (2, 6, 4)) @ blur(1.0, (2, 6, 4)), (4,)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_identity(name):
    operator, seen = OPERATORS[name]
    if name == "composed thrice":
        seen = (2 * int(KNOWN[:3, :2].sum()),)
    assert operator.out_shape == seen
    x, y = random(4, *operator.shape), random(4, *seen, seed=1)
    left = (operator(x) * y).flatten(1).sum(1)
    torch.testing.assert_close(left, (x * operator.adjoint(y)).flatten(1).sum(1), rtol=1e-12, atol=1e-12)
    n = math.prod(seen)
    back = operator.adjoint(torch.eye(n, dtype=F64).reshape(n, *seen)).flatten(1)
    torch.testing.assert_close(back, dense(operator), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator(2 * x - 1), 2 * operator(x) - operator(torch.ones_like(x)))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_vector_jacobian_product_is_the_adjoint(name):
    """In float32, under no_grad, and with its own gradient where y requires one."""
    operator = OPERATORS[name][0]
    y = random(2, *operator.out_shape).float().requires_grad_()
    automatic = LinearOperator(lambda x: 1 * operator(x), operator.shape)
    with torch.no_grad():
        x = automatic.adjoint(y)
    torch.testing.assert_close(x, operator.adjoint(y).detach())
    assert (x.dtype, x.requires_grad) == (torch.float32, False)
    gradient = torch.autograd.grad(automatic.adjoint(y).square().sum(), y)[0]
    torch.testing.assert_close(gradient, operator(2 * x).detach(), rtol=1e-5, atol=1e-5)


def test_mask_keeps_the_order_of_elements():
    x = torch.arange(24.0).reshape(1, 3, 4, 2)
    known = torch.tensor([[True, False], [False, False], [False, True], [True, True]])
    expected = [0, 5, 6, 7, 8, 13, 14, 15, 16, 21, 22, 23]
    assert mask(known, (3, 4, 2))(x).tolist() == [expected]
    filled = torch.zeros(24).index_fill(0, torch.tensor(expected), 1.0).reshape(1, 3, 4, 2)
    assert torch.equal(mask(known, (3, 4, 2)).adjoint(torch.ones(1, 12)), filled)


def test_pooling_is_the_mean_of_blocks():
    x = random(2, 3, 4, 6)
    expected = x.reshape(2, 3, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(mean_pool(2, (3, 4, 6))(x), expected)
    torch.testing.assert_close(mean_pool(1, (3, 4, 6))(x), x)
    with pytest.raises(ConfigError, match="5 x 4"):
        mean_pool(2, (1, 5, 4))
    for factor in (4, 0, -2):
        with pytest.raises(ConfigError, match="does not divide the sides of an item, 4 x 6") as error:
            mean_pool(factor, (3, 4, 6))
        assert (error.value.code, error.value.where) == ("OPERATOR", f"factor = {factor}")


def test_blur_by_hand():
    weights = np.exp(-(np.subtract.outer(np.arange(5), np.arange(5)) ** 2) / (2 * 1.5**2))
    weights /= weights.sum(1, keepdims=True)
    x = random(1, 2, 5, 5)
    expected = np.einsum("ih,jw,bchw->bcij", weights, weights, x.numpy())
    np.testing.assert_allclose(blur(1.5, (2, 5, 5))(x).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(blur(4.0, (1, 4))(torch.ones(1, 1, 4)), torch.ones(1, 1, 4))  # grey stays grey
    torch.testing.assert_close(blur(1e-3, (2, 5, 5))(x), x)
    out_of_range = dict.fromkeys((0.0, -1.0, math.inf, math.nan), "it must be finite and above 0")
    for std, cause in (out_of_range | {5.5: "it is more than the largest side of an item, 5"}).items():
        with pytest.raises(ConfigError, match=f"blur = {std:g}: {cause}"):
            blur(std, (1, 5, 4))


@pytest.mark.parametrize("linear", [True, False])
def test_the_derivative_of_what_is_observed_of_latents(linear):
    """J u and J' v of A decode(z) against the dense derivative, item by item; of a linear decoder to rounding."""
    weights, operator = random(6, 4, seed=3), mask(torch.tensor([True, False, True, True, False, True]), (6,))
    decoded = DecodedOperator(operator, lambda z: z @ weights.T if linear else torch.tanh(z @ weights.T), (4,))
    z, u, v = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    y, derivative = decoded.linearize(z)
    torch.testing.assert_close(y, decoded(z))
    assert not y.requires_grad
    for i in range(3):
        J = torch.autograd.functional.jacobian(lambda at: decoded(at[None])[0], z[i])
        tolerance = {"rtol": 0, "atol": 1e-10 if linear else 1e-3}
        torch.testing.assert_close(derivative(u)[i], J @ u[i], **tolerance)
        torch.testing.assert_close(derivative.adjoint(v)[i], J.T @ v[i], rtol=0, atol=1e-10)
    leaf = z.clone().requires_grad_()
    value, derivative = decoded.linearize(leaf)
    assert torch.autograd.grad((value * v).sum() + derivative.adjoint(v).sum(), leaf)[0].shape == z.shape

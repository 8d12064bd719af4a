"""The trace of a Jacobian, exact and estimated from probes."""

from itertools import product

import pytest
import torch

from undiffuse.errors import ConfigError
from undiffuse.likelihood.probability_flow import check_exact_trace, divergence, rademacher

A = torch.tensor([[1.0, 5.0, -2.0], [0.5, -3.0, 7.0], [4.0, 0.1, 0.25]], dtype=torch.float64)
X = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.7, -0.2]], dtype=torch.float64)


def field(x):
    """sin(A x) + x³, whose Jacobian is neither constant nor symmetric."""
    return torch.sin(x @ A.T) + x**3


def jacobian(x):
    return torch.diag_embed(torch.cos(x @ A.T)) @ A + torch.diag_embed(3 * x**2)


def value(f, x):
    at = x.clone().requires_grad_()
    return f(at), at


def test_the_divergence_is_the_trace():
    trace = jacobian(X).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(*value(field, X)), trace, rtol=1e-13, atol=0)


def test_the_estimate_is_the_mean_of_quadratic_forms_and_unbiased():
    probes = torch.tensor(list(product([-1.0, 1.0], repeat=3)), dtype=torch.float64)[:, None].expand(-1, 2, -1)
    J = jacobian(X)
    forms = torch.einsum("pbi,bij,pbj->pb", probes, J, probes)
    assert float(forms.std(0).min()) > 1
    for P in (1, 3, 8):
        estimate = divergence(*value(field, X), probes[:P])
        torch.testing.assert_close(estimate, forms[:P].mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(forms.mean(0), J.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-13, atol=1e-13)


def test_one_probe_is_exact_if_the_jacobian_is_diagonal():
    probe = rademacher(torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(divergence(*value(torch.exp, X), probe), torch.exp(X).sum(1), rtol=1e-14, atol=0)


def test_rademacher():
    assert rademacher(torch.tensor([0.3, -2.0, 0.0])).tolist() == [1.0, -1.0, -1.0]
    assert rademacher(torch.zeros(1)).dtype == torch.float64


def test_the_exact_trace_has_a_largest_size():
    check_exact_trace(4096)
    with pytest.raises(ConfigError, match="each of an item's 4,097 dimensions"):
        check_exact_trace(4097)

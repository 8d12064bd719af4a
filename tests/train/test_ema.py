import pytest
import torch
from torch import nn

from undiffuse.train.ema import Average, exponent


def one(value=0.0, dtype=torch.float32):
    network = nn.Linear(1, 1, bias=False, dtype=dtype)
    network.weight.data.fill_(value)
    return network


def averaged(weights, length=0.05, dtype=torch.float32):
    """What the average holds after these weights, one a step."""
    network = one(dtype=dtype)
    average = Average(network, length)
    for step, weight in enumerate(weights, start=1):
        network.weight.data.fill_(weight)
        average.update(network, step)
    return average


def test_the_power_of_a_length():
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)  # Karras24 §3.1
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    for power in (0.5, 1.0, 6.94, 20.0, 100.0):
        assert exponent(((power + 1) / ((power + 2) ** 2 * (power + 3))) ** 0.5) == pytest.approx(power, rel=1e-9)


def test_a_constant_stays():
    average = averaged([3.0] * 50)
    assert float(average.mean["weight"]) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_step_i_of_n_weighs_in_by_the_integral_of_its_share(length):
    """w_i = (i^(p+1) − (i−1)^(p+1))/n^(p+1), the power-function profile τ^p over step i's share of the run."""
    n, p = 20, exponent(length)
    weights = [((i**3) % 7) - 3.0 for i in range(n)]
    share = [((i + 1) ** (p + 1) - i ** (p + 1)) / n ** (p + 1) for i in range(n)]
    assert sum(share) == pytest.approx(1)
    expected = sum(w * s for w, s in zip(weights, share, strict=True))
    assert float(averaged(weights, length).mean["weight"]) == pytest.approx(expected, abs=1e-5)


def test_the_first_step_forgets_where_it_began():
    assert float(averaged([5.0]).mean["weight"]) == 5.0


def test_float32_whatever_the_network():
    """1 − (k/n)^(p+1) after k zeros and n − k ones; in bfloat16 the steps of 0.6 % would round away near the end."""
    k, n = 2900, 3000
    average = averaged([0.0] * k + [1.0] * (n - k), dtype=torch.bfloat16)
    assert average.mean["weight"].dtype == torch.float32
    assert float(average.mean["weight"]) == pytest.approx(1 - (k / n) ** (exponent(0.05) + 1), abs=1e-4)
    network = one(dtype=torch.bfloat16)
    average.copy_to(network)
    assert network.weight.dtype == torch.bfloat16
    assert network.weight.item() == pytest.approx(float(average.mean["weight"]), rel=2**-8)
    average.load({"weight": torch.ones(1, 1, dtype=torch.bfloat16)})
    assert average.mean["weight"].dtype == torch.float32


def test_float64_stays_so():
    average = averaged([1.0, 1 + 2.0**-40], dtype=torch.float64)
    assert average.mean["weight"].dtype == torch.float64
    assert 1.0 < float(average.mean["weight"]) < 1 + 2.0**-39
    average.load(average.mean)
    assert average.mean["weight"].dtype == torch.float64


def test_it_is_a_copy():
    network = one(1.0)
    average = Average(network, 0.05)
    network.weight.data.fill_(2.0)
    assert float(average.mean["weight"]) == 1.0
    average.update(network, 1)
    network.weight.data.fill_(7.0)
    assert float(average.mean["weight"]) == 2.0

"""The moving average of weights with a power-function profile."""

import pytest
import torch
from torch import nn

from undiffuse.training.ema import PowerEMA, power_for_length


def linear(value=0.0, dtype=torch.float32):
    network = nn.Linear(1, 1, bias=False, dtype=dtype)
    network.weight.data.fill_(value)
    return network


def averaged(weights, length=0.05, dtype=torch.float32):
    """The average after these weights, one for each step."""
    network = linear(dtype=dtype)
    average = PowerEMA(network, length)
    for step, weight in enumerate(weights, start=1):
        network.weight.data.fill_(weight)
        average.update(network, step)
    return average


def test_the_power_of_a_length():
    assert power_for_length(0.10) == pytest.approx(6.94, abs=0.01)  # Karras24 §3.1
    assert power_for_length(0.05) == pytest.approx(16.97, abs=0.01)
    for power in (0.5, 1.0, 6.94, 20.0, 100.0):
        assert power_for_length(((power + 1) / ((power + 2) ** 2 * (power + 3))) ** 0.5) == pytest.approx(
            power, rel=1e-9
        )


def test_the_average_of_a_constant_is_the_constant():
    average = averaged([3.0] * 50)
    assert float(average.mean["weight"]) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_weight_of_each_step(length):
    """w_i = (i^(p+1) − (i−1)^(p+1))/n^(p+1), the integral of the profile over step i of n."""
    n, p = 20, power_for_length(length)
    weights = [((i**3) % 7) - 3.0 for i in range(n)]
    share = [((i + 1) ** (p + 1) - i ** (p + 1)) / n ** (p + 1) for i in range(n)]
    assert sum(share) == pytest.approx(1)
    expected = sum(w * s for w, s in zip(weights, share, strict=True))
    assert float(averaged(weights, length).mean["weight"]) == pytest.approx(expected, abs=1e-5)


def test_the_first_step_replaces_the_initial_weights():
    assert float(averaged([5.0]).mean["weight"]) == 5.0


def test_bfloat16_weights_have_a_float32_average():
    """1 − (k/n)^(p+1) after k zeros and n − k ones; in bfloat16 the last steps of 0.6 % would be lost to rounding."""
    k, n = 2900, 3000
    average = averaged([0.0] * k + [1.0] * (n - k), dtype=torch.bfloat16)
    assert average.mean["weight"].dtype == torch.float32
    assert float(average.mean["weight"]) == pytest.approx(1 - (k / n) ** (power_for_length(0.05) + 1), abs=1e-4)
    network = linear(dtype=torch.bfloat16)
    average.copy_to(network)
    assert network.weight.dtype == torch.bfloat16
    assert network.weight.item() == pytest.approx(float(average.mean["weight"]), rel=2**-8)
    average.load({"weight": torch.ones(1, 1, dtype=torch.bfloat16)})
    assert average.mean["weight"].dtype == torch.float32


def test_float64_weights_have_a_float64_average():
    average = averaged([1.0, 1 + 2.0**-40], dtype=torch.float64)
    assert average.mean["weight"].dtype == torch.float64
    assert 1.0 < float(average.mean["weight"]) < 1 + 2.0**-39
    average.load(average.mean)
    assert average.mean["weight"].dtype == torch.float64


def test_the_average_shares_no_memory_with_the_weights():
    network = linear(1.0)
    average = PowerEMA(network, 0.05)
    network.weight.data.fill_(2.0)
    assert float(average.mean["weight"]) == 1.0
    average.update(network, 1)
    network.weight.data.fill_(7.0)
    assert float(average.mean["weight"]) == 2.0

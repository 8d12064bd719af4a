"""Order and tolerance of the integrators, and independence of the items of a batch."""

import math

import numpy as np
import pytest
import torch

from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.ode_integrator import (
    METHODS,
    Integrator,
    error_size,
    flow_time,
    flow_velocity,
    log_snr_at_flow_time,
    rk_step,
)


class Turning:
    """dy/du of a rotation (y_1, y_2) = R(3 sin(speed u)) y_0, of y_3' = −2 u y_3², and of y_4' = y_3."""

    def __init__(self, *speed):
        self.speed, self.items = torch.tensor(speed, dtype=torch.float64), []

    def __call__(self, items, u, y):
        self.items += items.tolist()
        a, b, c, _ = y.unbind(1)
        turn = 3 * self.speed[items] * torch.cos(self.speed[items] * u)
        return torch.stack([-turn * b, turn * a, -2 * u * c**2, c], 1)

    def exact(self, u):
        angle = 3 * torch.sin(self.speed * u)
        one = torch.ones_like(angle)
        return torch.stack([torch.cos(angle), torch.sin(angle), one / (1 + u**2), one * math.atan(u)], 1)


def start(n):
    return torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64).repeat(n, 1)


def slope(steps, errors):
    return -np.polyfit(np.log2(steps), np.log2(errors.numpy()), 1)[0]


@pytest.mark.parametrize(("method", "order", "calls"), [("heun", 2, 2), ("rk4", 4, 4)])
def test_fixed_steps_have_their_order(method, order, calls):
    rate, steps, errors = Turning(1.0, 0.7), 2 ** np.arange(6, 10), []
    for n in steps:
        y, used = Integrator(method, num_steps=int(n))(rate, start(2), 0.0, 1.5)
        errors.append((y - rate.exact(1.5)).abs().amax(0))
        assert used.tolist() == [n * calls] * 2
    for column in torch.stack(errors).T:
        assert abs(slope(steps, column) - order) < 0.15


def test_a_step_of_the_pair_has_order_five_and_an_error_estimate_of_order_four():
    rate, pair = Turning(1.0), METHODS["adaptive"]
    items, lengths = torch.zeros(1, dtype=torch.int64), 2.0 ** -np.arange(4, 7)
    errors, estimates = [], []
    for h in lengths:
        u, length = torch.tensor([0.3], dtype=torch.float64), torch.tensor([h])
        y = rate.exact(0.3)
        new, rates = rk_step(pair, rate, items, u, y, length, rate(items, u, y))
        errors.append((new - rate.exact(0.3 + h))[0].abs())
        estimates.append((h * sum(w * r for w, r in zip(pair.error, rates, strict=True)))[0].abs())
        torch.testing.assert_close(rates[-1], rate(items, u + length, new), rtol=1e-13, atol=1e-14)
    for error, estimate in zip(torch.stack(errors).T, torch.stack(estimates).T, strict=True):
        assert slope(1 / lengths, error) > 5.6
        assert 4.6 < slope(1 / lengths, estimate) < 5.5
        assert bool((error < estimate).all())


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7, 1e-9])
def test_the_tolerance_is_kept(tol):
    rate = Turning(1.0, 0.2, 3.0)
    for settings in ({"rtol": 0.0, "atol": tol}, {"rtol": tol, "atol": 1e-2 * tol}):
        y, _ = Integrator(**settings)(rate, start(3), 0.0, 1.5)
        assert float((y - rate.exact(1.5)).abs().max()) < 10 * tol


def test_steps_of_an_item_do_not_depend_on_others():
    """The easy item ends early, and its results are those of a batch of one."""
    together, alone = Turning(0.1, 8.0, 0.1), [Turning(0.1), Turning(8.0), Turning(0.1)]
    y, calls = Integrator(rtol=1e-7, atol=1e-7)(together, start(3), 0.0, 2.0)
    assert 5 * int(calls[0]) < int(calls[1])
    assert [together.items.count(i) for i in range(3)] == calls.tolist()
    for i, rate in enumerate(alone):
        own, own_calls = Integrator(rtol=1e-7, atol=1e-7)(rate, start(1), 0.0, 2.0)
        assert int(own_calls) == int(calls[i]) == len(rate.items)
        torch.testing.assert_close(y[i], own[0], rtol=0, atol=0)


def test_steps_grow_at_most_fivefold_and_end_exactly():
    times = []

    def rate(items, u, y):
        times.append(float(u))
        return torch.ones_like(y)

    y, calls = Integrator(rtol=0.0, atol=1e-5)(rate, start(1), -7.0, 5.0)
    torch.testing.assert_close(y - start(1), torch.full((1, 4), 12.0, dtype=torch.float64))
    h = 1e-5**0.2
    arrivals = [-7.0, -7 + h, -7 + 6 * h, -7 + 31 * h, 5.0]
    assert times[::6] == pytest.approx(arrivals)
    assert max(times) == 5.0
    assert int(calls) == 1 + 6 * 4


def test_the_next_step_follows_the_fifth_root_of_the_error():
    """For dy/du = 1e5 u⁴ the difference of the two orders follows from the tableau."""
    times, (stages, _, weights) = [], METHODS["adaptive"]

    def rate(items, u, y):
        times.append(float(u))
        return 1e5 * u[:, None] ** 4 * torch.ones_like(y)

    Integrator(rtol=0.0, atol=1e-4)(rate, start(1), 0.1, 1.0)
    length, nodes = 1e-4**0.2, [0.0, *map(math.fsum, stages)]
    error = length * sum(w * 1e5 * (0.1 + c * length) ** 4 for w, c in zip(weights, nodes, strict=True))
    again = length * 0.9 * (abs(error) / 1e-4) ** -0.2
    assert 0.25 < again / length < 0.9  # the step is rejected
    assert times[6] == pytest.approx(0.1 + length)
    assert times[12] == pytest.approx(0.1 + again)


def test_a_step_with_nan_is_retried_at_a_fifth_of_its_length():
    times = []

    def rate(items, u, y):
        times.append(float(u))
        return torch.full_like(y, math.nan if u > 0.01 else 1.0)

    with pytest.raises(NonFiniteError) as error:
        Integrator(rtol=0.0, atol=1e-5)(rate, start(1), 0.0, 1.0)
    lengths = [times[6 * k] - max((v for v in times[: 6 * k] if v <= 0.01), default=0.0) for k in (1, 2)]
    assert lengths[0] == pytest.approx(0.1)
    assert times[12] == pytest.approx(0.02)
    assert (error.value.code, error.value.where) == ("ODE", "item 0 of the batch")


@pytest.mark.parametrize("settings", [{}, {"method": "heun"}, {"method": "rk4"}])
def test_an_item_that_diverges_is_named_with_its_log_snr(settings):
    def rate(items, u, y):
        rates = torch.sin(u)[:, None].repeat(1, 4)
        rates[(items == 2) & (u > -0.5), 1] = math.inf  # in one of its coordinates
        return rates

    with pytest.raises(NonFiniteError, match="item 2 of the batch: its ODE diverges at log_snr = ") as error:
        Integrator(**settings)(rate, start(4), -2.0, -0.1)
    place = float(error.value.cause.rpartition(" ")[2])
    expected = -0.5 if not settings else -0.1
    assert place == pytest.approx(float(log_snr_at_flow_time(torch.tensor(expected, dtype=torch.float64))), rel=1e-3)


def test_calls_are_bounded():
    frequency, y_0 = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64), start(3)

    def rate(items, u, y):
        return torch.sin(frequency[items] * u)[:, None] * torch.ones_like(y)

    settings = {"rtol": 0.0, "atol": 1e-6}
    _, calls = Integrator(**settings)(rate, y_0, -9.0, 0.0)
    most = int(calls.max())
    assert int(Integrator(**settings, max_calls=most)(rate, y_0, -9.0, 0.0)[1].max()) == most
    with pytest.raises(ConfigError, match="item 2 has only reached log_snr = ") as error:
        Integrator(**settings, max_calls=most - 6)(rate, y_0, -9.0, 0.0)
    assert (error.value.code, error.value.where) == ("ODE_CALLS", f"max_calls = {most - 6}")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "euler"},
        {"method": "rk4", "num_steps": 0},
        *({"rtol": bad} for bad in (-1e-9, math.nan, math.inf)),
        *({"atol": bad} for bad in (0.0, math.nan, math.inf)),
    ],
)
def test_invalid_settings(settings):
    with pytest.raises(ConfigError) as error:
        Integrator(**settings)
    assert error.value.code == "ODE_METHOD"


def test_error_size_by_hand():
    old = torch.tensor([[1.0, -4.0, 10.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    new = torch.tensor([[-2.0, 3.0, -5.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    error = torch.tensor([[0.3, -0.5, 0.1], [0.1, 0.1, -0.6]], dtype=torch.float64)
    size = error_size(error, old, new, 0.1, 0.2)
    assert float(size[0]) == pytest.approx(math.sqrt(((0.3 / 0.4) ** 2 + (0.5 / 0.6) ** 2) / 2))
    assert float(size[1]) == pytest.approx(0.6 / 0.3)


def test_flow_time():
    """u = log tan(θ/2) for tan θ = sigma/alpha, so that dθ/du = sin θ; 0 where there is no signal."""
    log_snr = torch.tensor([20.0, 13.3, 1.0, 0.0, -5.0, -40.0], dtype=torch.float64)
    angle = torch.atan(torch.exp(-0.5 * log_snr))
    torch.testing.assert_close(flow_time(log_snr), torch.log(torch.tan(angle / 2)), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(log_snr_at_flow_time(flow_time(log_snr)), log_snr, rtol=1e-13, atol=1e-13)
    assert float(flow_time(-math.inf)) == 0
    assert log_snr_at_flow_time(torch.tensor([0.0, 1e-17], dtype=torch.float64)).tolist() == [-math.inf] * 2


def test_default_limit_of_calls():
    assert Integrator().max_calls == 10_000


@pytest.mark.parametrize("r", [1.0, 0.3, 4.0])
def test_the_velocity_is_the_derivative_of_the_state_over_its_radius(r):
    """x_t/r = cos θ x + sin θ ε with tan θ = sigma/alpha: cos θ = tanh(−u) and sin θ = 1/cosh(u)."""
    random = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=random)
    u = torch.tensor([-4.0, -0.7, 0.0], dtype=torch.float64)
    cos, sin = torch.tanh(-u), 1 / torch.cosh(u)

    def state(u):
        return torch.tanh(-u)[:, None, None] * x + (1 / torch.cosh(u))[:, None, None] * eps

    _, expected = torch.func.jvp(state, (u,), (torch.ones_like(u),))
    level = NoiseLevel(torch.full_like(u, 0.5), r * cos, r * sin, log_snr_at_flow_time(u))
    torch.testing.assert_close(flow_velocity(x, eps, level), expected, rtol=1e-12, atol=1e-12)

import copy
import math
from functools import partial

import pytest
import torch
from fifty_digits import logistic, mp, mpf
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.process.noise_level import transition_frac

tensor = partial(torch.tensor, dtype=torch.float64)
TIMES = [0.0, 0.003, 0.25193, 0.5, 0.75071, 0.98763, 1.0]


def bent(width=7, seed=0, scale=1.5, **ends) -> LearnedSchedule:
    """A schedule with random weights, as after training."""
    schedule = LearnedSchedule(**({"high": 9.0, "low": -4.0} | ends), width=width)
    with torch.no_grad():
        schedule.log_slopes.normal_(std=scale, generator=torch.Generator().manual_seed(seed))
    return schedule


def by_hand(schedule):
    """log_snr(t) in 50 digits: the integral of a mixture of smooth windows, divided by its value at 1."""
    J = schedule.width
    weights = [mp.exp(mpf(a)) for a in schedule.log_slopes.tolist()]

    def passed(j, t):  # ∫ sigmoid(4 J (τ − j/J)) dτ from 0 to t
        if j == 0:
            return t
        return (mp.log(1 + mp.exp(4 * J * t - 4 * j)) - mp.log(1 + mp.exp(-4 * j))) / (4 * J) if j < J else mpf(0)

    def risen(t):
        return sum(w * (passed(j, t) - passed(j + 1, t)) for j, w in enumerate(weights))

    high, low = mpf(float(schedule.high.detach())), mpf(float(schedule.low.detach()))
    return lambda t: high + (low - high) * risen(t) / risen(mpf(1))


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_levels_and_rate_in_fifty_digits(width):
    schedule = bent(width)
    log_snr, t = by_hand(schedule), tensor(TIMES)
    with torch.no_grad():
        level, rate = schedule(t), schedule.log_snr_rate(t)
        frac = transition_frac(schedule(tensor(TIMES[1:])), schedule(tensor(TIMES[:-1])))
    for i, time in enumerate(map(mpf, TIMES)):
        exact = log_snr(time)
        assert abs(mpf(level.log_snr[i].item()) - exact) < 1e-13
        assert abs(mpf(level.alpha[i].item()) ** 2 / logistic(exact) - 1) < 1e-12
        assert abs(mpf(level.sigma[i].item()) ** 2 / logistic(-exact) - 1) < 1e-12
        assert abs(mpf(rate[i].item()) / mp.diff(log_snr, time, h=mpf("1e-20")) - 1) < 1e-12
        if i:
            fall = 1 - mp.exp(exact - log_snr(mpf(TIMES[i - 1])))
            assert abs(mpf(frac[i - 1].item()) / fall - 1) < 1e-11
    assert (float(level.log_snr[0]), float(level.log_snr[-1])) == (9.0, pytest.approx(-4.0, abs=1e-14))
    assert level.t.tolist() == TIMES
    assert level.frac_fn is None
    assert (schedule.chain_length, schedule.t_min) == (None, 0.0)


@pytest.mark.parametrize("width", [1, 5, 32, 1024])
def test_initial_schedule_is_linear(width):
    learned, linear = S.build("learned", width=width), S.LinearLogSNR()
    t = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(learned(t).log_snr, linear(t).log_snr, rtol=0, atol=1e-13)
    torch.testing.assert_close(learned.log_snr_rate(t), linear.log_snr_rate(t), rtol=1e-13, atol=0)


@hypothesis_settings(max_examples=25)
@given(st.lists(st.floats(-6, 6), min_size=1, max_size=9), st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_log_snr_falls_for_any_weights(log_slopes, times):
    schedule = LearnedSchedule(width=len(log_slopes))
    schedule.log_slopes.data = tensor(log_slopes)
    t = tensor(times).sort().values
    level = schedule(t)
    assert bool((level.log_snr[1:] - level.log_snr[:-1] <= 1e-13).all())
    assert bool((schedule.log_snr_rate(t) < 0).all())
    torch.testing.assert_close(schedule(schedule.inverse(level.log_snr)).log_snr, level.log_snr, rtol=0, atol=1e-12)


def test_inverse():
    schedule = bent()
    t = tensor([TIMES, TIMES[::-1]])
    back = schedule.inverse(schedule(t).log_snr)
    assert back.dtype == torch.float64
    assert not back.requires_grad
    torch.testing.assert_close(back, t, rtol=0, atol=1e-12)
    beyond = schedule.inverse(tensor([math.inf, 800.0, -800.0, -math.inf]))
    torch.testing.assert_close(beyond, tensor([0, 0, 1, 1]), rtol=0, atol=1e-16)
    assert schedule.inverse(0.0).shape == schedule(0.5).log_snr.shape == ()


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan, [0.5, 2.0]])
def test_times_outside_the_unit_interval_are_refused(t):
    for function in (LearnedSchedule(), LearnedSchedule().log_snr_rate):
        with pytest.raises(ValueError, match="a time must be in"):
            function(t)


def test_gradients_are_those_of_finite_differences():
    schedule, t, h = bent(4), tensor([0.1, 0.6]), 1e-5

    def outputs():
        return torch.stack([*schedule(t)[1:4], schedule.log_snr_rate(t)])

    for parameter in schedule.parameters():
        for i in range(parameter.numel()):
            moved = []
            for sign in (1, -1):
                parameter.data.view(-1)[i] += sign * h
                moved.append(outputs().detach())
                parameter.data.view(-1)[i] -= sign * h
            for row, slope in zip(outputs().flatten(), ((moved[0] - moved[1]) / (2 * h)).flatten(), strict=True):
                (gradient,) = torch.autograd.grad(row, parameter, retain_graph=True)
                assert float(gradient.view(-1)[i]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


def test_learned_and_fixed_ends():
    assert [name for name, _ in LearnedSchedule().named_parameters()] == ["high", "low", "log_slopes"]
    fixed = bent(ends="fixed")
    assert list(fixed.state_dict()) == ["log_slopes"]
    assert not LearnedSchedule(ends="fixed").high.requires_grad
    torch.testing.assert_close(fixed(0.3).log_snr, bent()(0.3).log_snr, rtol=0, atol=0)
    assert copy.deepcopy(fixed)(0.3).log_snr == fixed(0.3).log_snr


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta")])
def test_the_schedule_stays_float64_on_the_cpu_when_the_model_is_cast_or_moved(move):
    model = nn.ModuleDict({"network": nn.Linear(2, 2), "schedule": bent()})
    before = model["schedule"](tensor(TIMES))
    move(model)
    assert (model["network"].weight.dtype, model["network"].weight.device.type) != (torch.float32, "cpu")
    assert {(p.dtype, p.device.type) for p in model["schedule"].parameters()} == {(torch.float64, "cpu")}
    for one, other in zip(model["schedule"](tensor(TIMES))[:4], before[:4], strict=True):
        assert torch.equal(one, other)
    rounded = bent()
    rounded.log_slopes.data = rounded.log_slopes.data.bfloat16().double()
    assert (rounded(0.6).log_snr - bent()(0.6).log_snr).abs() > 1e-4  # a cast would be noticed


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"high": -5.0, "low": 5.0}, "low = 5, high = -5: low must be below high"),
        ({"high": math.inf}, "low = -5, high = inf: low must be below high"),
        ({"ends": "free"}, "ends = 'free': unknown. Use 'learned' or 'fixed'"),
        *(
            ({"width": width}, f"width = {width!r}: not a whole number from 1 to 4096")
            for width in (0, 4097, True, 2.0)
        ),
        ({"bend": 1}, "schedule 'learned': got an unexpected keyword argument 'bend'"),
    ],
)
def test_invalid_settings(settings, where):
    with pytest.raises(ConfigError) as error:
        S.build("learned", **settings)
    assert str(error.value).startswith(f"error[SCHEDULE] {where}")

import math
from types import SimpleNamespace

import pytest
import torch
from fifty_digits import mp, mpf, normal_bin, table
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian, diffuse, forward, posterior, posterior_scales, reverse, step_log_var
from undiffuse.process.noise_level import log_var_large, log_var_small, transition_frac

F64 = torch.float64
reals = st.floats(-5, 5)


def scalar(*values):
    return torch.tensor(values, dtype=F64) if len(values) > 1 else torch.tensor(values[0], dtype=F64)


def normal_log_prob(x, mean, var):
    return -((x - mean) ** 2) / (2 * var) - mp.log(2 * mp.pi * var) / 2


# densities


@given(reals, reals, st.floats(-20, 20))
def test_log_prob_is_the_normal_density(x, mean, log_var):
    value = Gaussian(scalar(mean), scalar(log_var)).log_prob(scalar(x))
    truth = normal_log_prob(mpf(x), mpf(mean), mp.exp(mpf(log_var)))
    assert abs(mpf(value.item()) - truth) < 1e-12 * max(1, abs(truth))


def test_sample_scales_the_noise_and_adds_the_mean():
    p = Gaussian(scalar(1.0, -2.0), scalar(0.0, math.log(9)))
    assert p.sample(scalar(0.5, -1.0)).tolist() == pytest.approx([1.5, -5.0])


@given(reals, reals, st.floats(-20, 20), st.floats(-20, 20))
def test_kl_is_the_closed_form_and_not_negative(mean, mean2, log_var, log_var2):
    value = Gaussian(scalar(mean), scalar(log_var)).kl(Gaussian(scalar(mean2), scalar(log_var2))).item()
    v, v2 = mp.exp(mpf(log_var)), mp.exp(mpf(log_var2))
    truth = mp.log(v2 / v) / 2 + (v + (mpf(mean) - mpf(mean2)) ** 2) / (2 * v2) - mpf(1) / 2
    assert abs(mpf(value) - truth) < 1e-12 * abs(truth) + mpf("1e-14")
    assert value >= 0


def test_kl_of_equal_variances_is_the_squared_distance_over_twice_the_variance():
    p, q = Gaussian(scalar(0.25), scalar(-3.0)), Gaussian(scalar(1.0), scalar(-3.0))
    assert p.kl(q).item() == pytest.approx(0.75**2 / (2 * math.exp(-3)), rel=1e-15)  # T2
    assert p.kl(p) == 0


def test_kl_is_accurate_for_nearly_equal_variances():
    log_var = torch.tensor([0.0, 1e-3, -1e-6, 1e-9, 3e-12], dtype=F64)
    value = Gaussian(torch.zeros(5, dtype=F64), log_var).kl(
        Gaussian(torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64))
    )
    assert bool((value >= 0).all())
    torch.testing.assert_close(value[1:3], log_var[1:3] ** 2 / 4 + log_var[1:3] ** 3 / 12, rtol=1e-4, atol=0)


# bins


@pytest.mark.parametrize("std", [1.0, 0.01])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_bins_agree_with_fifty_digits_up_to_forty_sigma(levels, std):
    distance = torch.tensor([0, 1e-7, 0.3, 1, 2, 4, 5, 8, 8.3, 13, 20, 37.5, 38, 40], dtype=F64)
    low = torch.cat([-distance, distance - 2 / levels / std / 2]) * std
    high = low + 2 / levels
    value = Gaussian(torch.zeros_like(low), torch.full_like(low, 2 * math.log(std))).bin_log_prob((low, high))
    assert value.dtype == F64
    scale = mp.exp(-mpf(2 * math.log(std)) / 2)
    for a, b, v in zip(low.tolist(), high.tolist(), value.tolist(), strict=True):
        truth = normal_bin(mpf(a) * scale, mpf(b) * scale)
        assert abs(mpf(v) - truth) < 1e-9 * max(1, abs(truth) / 10), (a, b)


@pytest.mark.parametrize("width", [1e-9, 1e-4, 0.5, 3.0, 50.0, 1e4, 1e12])
@pytest.mark.parametrize("low", [-41.0, -3.0, -0.25, 0.0, 0.5, 6.0, 38.0])
def test_bins_of_any_width(low, width):
    mean, log_var = 0.75, 0.5
    value = Gaussian(scalar(mean), scalar(log_var)).bin_log_prob((scalar(low), scalar(low + width)))
    scale = mp.exp(-mpf(log_var) / 2)
    truth = normal_bin((mpf(low) - mpf(mean)) * scale, (mpf(low + width) - mpf(mean)) * scale)
    assert abs(mpf(value.item()) - truth) < 1e-12 * max(1, abs(truth)) + mpf("1e-14") * (1 + abs(low)) / min(width, 1)


def test_infinite_edges_are_tails():
    p = Gaussian(scalar(0.5), scalar(math.log(4)))
    inf = scalar(math.inf)
    assert p.bin_log_prob((-inf, inf)) == 0
    for edge in (-70.0, -3.0, 0.5, 0.6, 3.0, 70.0):
        z = (mpf(edge) - mpf("0.5")) / 2
        for bin, truth in (
            ((-inf, scalar(edge)), mp.log(mp.erfc(-z / mp.sqrt(2)) / 2)),
            ((scalar(edge), inf), mp.log(mp.erfc(z / mp.sqrt(2)) / 2)),
        ):
            assert abs(mpf(p.bin_log_prob(bin).item()) - truth) < 1e-13 * max(1, abs(truth)), (edge, bin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_bins_sum_to_one(levels, dtype):
    inner = torch.linspace(-1, 1, levels + 1, dtype=F64)[1:-1]
    inf = torch.full((1,), math.inf, dtype=F64)
    edges = torch.cat([-inf, inner]), torch.cat([inner, inf])
    for mean, log_var in ((0.0, 0.0), (0.9, -9.0), (-40.0, 1.0)):
        p = Gaussian(torch.full((levels,), mean, dtype=dtype), torch.tensor(log_var, dtype=dtype))
        assert torch.exp(p.bin_log_prob(edges)).sum().item() == pytest.approx(1, abs=1e-12)


def test_bin_gradients_are_finite_and_correct():
    edges = [(-math.inf, -0.5), (-0.5, 0.25), (0.25, 0.5), (0.5, math.inf), (-math.inf, math.inf)]
    low, high = (torch.tensor(e, dtype=F64) for e in zip(*edges, strict=True))
    for shift in (0.0, 0.3, 60.0, -60.0):
        mean = torch.full((5,), shift, dtype=F64, requires_grad=True)
        log_var = torch.full((5,), 0.2, dtype=F64, requires_grad=True)
        Gaussian(mean, log_var).bin_log_prob((low, high)).sum().backward()
        for i, (a, b) in enumerate(edges):
            by_mean = mp.diff(lambda m: _bin(a, b, m, mpf(0.2)), mpf(shift), h=mpf("1e-12"))  # noqa: B023
            by_log_var = mp.diff(lambda v: _bin(a, b, mpf(shift), v), mpf(0.2), h=mpf("1e-12"))  # noqa: B023
            assert abs(mpf(mean.grad[i].item()) - by_mean) < 1e-9 * max(1, abs(by_mean))
            assert abs(mpf(log_var.grad[i].item()) - by_log_var) < 1e-9 * max(1, abs(by_log_var))


def _bin(a, b, mean, log_var):
    scale = mp.exp(-log_var / 2)
    return normal_bin((mpf(a) - mean) * scale, (mpf(b) - mean) * scale)


# the forward process


@given(schedules, st.floats(0, 1), reals, reals)
def test_diffuse(schedule, t, x, eps):
    level = schedule(t)
    x_t = diffuse(torch.full((1, 2), x, dtype=F64), level, torch.full((1, 2), eps, dtype=F64))
    torch.testing.assert_close(x_t, torch.full((1, 2), float(level.alpha) * x + float(level.sigma) * eps, dtype=F64))


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_data_are_noised_in_float32(dtype, shape):
    level = DS.linear()(torch.full(shape, 0.5))
    x, eps = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    x_t = diffuse(x, level, eps)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, diffuse(x.float(), level, eps.float()))
    assert posterior(x, x, level, DS.linear()(0.25)).mean.dtype == torch.float32
    for variance in ("small", lambda t, s: t.log_snr, lambda t, s: torch.full((2, 3, 4), 0.1, dtype=F64)):
        assert step_log_var(x, level, DS.linear()(0.25), variance).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_every_one_of_a_thousand_steps_changes_float32_data(name):
    schedule = S.build(name)
    t, x = torch.arange(1001, dtype=F64) / 1000, torch.full((1001, 1), 0.3)
    x_t = diffuse(x, schedule(t), torch.zeros(1001, 1))  # the signal changes less than the noise
    noisy = diffuse(x, schedule(t), torch.ones(1001, 1))
    assert bool((x_t[1:] < x_t[:-1]).all())
    assert bool((noisy[1:] != noisy[:-1]).all())


def test_levels_of_a_batch_broadcast_to_their_items():
    schedule = DS.cosine(10)
    t, s = schedule(torch.tensor([0.2, 0.9])), schedule(torch.tensor([0.1, 0.5]))
    x, eps = torch.randn(2, 2, 3, 4, 5, dtype=F64)
    x_t = diffuse(x, t, eps)
    noise = SimpleNamespace(x=x, var_interp=torch.rand(2, 3, 4, 5, dtype=F64))
    for i in range(2):
        ti, si, xi, xti = t.take(i), s.take(i), x[i : i + 1], x_t[i : i + 1]
        torch.testing.assert_close(xti, diffuse(xi, ti, eps[i : i + 1]))
        alone, together = posterior(xti, xi, ti, si), posterior(x_t, x, t, s)
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean)
        torch.testing.assert_close(together.log_var[i : i + 1], alone.log_var)
        torch.testing.assert_close(forward(x_t, s, t).mean[i : i + 1], forward(xti, si, ti).mean)
        torch.testing.assert_close(forward(x_t, s, t).log_var[i : i + 1], forward(xti, si, ti).log_var)
        one = SimpleNamespace(x=xi, var_interp=noise.var_interp[i : i + 1])
        for variance in ("small", "large", "learned", lambda a, b: a.log_snr - b.log_snr):
            torch.testing.assert_close(
                reverse(noise, x_t, t, s, variance).log_var.expand(2, 3, 4, 5)[i : i + 1],
                reverse(one, xti, ti, si, variance).log_var.expand(1, 3, 4, 5),
            )


def test_one_step_is_ho_equation_2():
    beta, _ = table("linear", 10)
    schedule, x = DS.linear(10), torch.tensor([[0.7, -2.0]], dtype=F64)
    for k in range(1, 11):
        step = forward(x, schedule((k - 1) / 10), schedule(k / 10))
        torch.testing.assert_close(step.mean, math.sqrt(1 - beta[k - 1]) * x, rtol=1e-13, atol=0)
        assert math.exp(step.log_var) == pytest.approx(float(beta[k - 1]), rel=1e-12)


@given(st.integers(2, 20))
def test_steps_compose_to_diffuse(T):
    schedule = DS.cosine(T)
    mean, var = scalar(1.0), 0.0
    for k in range(1, T + 1):
        step = forward(mean.view(1), schedule((k - 1) / T), schedule(k / T))
        gain = float(step.mean / mean)
        mean, var = step.mean.view(()), gain**2 * var + math.exp(step.log_var)
    assert float(mean) == pytest.approx(float(schedule(1.0).alpha), rel=1e-12)
    assert var == pytest.approx(float(schedule(1.0).sigma) ** 2, rel=1e-12)


# the reverse process


@given(schedules, st.floats(0.05, 1), st.floats(0.02, 0.98), reals, reals, reals)
def test_posterior_is_bayes_rule(schedule, at, ratio, x, x_s, x_t):
    t, s = schedule(at), schedule(at * ratio)
    if t.alpha == 0 or s.sigma == 0 or transition_frac(t, s) < 1e-6:
        return
    x, x_s, x_t = (torch.full((1,), v, dtype=F64) for v in (x, x_s, x_t))
    at_t, at_s = (Gaussian(level.alpha * x, 2 * torch.log(level.sigma)) for level in (t, s))
    terms = [forward(x_s, s, t).log_prob(x_t), at_s.log_prob(x_s), -at_t.log_prob(x_t)]
    size = max(1.0, *(abs(float(v)) for v in terms))
    assert float(posterior(x_t, x, t, s).log_prob(x_s)) == pytest.approx(float(sum(terms)), abs=1e-8 * size)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_reverse_by_hos_formulas(name):
    T = 20
    beta, alpha_bar = table(name, T)
    schedule = S.build(name, T=T)
    x, eps = torch.tensor([[0.7, -0.2]], dtype=F64), torch.tensor([[-1.1, 0.4]], dtype=F64)
    for k in range(2, T + 1):
        t, s = schedule(k / T), schedule((k - 1) / T)
        b, now, before = (float(v) for v in (beta[k - 1], alpha_bar[k], alpha_bar[k - 1]))
        x_t = math.sqrt(now) * x + math.sqrt(1 - now) * eps
        mean = (x_t - b * eps / math.sqrt(1 - now)) / math.sqrt(1 - b)  # R4
        prediction = SimpleNamespace(x=x, var_interp=torch.tensor([[0.25, 1.5]], dtype=F64))
        small, large = math.log(b * (1 - before) / (1 - now)), math.log(b)
        rows = {
            "small": [small],
            "large": [large],
            "learned": [0.25 * large + 0.75 * small, 1.5 * large - 0.5 * small],  # var_interp is not clamped
        }
        for variance, log_var in rows.items():
            p = reverse(prediction, x_t, t, s, variance)
            torch.testing.assert_close(p.mean, mean, rtol=1e-9, atol=1e-10)
            assert p.log_var.flatten().tolist() == pytest.approx(log_var, abs=1e-11)
        assert reverse(prediction, x_t, t, s).log_var.item() == pytest.approx(small, abs=1e-11)
        q = posterior(x_t, x, t, s)
        torch.testing.assert_close(q.mean, mean, rtol=1e-9, atol=1e-10)
        assert q.log_var.item() == pytest.approx(small, abs=1e-11)


def test_karras_step_between_two_sigmas():
    t, s = S.VarianceExploding(0.01, 100.0)(0.75), S.VarianceExploding(0.01, 100.0)(0.5)  # sigma 10 and 1
    assert [v.item() for v in posterior_scales(t, s)] == pytest.approx([0.01, 0.99])


def test_the_last_step_ends_in_x_with_the_chosen_variance():
    schedule = DS.linear(10)
    t, s = schedule(0.1), schedule(0.0)
    x, x_t = torch.randn(2, 1, 3, dtype=F64)
    beta, alpha_bar = (list(map(float, v)) for v in table("linear", 10))
    small = math.log(beta[1] * (1 - alpha_bar[1]) / (1 - alpha_bar[2]))
    prediction = SimpleNamespace(x=x, var_interp=torch.full((1, 3), 0.5, dtype=F64))
    rows = [
        (("small",), small),
        (("large",), math.log(beta[0])),
        (("large", "beta"), math.log(beta[0])),
        (("large", "clipped"), small),
        (("learned",), (math.log(beta[0]) + small) / 2),
    ]
    for arguments, log_var in rows:
        p = reverse(prediction, x_t, t, s, *arguments)
        torch.testing.assert_close(p.mean, x, rtol=0, atol=1e-15)
        assert p.log_var.flatten().tolist() == pytest.approx([log_var] * p.log_var.numel(), abs=1e-12)
    later = reverse(prediction, x_t, schedule(0.5), schedule(0.4), "large", "clipped")
    assert later.log_var.item() == pytest.approx(math.log(beta[4]), abs=1e-12)
    only = reverse(prediction, x_t, DS.linear(1)(1.0), DS.linear(1)(0.0), "small")
    assert only.log_var.item() == pytest.approx(math.log(1e-4), abs=1e-12)


def test_a_variance_may_be_a_function_of_any_shape_that_broadcasts():
    schedule, x_t = DS.linear(10), torch.randn(2, 3, 4)
    t, s = schedule(torch.tensor([0.5, 1.0])), schedule(torch.tensor([0.4, 0.9]))
    per_item = step_log_var(x_t, t, s, lambda t, s: log_var_large(t, s) + 1)
    assert per_item.shape == (2, 1, 1)
    assert per_item.dtype == torch.float32
    torch.testing.assert_close(per_item.flatten().double(), log_var_large(t, s) + 1, rtol=1e-6, atol=0)
    per_pixel = torch.arange(4.0)
    assert torch.equal(step_log_var(x_t, t, s, lambda t, s: per_pixel), per_pixel)
    full = torch.randn(2, 3, 4, dtype=F64)
    assert torch.equal(step_log_var(x_t, t, s, lambda t, s: full), full.float())
    assert step_log_var(x_t, t.take(0), s.take(0), lambda t, s: log_var_small(t, s)).shape == (1, 1, 1)
    assert step_log_var(x_t.to("meta"), t, s, lambda t, s: full).device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("learned",), "error[VARIANCE] variance='learned': this model does not predict a variance. Use 'small' or"),
        (("medium",), "error[VARIANCE] variance='medium': unknown. Use 'small', 'large', 'learned' or a function"),
        (("large", None, "ho"), "error[FIRST_LARGE] 'ho': unknown. Use 'beta' or"),
    ],
)
def test_invalid_variances(arguments, message):
    schedule = DS.linear(10)
    with pytest.raises(ConfigError) as error:
        step_log_var(torch.zeros(1), schedule(0.5), schedule(0.4), *arguments)
    assert str(error.value).startswith(message)

import inspect
import math
from itertools import pairwise

import fifty_digits as exact
import pytest
import torch
from fifty_digits import BETAS, SIZES, mp, mpf, table
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, tables

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.discrete_schedule import compensated_cumsum
from undiffuse.process.gaussian import forward, posterior, posterior_scales
from undiffuse.process.noise_level import log_var_large, log_var_small, transition_frac

TABLES = {  # the constructor of each table of T steps
    "linear": DS.linear,
    "linear_rescaled": DS.linear_rescaled,
    "quadratic": DS.quadratic,
    "cosine": DS.cosine,
    "tabulated": lambda T: DS.Tabulated(exact.arbitrary(T)),
}
FUNCTIONS = {  # name: the schedule, and (alpha², sigma²) in 50 digits; with default and with unusual settings
    "sigmoid": (S.Sigmoid(), exact.sigmoid()),
    "sigmoid, cut": (S.Sigmoid(0.0, 3.0, 0.75, 0.125), exact.sigmoid("0", "3", "0.75", "0.125")),
    "linear_log_snr": (S.LinearLogSNR(), exact.linear_log_snr()),
    "linear_log_snr, wide": (S.LinearLogSNR(20.0, -15.0), exact.linear_log_snr("20", "-15")),
    "variance_exploding": (S.VarianceExploding(), exact.variance_exploding()),
    "variance_exploding, Karras": (S.VarianceExploding(0.002, 80.0), exact.variance_exploding("0.002", "80")),
    "flow": (S.Flow(), exact.flow()),
}
SMOOTH = FUNCTIONS | {
    f"{name}({T})": (TABLES[name](T), exact.tabulated(name, T)) for name in TABLES for T in (1, 7, 1000)
}


def grid(T):
    return torch.arange(T + 1, dtype=torch.float64) / T


def off(value, truth):
    """The relative error of a float against 50 digits."""
    return abs(mpf(value) - truth) / abs(truth)


def check_table(name, T, steps):
    beta, alpha_bar = table(name, T)
    schedule = TABLES[name](T)
    assert schedule.chain_length == T
    assert schedule.t_min == 1 / T
    levels = schedule(grid(T))
    t, s = levels.take(slice(1, None)), levels.take(slice(0, -1))
    small, large = log_var_small(t, s), log_var_large(t, s)
    A, B = posterior_scales(t, s)
    of = [v.tolist() for v in (t.alpha, t.sigma, t.log_snr, transition_frac(t, s), small, large, A, B)]
    for k in steps:
        now, before, b = alpha_bar[k], alpha_bar[k - 1], beta[k - 1]
        alpha, sigma, log_snr, frac, log_small, log_large, a_k, b_k = (column[k - 1] for column in of)
        variance = b * (1 - before) / (1 - now)  # Ho20 eq. 7
        if k == 1:  # final_log_var: that of the step before the last
            variance = b if T == 1 else beta[1] * (1 - alpha_bar[1]) / (1 - alpha_bar[2])
        relative = {
            "alpha": off(alpha, mp.sqrt(now)),
            "sigma²": off(sigma**2, 1 - now),
            "log_snr, absolute": abs(mpf(log_snr) - mp.log(now / (1 - now))),
            "frac": off(frac, b / (1 - now)),
            "small": off(mp.exp(log_small), variance),
            "large": off(mp.exp(log_large), b),
            "A": off(a_k, mp.sqrt(1 - b) * (1 - before) / (1 - now)) if k > 1 else mpf(a_k),
            "B": off(b_k, mp.sqrt(before) * b / (1 - now)),
        }
        worst = max(relative, key=relative.get)
        assert relative[worst] < mpf("1e-12"), (k, worst, relative[worst])
    assert levels.alpha[0] == 1
    assert levels.sigma[0] == 0
    assert levels.log_snr[0] == math.inf


def some(T):
    """All of 1..T, or about 100 of these with both ends."""
    return sorted({1, 2, 3, T - 2, T - 1, T, *range(1, T, T // 95)}) if T > 100 else range(1, T + 1)


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("name", BETAS)
def test_tables_are_accurate_to_twelve_digits(name, T):
    check_table(name, T, some(T))


@pytest.mark.release
@pytest.mark.parametrize("T", SIZES[-3:])
@pytest.mark.parametrize("name", BETAS)
def test_tables_are_accurate_to_twelve_digits_at_every_step(name, T):
    check_table(name, T, range(1, T + 1))


def check_function(name, T, steps):
    schedule, powers = FUNCTIONS[name]
    levels = schedule(grid(T))
    frac = transition_frac(levels.take(slice(1, None)), levels.take(slice(0, -1))).tolist()
    t, alpha, sigma, log_snr = (v.tolist() for v in levels[:4])
    for k in sorted({*steps, *(k - 1 for k in steps)}):
        signal, noise = powers(mpf(t[k]))
        assert (off(alpha[k], mp.sqrt(signal)) if signal else alpha[k]) < mpf("1e-12"), k
        if t[k] == 0 and sigma[k] == 0:  # where the 50-digit form may be 1e-50
            assert log_snr[k] == math.inf
            assert noise < 1e-45
        else:
            assert off(sigma[k] ** 2, noise) < mpf("1e-12"), k
        if signal > 0 and sigma[k] > 0:
            assert abs(mpf(log_snr[k]) - mp.log(signal / noise)) < mpf("1e-12"), k
    for k in steps:
        (signal, noise), (cleaner, less) = powers(mpf(t[k])), powers(mpf(t[k - 1]))
        assert off(frac[k - 1], 1 - signal * less / (noise * cleaner)) < mpf("1e-12"), k


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate_to_twelve_digits(name, T):
    check_function(name, T, some(T))


@pytest.mark.release
@pytest.mark.parametrize("T", SIZES[-3:])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate_to_twelve_digits_at_every_step(name, T):
    check_function(name, T, range(1, T + 1))


INSIDE = [0.01237, 0.25193, 0.50141, 0.75071, 0.98763]  # on no grid


@pytest.mark.parametrize("name", SMOOTH)
def test_levels_between_grid_times_and_the_rate_follow_the_formula(name):
    schedule, powers = SMOOTH[name]
    log_snr = exact.log_snr(powers)
    level, rate = schedule(torch.tensor(INSIDE)), schedule.log_snr_rate(torch.tensor(INSIDE))
    assert rate.dtype == level.log_snr.dtype == torch.float64
    assert level.t.tolist() == torch.tensor(INSIDE).tolist()
    for i, t in enumerate(level.t.tolist()):
        signal, noise = powers(mpf(t))
        assert off(level.alpha[i].item(), mp.sqrt(signal)) < 1e-11
        assert off(level.sigma[i].item() ** 2, noise) < 1e-11
        assert abs(mpf(level.log_snr[i].item()) - log_snr(mpf(t))) < 1e-11
        assert off(rate[i].item(), mp.diff(log_snr, mpf(t), h=mpf("1e-15"))) < 1e-9


@pytest.mark.parametrize("name", SMOOTH)
def test_inverse(name):
    schedule = SMOOTH[name][0]
    t = torch.cat([grid(schedule.chain_length or 64), torch.tensor(INSIDE, dtype=torch.float64)])
    back = schedule.inverse(schedule(t).log_snr)
    assert back.dtype == torch.float64
    log_snr = schedule(t).log_snr
    torch.testing.assert_close(schedule(back).log_snr, log_snr, rtol=0, atol=1e-11)
    if "tabulated" not in name:  # its steps of 1e-9 and less do not change log_snr
        torch.testing.assert_close(back, t, rtol=0, atol=1e-10)
    beyond = schedule.inverse(torch.tensor([[math.inf, 800.0], [-800.0, -math.inf]]))
    assert beyond.shape == (2, 2)
    torch.testing.assert_close(beyond[0], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(beyond[1], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool(((beyond >= 0) & (beyond <= 1)).all())
    assert schedule.inverse(0.0).shape == ()
    assert schedule(0.5).log_snr.shape == ()


def test_inverse_stays_in_the_unit_interval_despite_rounding():
    for start, end in ((-k / 7, j / 3) for k in range(1, 12) for j in range(1, 12)):
        ends = S.Sigmoid(start, end).inverse(torch.tensor([math.inf, -math.inf]))
        assert ends[0] >= 0
        assert ends[1] <= 1


@given(schedules, st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_log_snr_falls_and_agrees_with_alpha_and_sigma(schedule, times):
    t = torch.tensor(times, dtype=torch.float64).sort().values
    level = schedule(t)
    assert bool((level.log_snr[1:] <= level.log_snr[:-1]).all())
    assert bool((schedule.log_snr_rate(t) <= 0).all())
    torch.testing.assert_close(torch.exp(level.log_snr), (level.alpha / level.sigma) ** 2, rtol=1e-11, atol=0)
    if not isinstance(schedule, S.VarianceExploding | S.Flow):
        torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)


@given(tables())
def test_beta_can_be_recovered_from_a_table(schedule):
    levels = schedule(grid(schedule.chain_length))
    now, before = levels.take(slice(1, None)), levels.take(slice(0, -1))
    torch.testing.assert_close(torch.exp(log_var_large(now, before)), schedule.beta, rtol=1e-11, atol=0)
    torch.testing.assert_close((now.alpha / before.alpha) ** 2, 1 - schedule.beta, rtol=1e-11, atol=1e-12)


def test_defaults_are_the_papers():
    defaults = {
        name: [p.default for p in inspect.signature(make).parameters.values()] for name, make in S.SCHEDULES.items()
    }
    assert defaults == {
        "linear": [1000, 1e-4, 0.02],
        "linear_rescaled": [1000, 1e-4, 0.02, 0.999],
        "quadratic": [1000, 1e-4, 0.02],
        "cosine": [1000, 0.008, 0.999],
        "diffusers": [1000, 1e-4, 0.02, "linear", None, False],
        "sigmoid": [-3.0, 3.0, 1.0, 1e-9],
        "linear_log_snr": [13.3, -5.0],
        "learned": [13.3, -5.0, "learned", 32],
        "learned_chain": [40, 1e-4, -5.0],
        "variance_exploding": [0.01, 50.0],
        "flow": [],
        "tabulated": [inspect.Parameter.empty],
    }
    assert {name: make[0].t_min for name, make in FUNCTIONS.items() if "," not in name} == {
        "sigmoid": 1e-5,
        "linear_log_snr": 0.0,
        "variance_exploding": 0.0,
        "flow": 1e-5,
    }
    assert {make[0].chain_length for make in FUNCTIONS.values()} == {None}
    assert {name.split(",")[0] for name in FUNCTIONS} | {
        *TABLES,
        "learned",
        "learned_chain",
        "tabulated",
        "diffusers",
    } == {*S.SCHEDULES}


def test_settings_reach_the_tables():
    assert DS.linear(3, 0.1, 0.3).beta.tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-15)
    assert DS.quadratic(3, 0.01, 0.25).beta.tolist() == pytest.approx([0.01, 0.09, 0.25], rel=1e-14)
    assert DS.linear_rescaled(500, 1e-3, 0.04).beta[[0, -1]].tolist() == pytest.approx([2e-3, 0.08], rel=1e-14)
    assert DS.linear_rescaled(2, 1e-4, 0.02, 0.5).beta.tolist() == pytest.approx([0.05, 0.5])
    bar = torch.cos(math.pi / 2 * (grid(4)[:2] + 0.1) / 1.1) ** 2
    assert float(DS.cosine(4, 0.1).beta[0]) == pytest.approx(float(1 - bar[1] / bar[0]), rel=1e-13)
    assert DS.cosine(4, limit=0.25).beta.tolist()[1:] == [0.25] * 3


THEIRS = {  # alphas_cumprod of DDPMScheduler of diffusers 0.42.1 at its steps 0, 499, 998 and 999
    ("linear", False): (0.9998999834060669, 0.07858723402023315, 4.118194192415103e-05, 4.035830352222547e-05),
    ("linear", True): (0.9998999834060669, 0.0760287269949913, 4.213273285813557e-09, 0.0),
    ("scaled_linear", False): (0.9998999834060669, 0.3331878185272217, 0.000748379563447088, 0.0007334119873121381),
    ("scaled_linear", True): (0.9999001026153564, 0.31974175572395325, 7.98631205611855e-08, 0.0),
    ("squaredcos_cap_v2", False): (
        0.9999586939811707,
        0.4938434660434723,
        2.428766265438753e-06,
        2.4287349909002387e-09,
    ),
    ("squaredcos_cap_v2", True): (0.999958872795105, 0.49382346868515015, 2.277813791806693e-06, 0.0),
    ("sigmoid", False): (0.9998508095741272, 0.3019309937953949, 4.048962364322506e-05, 3.9681821363046765e-05),
    ("sigmoid", True): (0.999850869178772, 0.2988007664680481, 4.121581298477395e-09, 0.0),
}


@pytest.mark.parametrize(("kind", "zero_end"), THEIRS)
def test_tables_of_diffusers_are_its_float32_tables(kind, zero_end):
    schedule = DS.diffusers(kind=kind, zero_end=zero_end)
    alpha = schedule(torch.tensor([0.001, 0.5, 0.999, 1.0], dtype=torch.float64)).alpha
    if not zero_end:
        assert (alpha**2).tolist() == pytest.approx(THEIRS[kind, False], rel=1e-13, abs=0)
        return
    # the last bit of a float32 root depends on the processor: also the last bits of theirs, by products of 999 ratios,
    # and most where a root is near the last one, which is subtracted
    *roots, last = (math.sqrt(bar) for bar in THEIRS[kind, False])
    for i, root in enumerate(roots):
        assert float(alpha[i] ** 2) == pytest.approx(THEIRS[kind, True][i], rel=2e-6 + 2**-22 * root / (root - last))
    assert float(alpha[-1]) == 0


def test_settings_of_the_tables_of_diffusers():
    first, last = DS.diffusers(50, 0.01, 0.2).beta[[0, -1]].tolist()
    assert [first, last] == pytest.approx([0.01, 0.2], rel=1e-5)
    assert DS.diffusers(3, trained=[0.1, 0.2, 0.3]).beta.tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-6)
    for settings, cause in (({"kind": "laplace"}, "no such table"), ({"T": 3, "trained": [0.1]}, "it has 1 numbers")):
        with pytest.raises(ConfigError, match=cause):
            DS.diffusers(**settings)


def test_ends_of_linear_tables():
    assert DS.linear(10_000).beta[[0, -1]].tolist() == [1e-4, 0.02]
    assert DS.linear(1).beta.tolist() == [1e-4]
    for T in range(2, 20):  # Dhariwal's rule without a limit leaves (0, 1) here
        assert 0.999 == DS.linear_rescaled(T).beta[-1] > DS.linear_rescaled(T).beta[0]


def test_cumsum_is_compensated():
    # a plain sum of these has an error of 1e-12; math.fsum is exact
    terms = torch.log1p(torch.full((100_000,), -1e-4, dtype=torch.float64))
    sums, lost = (v.tolist() for v in compensated_cumsum(terms))
    for k in (0, 1, 10, 99_999, 100_000):
        assert sums[k] == math.fsum(terms[:k].tolist())
        assert lost[k] == pytest.approx(math.fsum([*terms[:k].tolist(), -sums[k]]), rel=1e-9, abs=1e-30)
    mixed = torch.tensor([1e-20, -1.0, 1e-20, 1.0, 1e-20, -math.inf], dtype=torch.float64)
    sums, lost = (v.tolist() for v in compensated_cumsum(mixed))
    assert sums == [0.0, 1e-20, -1.0, -1.0, pytest.approx(2e-20, rel=1e-15), pytest.approx(3e-20), -math.inf]
    assert lost == [
        0.0,
        0.0,
        1e-20,
        pytest.approx(2e-20, rel=1e-15),
        pytest.approx(0, abs=1e-35),
        pytest.approx(0, abs=1e-35),
        0.0,
    ]


def test_zero_terminal_table_ends_in_pure_noise():
    schedule = DS.Tabulated([0.1, 0.5, 1.0])
    levels = schedule(grid(3))
    assert levels.alpha[-1] == 0
    assert levels.sigma[-1] == 1
    assert levels.log_snr[-1] == -math.inf
    assert schedule.inverse(levels.log_snr).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-15)
    assert schedule.log_snr_rate(1.0) == -math.inf
    now, before = levels.take(slice(1, None)), levels.take(slice(0, -1))
    assert transition_frac(now, before).tolist() == pytest.approx([1, 0.5 / 0.55, 1], rel=1e-14)
    x, x_t = torch.randn(2, 5, dtype=torch.float64)
    last = posterior(x_t, x, levels.take(3), levels.take(2))  # x_T does not depend on x
    torch.testing.assert_close(last.mean, math.sqrt(0.45) * x)
    torch.testing.assert_close(torch.exp(last.log_var), torch.full((1,), 0.55, dtype=torch.float64))
    assert DS.Tabulated([1.0])(torch.tensor([0.0, 1.0])).alpha.tolist() == [1, 0]
    assert float(log_var_small(levels.take(1), levels.take(0))) == pytest.approx(math.log(0.5 * 0.1 / 0.55))


def test_times_within_rounding_of_the_grid_count_as_grid_times():
    schedule = DS.linear(1000)
    on = schedule(torch.tensor(0.3, dtype=torch.float64))
    for near in (0.1 * 3, 0.3 + 9e-10, 0.3 - 9e-10):
        assert schedule(near).log_snr == on.log_snr
        assert schedule.log_snr_rate(near) == schedule.log_snr_rate(0.3)
    assert schedule(0.3 + 1.1e-9).log_snr < on.log_snr < schedule(0.3 - 1.1e-9).log_snr
    # at a grid time the rate is that of the step which ends there
    beta, noise = schedule.beta.tolist(), float(on.sigma**2)
    assert float(schedule.log_snr_rate(0.3)) == pytest.approx(1000 * math.log1p(-beta[299]) / noise, rel=1e-12)
    assert float(schedule.log_snr_rate(0.3 + 1e-7)) == pytest.approx(1000 * math.log1p(-beta[300]) / noise, rel=1e-5)
    assert schedule.log_snr_rate(0.0) == -math.inf


@pytest.mark.parametrize("T", [0, -1, 10_001, 10.0, True, "10"])
@pytest.mark.parametrize("name", ["linear", "linear_rescaled", "quadratic", "cosine"])
def test_T_must_be_a_whole_number_in_range(name, T):
    with pytest.raises(ConfigError) as error:
        S.build(name, T=T)
    assert str(error.value) == (
        f"error[SCHEDULE] T = {T}: the number of steps must be a whole number from 1 to 10,000. Change T."
    )


@pytest.mark.parametrize(
    ("beta", "where"),
    [
        ([0.1, 0.0], "beta[1] = 0"),
        ([0.1, 0.2, -0.5, 2.0], "beta[2] = -0.5"),
        ([1.0, 0.5], "beta[0] = 1"),
        ([0.5, 1.5], "beta[1] = 1.5"),
        ([0.5, math.nan], "beta[1] = nan"),
        ([0.5, 0.5, math.inf], "beta[2] = inf"),
    ],
)
def test_beta_outside_its_range(beta, where):
    with pytest.raises(ConfigError) as error:
        DS.Tabulated(beta)
    assert str(error.value) == (
        f"error[SCHEDULE] {where}: every beta must lie in (0, 1), the last may be 1. "
        "Correct the table, or use a schedule that fits this T (linear_rescaled, cosine)."
    )


@pytest.mark.parametrize("beta", [0.5, [], [[0.1, 0.2]], torch.full((1_000_001,), 0.5)])
def test_beta_must_be_a_list(beta):
    with pytest.raises(ConfigError, match=r"^error\[SCHEDULE\] beta: expected a list of T numbers, got the shape \("):
        DS.Tabulated(beta)


@pytest.mark.release
def test_a_million_steps_are_allowed():
    assert DS.Tabulated(torch.full((1_000_000,), 1e-6)).chain_length == 1_000_000


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: S.LinearLogSNR(-5.0, 5.0), "low = 5, high = -5: low must be below high"),
        (lambda: S.LinearLogSNR(1.0, 1.0), "low = 1, high = 1: low must be below high"),
        (lambda: S.LinearLogSNR(math.inf, 1.0), "low = 1, high = inf: low must be below high"),
        (lambda: S.LinearLogSNR(1.0, -math.inf), "low = -inf, high = 1: low must be below high"),
        (lambda: S.Sigmoid(3.0, -3.0), "start = 3, end = -3: start must be below end"),
        (lambda: S.Sigmoid(width=0.0), "0 = 0, width = 0: 0 must be below width"),
        (lambda: S.Sigmoid(width=0.004), "width = 0.004: is less than 1/50 of end − start = 6"),
        (lambda: S.VarianceExploding(0.0, 5.0), "0 = 0, sigma_min = 0: 0 must be below sigma_min"),
        (lambda: S.VarianceExploding(2.0, 1.0), "sigma_min = 2, sigma_max = 1: sigma_min must be below sigma_max"),
        (lambda: S.build("nope"), "'nope': no such schedule. Use one of linear, linear_rescaled"),
        (lambda: S.build("linear", steps=3), "schedule 'linear': got an unexpected keyword argument 'steps'. Check"),
    ],
)
def test_invalid_schedules(make, where):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(f"error[SCHEDULE] {where}")
    assert "\n" not in str(error.value)


def test_build_passes_settings():
    assert S.build("variance_exploding", sigma_min=0.002, sigma_max=80.0) == S.VarianceExploding(0.002, 80.0)
    assert S.build("cosine", T=7).chain_length == 7
    assert S.build("tabulated", beta=[0.5]).beta.tolist() == [0.5]


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan, [0.5, 2.0]])
@pytest.mark.parametrize("name", ["linear", "sigmoid", "linear_log_snr", "variance_exploding", "flow"])
def test_times_outside_the_unit_interval_are_refused(name, t):
    schedule = S.build(name)
    for function in (schedule, schedule.log_snr_rate):
        with pytest.raises(ValueError, match=r"a time must be in \[0, 1\], 0 for data and 1 for noise; got \["):
            function(t)


def test_times_are_detached_and_become_float64():
    level = S.LinearLogSNR()(torch.tensor([0.5], dtype=torch.float16, requires_grad=True))
    assert not level.log_snr.requires_grad
    assert {v.dtype for v in level[:4]} == {torch.float64}


@pytest.mark.parametrize("name", TABLES)
def test_a_sub_grid_is_a_chain_with_its_own_final_variance(name):
    T = 20
    alpha_bar = table(name, T)[1]
    for ks in ([20, 13, 6, 1, 0], [20, 7, 0], [20, 0], [17, 5, 2]):
        levels = S.chain(TABLES[name](T), [k / T for k in ks])
        assert [level.t.item() for level in levels] == [k / T for k in ks]
        variances = []
        for (k, t), (j, s) in pairwise(zip(ks, levels, strict=True)):
            now, before = alpha_bar[k], alpha_bar[j]
            large = 1 - now / before
            small = large * (1 - before) / (1 - now)
            variances.append(small if j else (variances[-1] if variances else large))
            assert off(transition_frac(t, s).item(), large / (1 - now)) < 1e-12
            assert off(math.exp(log_var_large(t, s)), large) < 1e-12
            assert off(math.exp(log_var_small(t, s)), variances[-1]) < 1e-12
            step = forward(torch.ones(1, dtype=torch.float64), s, t)
            assert off(step.mean.item(), mp.sqrt(now / before)) < 1e-12


def test_final_log_var_of_short_chains():
    assert S.chain(DS.linear(10), [1.0, 0.0])[-1].final_log_var is None
    schedule = DS.linear(10)
    assert S.chain(schedule, [1.0, 0.1])[-1].final_log_var == schedule(0.1).final_log_var
    assert S.chain(S.VarianceExploding(), [1.0, 0.0])[-1].final_log_var is None


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [[1.0, 0.0]], [1.0, 1.0], [2.0, 0.0]])
def test_chains_must_fall(times):
    with pytest.raises(ValueError, match=r"a chain is a falling list of at least two times|a time must be in"):
        S.chain(DS.linear(10), times)


def test_a_table_that_does_not_rise_has_a_note():
    assert DS.Tabulated([0.1, 0.3, 0.2, 0.2, 0.05]).notes == (
        "the table of beta falls in 2 of its 5 steps, first at beta[2] = 0.2 after 0.3",
    )
    assert DS.Tabulated([0.1, 0.1, 0.1]).notes == ("the table of beta does not rise: every step has 0.1",)
    for rising in (
        DS.Tabulated([0.1]),
        DS.Tabulated([0.1, 0.2, 0.2, 1.0]),
        *(TABLES[name](T) for name in TABLES for T in (7, 1000) if name != "tabulated"),
    ):
        assert rising.notes == ()

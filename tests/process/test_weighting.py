import math

import pytest
import torch
from fifty_digits import table
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.target import TARGETS
from undiffuse.process.target import build as target
from undiffuse.process.weighting import WEIGHTS, build

F64 = torch.float64
SNR = [1e-4, 0.2, 0.9, 1.0, 1.1, 4.9, 5.1, 300.0]


def karras(sigma_data):
    """1/c_out² for x [Karras22 table 1] as a function of SNR; divided by SNR for eps."""
    return lambda snr: (1 / snr + sigma_data**2) / (1 / snr * sigma_data**2) / snr


ROWS = [  # name, settings, and the weight of the eps loss in the paper as a function of SNR
    ("simple", {}, lambda snr: 1.0),
    ("truncated_snr", {}, lambda snr: max(snr, 1) / snr),  # on x: max(SNR, 1)
    ("min_snr", {}, lambda snr: min(snr, 5) / snr),  # on x: min(SNR, 5)
    ("min_snr", {"limit": 0.5}, lambda snr: min(snr, 0.5) / snr),
    ("p2", {}, lambda snr: 1 / (1 + snr)),
    ("p2", {"k": 3.0, "power": 0.5}, lambda snr: 1 / math.sqrt(3 + snr)),
    ("edm", {}, karras(1.0)),
    ("edm", {"sigma_data": 0.5}, karras(0.5)),
    ("edm", {"limit": 4.0}, lambda snr: min(1 + snr, 4) / snr),  # on x: min(1 + SNR, limit)
    ("sigmoid", {}, lambda snr: 1 / (1 + math.exp(math.log(snr) - 2))),
    ("sigmoid", {"bias": -1.5}, lambda snr: 1 / (1 + math.exp(math.log(snr) + 1.5))),
]


def test_every_weight_is_tested():
    assert {name for name, *_ in ROWS} | {"bound"} == set(WEIGHTS)
    assert {name: row.name for name, row in WEIGHTS.items()} == {name: name for name in WEIGHTS}
    assert [name for name, row in WEIGHTS.items() if row.needs_next_level] == ["bound"]


@pytest.mark.parametrize(("name", "settings", "formula"), ROWS)
@pytest.mark.parametrize("schedule", [S.Flow(), S.LinearLogSNR(20.0, -20.0), S.VarianceExploding(1e-4, 1e4)])
def test_weights_are_the_papers(name, settings, formula, schedule):
    level = schedule(schedule.inverse(torch.log(torch.tensor(SNR, dtype=F64))))
    w = build(name, **settings)(level)
    assert w.dtype == F64
    assert w.tolist() == pytest.approx([formula(snr) for snr in SNR], rel=1e-9)
    assert build(name, **settings)(level.take(0)).shape == ()


def test_weights_in_the_frames_of_the_papers():
    level = S.LinearLogSNR()(torch.linspace(0, 1, 9))
    snr = torch.exp(level.log_snr)
    for weight, frame, expected in (
        (build("truncated_snr"), target("x"), snr.clamp(min=1)),
        (build("min_snr"), target("x"), snr.clamp(max=5)),
        (build("simple"), target("x"), snr),
        (build("edm"), target("v"), torch.ones_like(snr)),
        (build("edm"), target("edm"), torch.ones_like(snr)),
        (build("edm", sigma_data=0.25), target("edm", sigma_data=0.25), torch.ones_like(snr)),
        (build("simple"), target("score"), level.sigma**2),  # S5: ‖s − ŝ‖² has 1/sigma² times the eps weight
    ):
        torch.testing.assert_close(frame.weight(weight(level), level), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_bound_is_ho_equation_12(name):
    T = 20
    schedule = S.build(name, T=T)
    beta, alpha_bar = ([float(v) for v in column] for column in table(name, T))
    k = torch.arange(1, T + 1, dtype=F64)
    t, s = schedule(k / T), schedule((k - 1) / T)
    small = [b * (1 - alpha_bar[i]) / (1 - alpha_bar[i + 1]) for i, b in enumerate(beta)]
    small[0] = small[1]  # final_log_var
    for weight, variance in (
        (build("bound"), small),
        (build("bound", variance="small"), small),
        (build("bound", variance="large"), beta),
        (build("bound", variance=lambda t, s: torch.full_like(t.t, math.log(0.5))), [0.5] * T),
    ):
        rows = zip(beta, alpha_bar[1:], variance, strict=True)
        expected = [b**2 / (2 * v * (1 - b) * (1 - now)) for b, now, v in rows]  # T3
        assert weight(t, s).tolist() == pytest.approx(expected, rel=1e-10)
        assert weight(t.take(3), s.take(3)).item() == pytest.approx(expected[3], rel=1e-10)
        assert weight(t, s).dtype == F64


@given(st.floats(0.02, 1), st.floats(0.01, 0.99))
def test_bound_with_the_small_variance_is_a_difference_of_snr(at, ratio):
    for schedule in (S.LinearLogSNR(), S.VarianceExploding(), S.Sigmoid()):
        t, s = schedule(at), schedule(at * ratio)
        expected = 0.5 * math.expm1(float(s.log_snr - t.log_snr))
        assert build("bound")(t, s).item() == pytest.approx(expected, rel=1e-9)


def test_weight_of_previous_in_terms_of_the_one_step_noise():
    # T6: weight β/(1−β) on the one-step noise √(β/(1−ᾱ)) eps, converted to the frame of the posterior mean
    schedule = DS.linear(10)
    beta, alpha_bar = ([float(v) for v in column] for column in table("linear", 10))
    t, s = schedule(0.6), schedule(0.5)
    one_step = beta[5] / (1 - beta[5]) * beta[5] / (1 - alpha_bar[6])
    for name in ("posterior", "previous"):
        w_y = TARGETS[name].weight(torch.tensor(one_step, dtype=F64), t, s)
        assert w_y.item() == pytest.approx(1, rel=1e-11)


def test_a_weight_between_two_levels_needs_both():
    with pytest.raises(ConfigError) as error:
        build("bound")(S.Flow()(0.5))
    assert str(error.value) == (
        "error[WEIGHT] bound: this weight is defined between two levels, and only one was given. "
        "Pass s, the level that the step ends at."
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nope", {}, "error[WEIGHT] 'nope': no such weight. Use one of simple, bound, truncated_snr, min_snr, p2, edm"),
        ("simple", {"k": 1.0}, "error[WEIGHT] weight 'simple': no setting 'k'. It has none."),
        ("p2", {"k": 1.0, "t": 1.0}, "error[WEIGHT] weight 'p2': no setting 't'. It has k, power."),
        ("bound", {"s": 1.0}, "error[WEIGHT] weight 'bound': no setting 's'. It has variance."),
        ("bound", {"shift": 1.0}, "error[WEIGHT] weight 'bound': no setting 'shift'. It has variance."),
    ],
)
def test_invalid_names_and_settings(name, settings, message):
    with pytest.raises(ConfigError) as error:
        build(name, **settings)
    assert str(error.value).startswith(message)

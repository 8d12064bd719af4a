import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import diffuse
from undiffuse.process.target import TARGETS, build

F64 = torch.float64
# one step of Ho's chain: alpha_bar is 0.36 at t and 0.81 at s
ALPHA, SIGMA, ALPHA_S, SIGMA_S = 0.6, 0.8, 0.9, math.sqrt(0.19)
BETA = 1 - 0.36 / 0.81
STEP = DS.Tabulated([0.19, BETA])
T, SS = STEP(1.0), STEP(0.5)
X, EPS, Z = 0.7, -1.3, 0.4
X_T = ALPHA * X + SIGMA * EPS


def edm(sigma_data):
    """F = (x − c_skip X)/c_out of Karras22 table 1 for X = x_t/alpha, of noise sigma/alpha."""
    noise = SIGMA / ALPHA
    skip = sigma_data**2 / (noise**2 + sigma_data**2)
    out = noise * sigma_data / math.sqrt(noise**2 + sigma_data**2)
    return (X - skip * X_T / ALPHA) / out


POSTERIOR = (math.sqrt(1 - BETA) * 0.19 * X_T + ALPHA_S * BETA * X) / 0.64  # Ho20 eq. 7
EXPECTED = {  # y of each target
    "x": X,
    "eps": EPS,
    "v": ALPHA * EPS - SIGMA * X,  # Salimans22
    "score": -(X_T - ALPHA * X) / SIGMA**2,  # S1
    "flow": EPS - X,
    "edm": edm(1.0),
    "posterior": POSTERIOR,
    "previous": POSTERIOR + math.sqrt(BETA * 0.19 / 0.64) * Z,  # x_{t−1}, R3
}


def test_every_target_is_tested():
    assert set(EXPECTED) == set(TARGETS)
    assert {name: row.name for name, row in TARGETS.items()} == {name: name for name in TARGETS}
    assert [name for name, row in TARGETS.items() if row.needs_next_level] == ["posterior", "previous"]


def column(value):
    return torch.full((1, 2), value, dtype=F64)


@pytest.mark.parametrize("name", TARGETS)
def test_combine_is_the_papers_definition(name):
    y = TARGETS[name].combine(column(X), column(EPS), T, SS, column(Z))
    torch.testing.assert_close(y, column(EXPECTED[name]), rtol=1e-12, atol=0)


def test_edm_uses_sigma_data():
    for sigma_data in (0.5, 2.0):
        target = build("edm", sigma_data=sigma_data)
        y = target.combine(column(X), column(EPS), T)
        torch.testing.assert_close(y, column(edm(sigma_data)), rtol=1e-12, atol=0)
        x, eps = target.solve(y, column(X_T), T)
        torch.testing.assert_close(x, column(X))
        torch.testing.assert_close(eps, column(EPS))
    assert inspect.signature(TARGETS["edm"].rule).parameters["sigma_data"].default == 1.0


@given(schedules, st.sampled_from(sorted(TARGETS)), st.floats(0.05, 0.95), st.floats(0, 0.9), st.floats(-3, 3))
def test_solve_inverts_combine(schedule, name, at, ratio, value):
    t, s = schedule(at), schedule(at * ratio)
    target = TARGETS[name]
    a, b, _ = (float(v) for v in target.frame(t, s))
    alpha, sigma = float(t.alpha), float(t.sigma)
    determinant = float(target.determinant(t, s))
    assert determinant == pytest.approx(alpha * b - sigma * a, rel=1e-12)
    # the error of the 2×2 solve is that of its terms divided by the determinant
    terms = (abs(a) + abs(b) + 1) * (alpha + sigma) * (abs(a) + abs(b) + alpha + sigma)
    if not terms < 1e6 * abs(determinant):
        return
    size = terms / abs(determinant)
    x, eps = torch.tensor([[value, 0.3]], dtype=F64), torch.tensor([[-0.8, value]], dtype=F64)
    x_hat, eps_hat = target.solve(target.combine(x, eps, t, s), diffuse(x, t, eps), t, s)
    torch.testing.assert_close(x_hat, x, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-13 * size)


@pytest.mark.parametrize("name", TARGETS)
def test_the_converted_weight_gives_the_same_loss(name):
    eps_hat = column(0.25)
    x_hat = (column(X_T) - SIGMA * eps_hat) / ALPHA
    target, w = TARGETS[name], torch.tensor(3.0, dtype=F64)
    y, y_hat = target.combine(column(X), column(EPS), T, SS), target.combine(x_hat, eps_hat, T, SS)
    weight = target.weight(w, T, SS)
    torch.testing.assert_close(weight * (y - y_hat) ** 2, 3 * (column(EPS) - eps_hat) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_frames_have_the_shape_of_the_level_and_targets_the_dtype_of_x(name):
    t, s = DS.cosine(10)(torch.tensor([0.3, 0.9])), DS.cosine(10)(torch.tensor([0.2, 0.8]))
    assert [v.shape for v in TARGETS[name].frame(t, s)] == [(2,)] * 3
    assert {v.dtype for v in TARGETS[name].frame(t, s)} == {F64}
    x = torch.randn(2, 3, 4, 4)
    y = TARGETS[name].combine(x, x, t, s, x)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    for i in range(2):
        alone = TARGETS[name].combine(x[i : i + 1], x[i : i + 1], t.take(i), s.take(i), x[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], alone)
        for ours, theirs in zip(
            TARGETS[name].solve(y, x, t, s),
            TARGETS[name].solve(alone, x[i : i + 1], t.take(i), s.take(i)),
            strict=True,
        ):
            torch.testing.assert_close(ours[i : i + 1], theirs)


SOLVABLE_FROM_PURE_NOISE = {"x", "v", "flow", "edm", "posterior", "previous"}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_cannot_be_solved_are_refused_at_zero_terminal_snr(name):
    schedule = DS.Tabulated([0.1, 0.5, 1.0])
    grid = torch.arange(1, 4, dtype=F64) / 3
    levels, s = schedule(grid), schedule(grid - 1 / 3)
    if name in SOLVABLE_FROM_PURE_NOISE:
        TARGETS[name].check(levels, s)
        x, eps = torch.randn(2, 3, 5, dtype=F64)
        x_hat, eps_hat = TARGETS[name].solve(
            TARGETS[name].combine(x, eps, levels, s), diffuse(x, levels, eps), levels, s
        )
        torch.testing.assert_close(x_hat, x)
        torch.testing.assert_close(eps_hat, eps)
        return
    with pytest.raises(ConfigError) as error:
        TARGETS[name].check(levels, s)
    assert str(error.value) == (
        f"error[TARGET] target {name!r}: the schedule ends at zero signal (zero-terminal SNR), where x cannot be "
        "recovered from it. Use the target 'v' or 'x', or a schedule that keeps some signal at t = 1."
    )
    TARGETS[name].check(levels.take(slice(0, 2)), s.take(slice(0, 2)))


def test_an_output_of_lower_precision_is_solved_in_that_of_x():
    level = S.LinearLogSNR()(torch.tensor([0.3], dtype=torch.float64))
    y, x_t = torch.tensor([[0.7]]), torch.tensor([[-1.1]], dtype=torch.float64)
    for got, exact in zip(TARGETS["v"].solve(y, x_t, level), TARGETS["v"].solve(y.double(), x_t, level), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=0)


def test_check_names_the_noisiest_time_that_cannot_be_solved():
    levels = DS.linear(4)(torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(
        ConfigError, match=r"^error\[TARGET\] target 'score': x cannot be recovered from it at t = 0\. Use"
    ):
        TARGETS["score"].check(levels)
    with pytest.raises(ConfigError, match=r"x cannot be recovered from it at t = 0\.5"):
        TARGETS["score"].check(levels._replace(sigma=torch.tensor([0.0, 0.0, 0.5], dtype=F64)))
    TARGETS["eps"].check(levels)
    with pytest.raises(ConfigError, match=r"at t = 0\.25"):
        TARGETS["score"].check(S.Flow()(0.25)._replace(sigma=torch.zeros((), dtype=F64)))


@pytest.mark.parametrize("name", ["posterior", "previous"])
def test_targets_between_two_levels_need_both(name):
    with pytest.raises(ConfigError) as error:
        TARGETS[name].frame(T)
    assert str(error.value) == (
        f"error[TARGET] {name}: this target is defined between two levels, and only one was given. "
        "Pass s, the level that the step ends at."
    )


def test_build():
    assert build("v") == TARGETS["v"]
    assert build("edm", sigma_data=0.5).settings == (("sigma_data", 0.5),)
    for name, settings, message in (
        (
            "nope",
            {},
            "error[TARGET] 'nope': no such target. Use one of x, eps, v, score, flow, edm, posterior, previous.",
        ),
        (
            "v",
            {"sigma_data": 1.0},
            "error[TARGET] target 'v': no such setting: sigma_data. Only 'edm' has one, sigma_data.",
        ),
        (
            "edm",
            {"a": 1.0, "b": 2.0},
            "error[TARGET] target 'edm': no such setting: a, b. Only 'edm' has one, sigma_data.",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            build(name, **settings)
        assert str(error.value) == message

"""A network as a denoiser."""

import math

import pytest
import torch
from oracles import GaussianData, Spy
from torch import nn

from undiffuse.denoising.denoiser import (
    INPUT_SCALES,
    TIME_INPUTS,
    Clipped,
    ConditionedDenoiser,
    NetworkDenoiser,
    Preconditioning,
    Prediction,
    in_float32,
)
from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.gaussian import diffuse

f64 = torch.float64
DATA = GaussianData(torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.04], [2.0]]))
PLAIN = Preconditioning("none", "t")


class Says(nn.Module):
    """A network that returns ``rule(x, time)`` and records its arguments."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.told = rule, []

    def forward(self, x, time, cond=None):
        self.told.append((x, time, cond))
        return self.rule(x, time)


def batch(level, items=3):
    x, eps = (torch.randn(items, 2, 1, generator=torch.Generator().manual_seed(k), dtype=f64) for k in (1, 2))
    return x, eps, diffuse(x, level, eps)


# --- targets -------------------------------------------------------------------------------------------------------

FRAMES = {  # the output of the network, from (x, eps) at (alpha, sigma); by hand
    "x": lambda x, e, a, s: x,
    "eps": lambda x, e, a, s: e,
    "v": lambda x, e, a, s: a * e - s * x,
    "score": lambda x, e, a, s: -e / s,
    "flow": lambda x, e, a, s: e - x,
    # Karras 2022 table 1, σ = sigma/alpha, sigma_data = 1: F = (x − c_skip x_t)/c_out, c_skip = 1/(1 + σ²)
    "edm": lambda x, e, a, s: (x - (x + s / a * e) / (1 + (s / a) ** 2)) / (s / a / (1 + (s / a) ** 2) ** 0.5),
}


@pytest.mark.parametrize("schedule", [DS.linear(10), S.Flow(), S.VarianceExploding()])
@pytest.mark.parametrize("name", FRAMES)
def test_each_target_is_decoded(name, schedule):
    for level in (schedule(torch.tensor(0.7, dtype=f64)), schedule(torch.tensor([0.2, 0.4, 0.9], dtype=f64))):
        x, eps, x_t = batch(level)
        at = level.broadcast_like(x)
        y = FRAMES[name](x, eps, at.alpha, at.sigma)
        said = Says(lambda *_, y=y: y)
        prediction = NetworkDenoiser(said, schedule, targets.build(name), PLAIN)(x_t, level)
        torch.testing.assert_close(prediction.x, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(prediction.eps, eps, rtol=1e-8, atol=1e-8)
        assert prediction.var_interp is None
        assert len(said.told) == 1


@pytest.mark.parametrize("name", ["posterior", "previous"])
@pytest.mark.parametrize("T", [1, 25, 50, 100])
def test_targets_of_two_levels_use_the_next_step_of_the_table(name, T):
    schedule = DS.linear_rescaled(max(T, 20)) if T > 1 else DS.Tabulated([0.3])
    T = schedule.chain_length
    denoise = NetworkDenoiser(Says(lambda x, time: x), schedule, targets.build(name), PLAIN)
    k = torch.arange(1, T + 1, dtype=f64)
    aim = denoise.next_level(schedule(k / T))
    torch.testing.assert_close(aim.t, (k - 1) / T, rtol=0, atol=1e-15)
    assert torch.equal(aim.alpha, schedule((k - 1) / T).alpha)
    between = denoise.next_level(schedule((k - 0.25) / T))  # between two levels: one step below, as in training
    torch.testing.assert_close(between.t, ((k - 1.25) / T).clamp(min=0), rtol=0, atol=1e-15)
    assert denoise.next_level(schedule(torch.tensor(0.0))).t == 0

    t, s = schedule(k / T), schedule((k - 1) / T)
    beta = schedule.beta
    bar, before = t.alpha**2, s.alpha**2
    x, eps, x_t = batch(t, T)
    # Ho 2020 eq. 7
    keep, add = torch.sqrt(1 - beta) * (1 - before) / (1 - bar), torch.sqrt(before) * beta / (1 - bar)
    y = keep[:, None, None] * x_t + add[:, None, None] * x
    decoded = NetworkDenoiser(Says(lambda *_: y), schedule, targets.build(name), PLAIN)(x_t, t)
    torch.testing.assert_close(decoded.x, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded.eps, eps, rtol=1e-6, atol=1e-6)


def test_targets_of_two_levels_need_a_table():
    with pytest.raises(ConfigError, match="function of time") as error:
        NetworkDenoiser(Says(None), S.Flow(), targets.build("previous"), PLAIN)
    assert (error.value.code, error.value.where) == ("TARGET", "target 'previous'")
    assert NetworkDenoiser(Says(None), S.Flow(), targets.build("v"), PLAIN).next_level(S.Flow()(0.5)) is None


def test_in_float32_leaves_its_argument_as_it_is():
    denoise = NetworkDenoiser(Says(None), S.Flow(), targets.build("v"), PLAIN, autocast=torch.bfloat16)
    assert in_float32(denoise).autocast is None
    assert denoise.autocast == torch.bfloat16


# --- preconditioning -----------------------------------------------------------------------------------------------


def test_preconditioning_by_formula():
    ve = S.VarianceExploding(0.002, 80.0)
    level = ve(torch.tensor([0.1, 0.5, 1.0], dtype=f64))
    sigma = level.sigma
    karras = Preconditioning("unit", "log_sigma", sigma_data=0.5)
    torch.testing.assert_close(karras.input_scale(level), 1 / torch.sqrt(sigma**2 + 0.25), rtol=1e-12, atol=0)
    torch.testing.assert_close(karras.time_input(level), torch.log(sigma) / 4, rtol=1e-12, atol=1e-12)
    vp = S.LinearLogSNR()(torch.tensor([0.0, 0.25, 1.0], dtype=f64))
    expected = 1 / torch.sqrt(4 * vp.alpha**2 + vp.sigma**2)
    torch.testing.assert_close(Preconditioning("unit", sigma_data=2.0).input_scale(vp), expected)
    assert torch.equal(Preconditioning("none").input_scale(vp), torch.ones(3, dtype=f64))
    assert torch.equal(Preconditioning(time="t").time_input(vp), vp.t)
    assert torch.equal(Preconditioning(time="thousand").time_input(vp), 1000 * vp.t)
    assert torch.equal(Preconditioning(time="log_snr").time_input(vp), vp.log_snr)
    for T in (1, 7, 50, 1000):
        k = torch.arange(1, T + 1, dtype=f64)
        told = Preconditioning(time="step", chain_length=T).time_input(DS.cosine(T)(k / T))
        torch.testing.assert_close(told, k - 1, rtol=0, atol=1e-12)
        assert torch.equal(told.float(), (k - 1).float())
        rescaled = Preconditioning(time="rescaled_step", chain_length=T).time_input(DS.cosine(T)(k / T))
        torch.testing.assert_close(rescaled, (k - 1) * 1000 / T, rtol=0, atol=1e-11)
    assert Preconditioning() == Preconditioning("none", "log_snr", 1.0, 1000)


@pytest.mark.parametrize(
    ("time", "clean", "noise"), [("log_snr", 30, -30), ("log_sigma", -8, 8), ("t", 0, 1), ("thousand", 0, 1000)]
)
def test_time_is_finite_at_both_ends(time, clean, noise):
    ends = S.Flow()(torch.tensor([0.0, 1.0], dtype=f64))
    assert Preconditioning(time=time).time_input(ends).tolist() == [clean, noise]
    assert set(TIME_INPUTS) == {"t", "thousand", "step", "rescaled_step", "log_snr", "log_sigma"}
    assert set(INPUT_SCALES) == {"none", "unit"}


@pytest.mark.parametrize(("field", "known"), [("scale", "none, unit"), ("time", "t, thousand, step")])
def test_preconditioning_that_does_not_exist(field, known):
    with pytest.raises(ConfigError, match=known) as error:
        Preconditioning(**{field: "magic"})
    assert (error.value.code, error.value.where) == ("PRECONDITIONING", f"{field} = 'magic'")


# --- the inputs of the network and their precision -------------------------------------------------------------------


def test_the_network_gets_scaled_input_time_and_condition():
    schedule = S.LinearLogSNR()
    level = schedule(torch.tensor([0.2, 0.5, 0.8], dtype=f64))
    _, _, x_t = batch(level)
    network, cond = Says(lambda x, time: x), Condition(label=torch.arange(3))
    denoise = NetworkDenoiser(network, schedule, targets.build("v"), Preconditioning("unit", "log_snr", 0.5))
    denoise(x_t.float(), level, cond)
    x, time, told = network.told[0]
    assert told is cond
    assert (x.dtype, time.dtype, time.shape) == (torch.float32, torch.float32, (3,))
    at = level.broadcast_like(x_t)
    torch.testing.assert_close(x, (x_t / torch.sqrt(0.25 * at.alpha**2 + at.sigma**2)).float())
    torch.testing.assert_close(time, level.log_snr.float())
    denoise(x_t, level.take(1))
    x, time, told = network.told[1]
    assert (x.dtype, time.dtype, told) == (f64, f64, None)
    assert torch.equal(time, level.log_snr[1].expand(3))
    y, var_interp, _ = denoise.outputs(x_t, level)
    assert var_interp is None
    torch.testing.assert_close(y, x_t / torch.sqrt(0.25 * at.alpha**2 + at.sigma**2))


def test_learned_variance_is_the_second_half_of_the_channels():
    schedule = DS.linear(10)
    level = schedule(torch.tensor(0.5, dtype=f64))
    x, eps, x_t = (v.repeat(1, 2, 1) for v in batch(level))
    v = torch.tensor([[-1.0, 1.0, 0.0, 0.5], [-3.0, 3.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]], dtype=f64)[..., None]
    said = Says(lambda *_: torch.cat([eps, v], 1))
    prediction = NetworkDenoiser(said, schedule, targets.build("eps"), PLAIN, learned_variance=True)(x_t, level)
    torch.testing.assert_close(prediction.x, x)
    assert torch.equal(prediction.eps, eps)
    assert prediction.var_interp[..., 0].tolist() == [[0, 1, 0.5, 0.75], [-1, 2, 0.5, 0.5], [1, 1, 0, 1]]


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_slope_is_the_last_part_of_the_channels(learned_variance):
    level = S.Flow()(torch.tensor(0.5, dtype=f64))
    x, eps, x_t = batch(level)
    slope, v = torch.full_like(x, 0.3), torch.full_like(x, -1.0)
    said = Says(lambda *_: torch.cat([eps, *([v] if learned_variance else []), slope], 1))
    denoise = NetworkDenoiser(said, S.Flow(), targets.build("eps"), PLAIN, learned_variance, divergence=True)
    prediction, found = denoise.predict_with_slope(x_t, level)
    torch.testing.assert_close(prediction.x, x)
    assert torch.equal(found, slope)
    assert (prediction.var_interp is None) is not learned_variance


def test_autocast_surrounds_the_network_only():
    schedule = S.LinearLogSNR()
    linear = nn.Linear(1, 1)
    seen = []

    def rule(x, time):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), linear(x).dtype))
        return linear(x)

    level = schedule(torch.tensor([0.0, 0.5, 1.0], dtype=f64))
    x_t = batch(level)[2].float()
    for autocast in (None, torch.bfloat16):
        denoise = NetworkDenoiser(Says(rule), schedule, targets.build("v"), PLAIN, autocast=autocast)
        prediction = denoise(x_t, level)
        assert prediction.x.dtype == prediction.eps.dtype == torch.float32
        assert denoise.outputs(x_t, level)[0].dtype == torch.float32
        at = level.broadcast_like(x_t)
        torch.testing.assert_close(at.alpha * prediction.x + at.sigma * prediction.eps, x_t, rtol=1e-6, atol=1e-6)
    inside = [(torch.float32, True, torch.bfloat16, torch.bfloat16)] * 2
    assert [row[:2] + row[3:] for row in seen[:2]] == [(torch.float32, False, torch.float32)] * 2
    assert seen[2:] == inside
    assert not torch.is_autocast_enabled("cpu")
    low = NetworkDenoiser(Says(lambda x, time: x), schedule, targets.build("v"), PLAIN)(x_t.bfloat16(), level)
    assert low.x.dtype == low.eps.dtype == torch.float32


# --- clipping ------------------------------------------------------------------------------------------------------


def test_clipped_predictions_stay_consistent():
    schedule = S.Flow()
    cond = Condition(label=torch.zeros(3, dtype=torch.long))
    calls = []

    class Inner:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, *told):
            calls.append(told)
            x = torch.tensor([[-3.0, 0.2], [0.7, 1.5], [-0.4, -0.6]], dtype=f64)[..., None]
            return Prediction(x, torch.full_like(x, 9.0), torch.full_like(x, 0.4))

    for level in (schedule(torch.tensor(0.4, dtype=f64)), schedule(torch.tensor([0.1, 0.5, 1.0], dtype=f64))):
        _, _, x_t = batch(level)
        clipped = Clipped(Inner(), -0.5, 1.25)
        prediction = clipped(x_t, level, cond, "to")
        assert calls[-1] == (x_t, level, cond, "to")
        assert prediction.x.flatten().tolist() == [-0.5, 0.2, 0.7, 1.25, -0.4, -0.5]
        at = level.broadcast_like(x_t)
        torch.testing.assert_close(at.alpha * prediction.x + at.sigma * prediction.eps, x_t)
        assert bool((prediction.var_interp == 0.4).all())
        assert clipped.schedule is schedule
        assert Clipped(Inner())(x_t, level).x.flatten().tolist() == [-1, 0.2, 0.7, 1, -0.4, -0.6]


def test_a_linear_network_can_be_the_exact_denoiser():
    """E[eps|x_t] of one Gaussian is linear in x_t; as the target v it is decoded again."""
    schedule = DS.cosine(10)
    level = schedule(torch.tensor(0.6, dtype=f64))
    _, _, x_t = batch(level)
    exact = DATA.predict(x_t, level)

    def rule(x, time):
        assert math.isclose(float(time[0]), 5.0)
        x_hat, eps, _ = DATA.predict(x, level)
        return level.alpha * eps - level.sigma * x_hat

    told = Preconditioning("none", "step", chain_length=10)
    result = NetworkDenoiser(Says(rule), schedule, targets.build("v"), told)(x_t, level)
    torch.testing.assert_close(result.x, exact.x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.eps, exact.eps, rtol=1e-10, atol=1e-12)


def test_conditioned_denoiser_replaces_the_condition():
    spy, level = Spy(DATA.denoiser(S.LinearLogSNR())), S.LinearLogSNR()(0.5)
    told = ConditionedDenoiser(spy, Condition(label=torch.tensor([1, 2, 3])))
    x_t = batch(level)[2]
    for cond in (None, Condition(label=torch.tensor([7, 7, 7]))):
        assert torch.equal(told(x_t, level, cond, level).x, spy.denoise(x_t, level).x)
        assert (spy.seen[-1][0] is x_t, spy.seen[-1][1:]) == (True, (level, told.cond, level))
    assert told.schedule is spy.schedule

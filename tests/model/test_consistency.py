"""Consistency training on Gaussian data, where f is linear and the bias of one-call samples is a product of factors."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from oracles import GaussianData, MixtureData

from undiffuse.denoising.denoiser import Prediction
from undiffuse.model.config import MAX_CALLS
from undiffuse.model.consistency import (
    MAX_RATIO,
    consistency_loss,
    few_call_sampler,
    level_after_gap,
    noisiest_level,
    teacher_step,
)
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.clean_end import clean_end
from undiffuse.process.gaussian import diffuse
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.runge_kutta import noise_to_signal

f64 = torch.float64
VARIANCE = 0.25
EXPLODING = S.VarianceExploding(0.002, 80.0)
DATA = GaussianData(torch.zeros(1), torch.tensor([VARIANCE]))


def ladder(gap, schedule=EXPLODING):
    """The levels from the noisiest to the cleanest, each the `level_after_gap` of the one before, shape (1,) each."""
    levels = [schedule(noisiest_level(schedule).t.reshape(1))]
    while float(levels[-1].t) > schedule.t_min:
        levels.append(level_after_gap(schedule, levels[-1], gap))
    return levels


def teacher_spread(n):
    """The spread of one-call samples with the teacher's steps over that of the data, by `teacher_step` and by hand."""
    x, by_hand, denoise = torch.ones(1, 1, dtype=f64), 1.0, DATA.denoiser(EXPLODING)
    for t, r in pairwise(ladder(1 / n)):
        x = teacher_step(denoise, x, t, r)
        high, low = float(t.sigma), float(r.sigma)  # dx/dsigma = x sigma/(c + sigma²)
        first = high / (VARIANCE + high**2)
        euler = 1 + (low - high) * first
        by_hand *= 1 + (low - high) / 2 * (first + euler * low / (VARIANCE + low**2))
    return float(x) * 80 / VARIANCE**0.5, by_hand * 80 / VARIANCE**0.5


def data_spread(n):
    """The same with pairs from the data: E[f(x_r, r) given x_t] is a fixed point with k_t = k_r (c + r t)/(c + t²)."""
    k = 1.0
    for t, r in reversed(list(pairwise(ladder(1 / n)))):
        k *= float((VARIANCE + r.sigma * t.sigma) / (VARIANCE + t.sigma**2))
    return k * 80 / VARIANCE**0.5


@pytest.mark.parametrize(("n", "bias"), [(2, 7.3e-2), (4, 1.2e-2), (8, 2.4e-3), (16, 5.3e-4), (64, 2.1e-5)])
def test_the_spread_of_one_call_with_the_teachers_steps(n, bias):
    spread, by_hand = teacher_spread(n)
    assert spread == pytest.approx(by_hand, rel=1e-10)
    assert 0 < spread - 1 < bias


@pytest.mark.parametrize(("n", "spread"), [(2, 0.841), (4, 0.931), (8, 0.967), (16, 0.984), (64, 0.996)])
def test_the_spread_of_one_call_with_pairs_from_the_data(n, spread):
    assert abs(data_spread(n) - spread) < 0.0006


def test_the_bias_is_of_second_order_with_the_teachers_steps_and_of_first_from_the_data():
    """Twice as many levels divide the difference to the exact flow between the same ends by 4 and by 2."""
    clean = float(EXPLODING(EXPLODING.t_min).sigma)
    flow = ((VARIANCE + clean**2) / (VARIANCE + 80**2)) ** 0.5 * 80 / VARIANCE**0.5
    for spread, ratio in ((lambda n: teacher_spread(n)[0], 4), (data_spread, 2)):
        for coarse, fine in pairwise(spread(n) - flow for n in (64, 128, 256, 512)):
            assert coarse / fine == pytest.approx(ratio, rel=0.03)


class Linear:
    """f(x_t, t) = k(t) x_t with the fixed point of a ladder of levels."""

    schedule = EXPLODING

    def __init__(self, levels, factors):
        self.at = torch.cat([level.t for level in levels])
        self.k = torch.tensor(factors, dtype=f64, requires_grad=True)

    def __call__(self, x_t, level, cond=None, next_level=None):
        nearest = (level.t[:, None] - self.at).abs().argmin(1)
        x = self.k[nearest][:, None] * x_t
        return Prediction(x, (x_t - x) / level.sigma[:, None])


def fixed_point(gap):
    """The ladder with the factors of its exact teacher."""
    levels, denoise = ladder(gap), DATA.denoiser(EXPLODING)
    factors = [1.0]
    for t, r in reversed(list(pairwise(levels))):
        factors.append(factors[-1] * float(teacher_step(denoise, torch.ones(1, 1, dtype=f64), t, r)))
    return levels, factors[::-1]


def test_the_loss_is_zero_at_the_fixed_point_and_its_gradient_points_to_it():
    levels, factors = fixed_point(0.25)
    t = EXPLODING(torch.cat([level.t for level in levels[:-1]]))
    r = level_after_gap(EXPLODING, t, 0.25)
    x_t = torch.linspace(-2, 2, len(levels) - 1, dtype=f64)[:, None] * t.sigma[:, None]
    x_r = teacher_step(DATA.denoiser(EXPLODING), x_t, t, r)
    loss = consistency_loss(Linear(levels, factors), x_t, t, x_r, r, 0.25).detach()
    assert float(loss.abs().max()) < 1e-9
    for change, sign in ((1.01, 1), (0.99, -1)):  # the factor at the noisiest level is too large, then too small
        wrong = Linear(levels, [change * factors[0], *factors[1:]])
        consistency_loss(wrong, x_t, t, x_r, r, 0.25).sum().backward()
        assert sign * float(wrong.k.grad[0]) > 0
        assert float(wrong.k.grad[1:].abs().max()) < 1e-9


def test_no_gradient_reaches_the_goal_and_the_cleanest_level_is_its_own_goal():
    levels, _ = fixed_point(0.25)
    constant = Linear(levels, [0.0] * len(levels))
    t = EXPLODING(levels[-2].t)
    r = level_after_gap(EXPLODING, t, 0.25)
    x_r = torch.full((1, 1), 0.3, dtype=f64)
    loss = consistency_loss(constant, torch.ones(1, 1, dtype=f64), t, x_r, r, 0.25)
    huber = (0.09 + 0.00054**2) ** 0.5 - 0.00054  # |0 − x_r/alpha_r| = 0.3
    expected = huber / (0.25 * float(noise_to_signal(t)))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_the_weight_has_a_limit_at_the_cleanest_level():
    """1/(u_t − u_r) where r is inside of the schedule; the same function of t where it is at the end."""
    schedule = S.LinearLogSNR()
    t = schedule(torch.tensor([0.5, 0.1, 1e-3, 1e-6, 1e-9], dtype=f64))
    r = level_after_gap(schedule, t, 0.25)
    x_t, x_r = torch.ones(2, 5, 1, dtype=f64)

    def denoise(x, level, cond=None, next_level=None):
        return Prediction(torch.zeros_like(x) if level is t else torch.ones_like(x), x)

    denoise.schedule = schedule
    weights = consistency_loss(denoise, x_t, t, x_r, r, 0.25) / consistency_loss(denoise, x_t, t, x_r, r, 0.5)
    torch.testing.assert_close(weights, torch.full_like(weights, 2.0))
    loss = consistency_loss(denoise, x_t, t, x_r, r, 0.25)
    inside = r.t > schedule.t_min
    assert inside.tolist() == [True, True, False, False, False]
    huber = (1 + 0.00054**2) ** 0.5 - 0.00054
    expected = huber / (noise_to_signal(t) - noise_to_signal(r))
    torch.testing.assert_close(loss[inside], expected[inside], rtol=1e-6, atol=0)
    assert float(loss.max()) < 1.01 * 4 * math.sqrt(float(schedule(0.0).log_snr.exp())) * huber


@pytest.mark.parametrize(
    "schedule",
    [S.LinearLogSNR(), S.Flow(), DS.cosine(1000), DS.linear(), EXPLODING],
    ids=["linear_log_snr", "flow", "cosine", "linear", "exploding"],
)
def test_levels_of_every_schedule(schedule):
    top = noisiest_level(schedule)
    assert float(noise_to_signal(top)) <= MAX_RATIO * (1 + 1e-9)
    t = schedule(top.t * torch.linspace(0.2, 1, 9, dtype=f64))
    r = level_after_gap(schedule, t, 1 / 16)
    inside = r.t > schedule.t_min
    ratio = noise_to_signal(r) / noise_to_signal(t)
    assert inside.sum() >= 7
    torch.testing.assert_close(ratio[inside], torch.full_like(ratio[inside], 15 / 16), rtol=1e-6, atol=0)
    assert bool((r.t < t.t).all())
    assert bool(torch.isfinite(r.log_snr).all())


def test_the_teachers_step_is_of_second_order_on_a_mixture():
    """Halving the gap divides the error after one step by 8: 2^(order + 1)."""
    data = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.02], [0.03]]))
    schedule = S.LinearLogSNR()
    t = schedule(torch.tensor([0.45, 0.5, 0.55], dtype=f64))
    x_t = diffuse(torch.tensor([[-0.6], [0.1], [0.7]], dtype=f64), t, torch.ones(3, 1, dtype=f64))
    errors = []
    for gap in (1 / 16, 1 / 32, 1 / 64):
        r = level_after_gap(schedule, t, gap)
        exact = torch.cat([data.flow(x_t[i : i + 1], t.take(i), r.take(i)) for i in range(3)])
        errors.append(float((teacher_step(data.denoiser(schedule), x_t, t, r) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_the_calls_are_at_quantiles_of_the_ratio():
    """The first at the noisiest level, the others at quantiles of log(sigma/alpha) ~ N(log 0.8, 1.2²), then data."""
    schedule = S.LinearLogSNR()
    assert few_call_sampler(schedule, 1) == Sampler("consistency", 1, times=(1.0, 0.0))
    sampler = few_call_sampler(schedule, 4)
    ratios = [math.exp(-0.5 * float(schedule(t).log_snr)) for t in sampler.times[1:-1]]
    spread = 1.2 * 0.6744897501960817  # the third quartile of N(0, 1)
    assert ratios == pytest.approx([0.8 * math.exp(spread), 0.8, 0.8 * math.exp(-spread)])
    assert (sampler.num_steps, sampler.times[0], sampler.times[-1]) == (4, 1.0, 0.0)
    few = S.SCHEDULES["variance_exploding"](sigma_min=0.02, sigma_max=3.0)  # ends below the largest of many ratios
    for calls in (9, 16):
        times = few_call_sampler(few, calls).times
        assert all(later < time for time, later in pairwise(times)), times
        normal = NormalDist(math.log(0.8), 1.2)  # cut off at the first level
        shares = [normal.cdf(-0.5 * float(few(t).log_snr)) for t in times[:-1]]
        assert [share / shares[0] for share in shares] == pytest.approx([1 - i / calls for i in range(calls)])
    start = few_call_sampler(S.Flow(), 2).times[0]
    assert float(noise_to_signal(S.Flow()(start))) == pytest.approx(80)  # the paper's sigma_max


@pytest.mark.parametrize("num_values", [2, 3, 17])
def test_each_call_is_at_a_level_of_its_own_where_few_values_need_little_signal(num_values):
    """The schedule of data with two values starts at log-SNR 3.6, noisier than the last quantiles of many calls."""
    for schedule in (S.LinearLogSNR(clean_end(num_values)), S.SCHEDULES["variance_exploding"](0.3, 3.0)):
        for calls in range(1, MAX_CALLS + 1):
            *times, last = few_call_sampler(schedule, calls).times
            assert all(later < time for time, later in pairwise(times)), times
            assert last == 0 <= schedule.t_min < times[-1]
    schedule = S.LinearLogSNR(clean_end(2))
    normal, times = NormalDist(math.log(0.8), 1.2), few_call_sampler(schedule, 16).times
    shares = [normal.cdf(-0.5 * float(schedule(t).log_snr)) for t in (*times[1:-1], schedule.t_min)]
    low = normal.cdf(-clean_end(2) / 2)
    assert shares == pytest.approx([low + (1 - low) * (1 - i / 16) for i in range(1, 17)])


def test_the_loss_has_the_type_of_its_states_and_passes_the_condition():
    """At a clean end with alpha below 1 the goal is x_r/alpha_r, whatever the denoiser predicts there."""
    schedule, seen, cond = S.LinearLogSNR(high=1.0), [], object()

    def constant(x_t, level, cond=None, next_level=None):
        seen.append(cond)
        return Prediction(torch.zeros_like(x_t), x_t)

    constant.schedule = schedule
    t = schedule(torch.tensor([0.01], dtype=f64))
    r, x = level_after_gap(schedule, t, 0.25), torch.ones(1, 1)
    loss = consistency_loss(constant, x, t, x, r, 0.25, cond)
    assert seen == [cond, cond]
    assert loss.dtype == torch.float32
    goal = 1 / math.sqrt(1 / (1 + math.exp(-1)))  # x_r/alpha_r, alpha² = sigmoid(1)
    huber = math.sqrt(goal**2 + 0.00054**2) - 0.00054
    assert float(loss) == pytest.approx(huber / (0.25 * float(noise_to_signal(t))), rel=1e-5)

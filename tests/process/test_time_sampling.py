import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import time_sampling as times_module
from undiffuse.process.time_sampling import (
    HISTORY_LENGTH,
    TIME_DISTRIBUTIONS,
    LogitNormal,
    LogNormalSigma,
    LossAwareSteps,
    UniformSteps,
    UniformTime,
    build,
    loss_aware,
    low_discrepancy,
)

F64 = torch.float64


def truncated(schedule, mean, std):
    """The distribution function of a normal log(sigma/alpha) truncated to the schedule's range."""

    def cdf(t):
        low, now, high = (norm.cdf((-0.5 * float(schedule(v).log_snr) - mean) / std) for v in (schedule.t_min, t, 1.0))
        return (now - low) / (high - low)

    return cdf


DENSITIES = {  # name: the distribution, its support and its distribution function
    "uniform": (UniformTime(), (0, 1), lambda t: t),
    "uniform, cut": (UniformTime(0.25, 0.75), (0.25, 0.75), lambda t: 2 * t - 0.5),
    "logit_normal": (LogitNormal(), (0, 1), lambda t: norm.cdf(math.log(t / (1 - t)))),
    "logit_normal, shifted": (LogitNormal(-0.5, 2.0), (0, 1), lambda t: norm.cdf((math.log(t / (1 - t)) + 0.5) / 2)),
} | {
    f"log_normal_sigma, {name}": (
        LogNormalSigma(schedule, *settings),
        (schedule.t_min, 1),
        truncated(schedule, *(settings or (-1.2, 1.2))),
    )
    for name, schedule, settings in (
        ("Karras", S.VarianceExploding(0.002, 80.0), ()),
        ("narrow range", S.VarianceExploding(0.2, 0.9), (0.5, 0.75)),
        ("flow", S.Flow(), ()),
        ("table", DS.cosine(6), (0.0, 1.0)),
        ("preserving", S.LinearLogSNR(), (-0.5, 1.0)),
    )
}


def test_defaults_are_the_papers():
    assert (LogitNormal().mean, LogitNormal().std) == (0.0, 1.0)
    assert (UniformTime().low, UniformTime().high) == (0.0, 1.0)
    assert [p.default for p in inspect.signature(LogNormalSigma).parameters.values()][1:] == [-1.2, 1.2]


@pytest.mark.parametrize("name", DENSITIES)
def test_sample_is_the_quantile_function(name):
    times, (low, high), cdf = DENSITIES[name]
    u = torch.tensor([[0.0, 1e-6, 0.01, 0.1], [0.3, 0.5, 0.9, 0.999]], dtype=F64)
    t = times.sample(u)
    assert t.dtype == F64
    assert t.shape == u.shape
    assert bool((t.flatten()[1:] > t.flatten()[:-1]).all())
    assert bool(((t >= low) & (t <= high)).all())
    for u_i, t_i in zip(u.flatten().tolist()[1:], t.flatten().tolist()[1:], strict=True):
        assert cdf(t_i) == pytest.approx(u_i, rel=1e-9, abs=1e-12)
    assert times.sample(torch.tensor(0.5)).dtype == F64
    torch.testing.assert_close(times.sample(torch.tensor(0.5)), t[1, 1])


@pytest.mark.parametrize("name", DENSITIES)
def test_log_prob_is_the_derivative_of_the_distribution_function(name):
    times, (low, high), cdf = DENSITIES[name]
    t = low + (high - low) * torch.tensor([0.03, 0.27, 0.61, 0.98], dtype=F64)
    density = torch.exp(times.log_prob(t))
    assert density.dtype == F64
    for t_i, p in zip(t.tolist(), density.tolist(), strict=True):
        h = 1e-6
        assert p == pytest.approx((cdf(t_i + h) - cdf(t_i - h)) / (2 * h), rel=1e-6)
    outside = torch.tensor([low - 0.01, high + 0.01, -1.0, 2.0], dtype=F64)
    assert times.log_prob(outside).tolist() == [-math.inf] * 4
    assert times.log_prob(torch.tensor(0.5)).dtype == F64


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(name):
    times, (low, high), _ = DENSITIES[name]
    T = getattr(getattr(times, "schedule", None), "chain_length", None)
    points = [k / T for k in range(1, T)] if T else [0.26, 0.5, 0.74]
    # near 0 the density is steep, so that part of the integral is taken in log t
    middle = max(low, 0.01)
    f = lambda t: math.exp(times.log_prob(torch.tensor(t, dtype=F64)))  # noqa: E731
    total = quad(f, middle, high, points=[p for p in points if middle < p < high], epsabs=1e-9, limit=200)[0]
    if middle > low:
        total += quad(lambda v: f(math.exp(v)) * math.exp(v), math.log(max(low, 1e-9)), math.log(middle), epsabs=1e-9)[
            0
        ]
    assert total == pytest.approx(1, abs=1e-6)


def test_densities_at_the_ends_of_their_range():
    assert UniformTime(0.25, 0.75).log_prob(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([math.log(2)] * 2)
    assert LogitNormal().log_prob(torch.tensor([0.0, 1.0])).tolist() == [-math.inf] * 2
    flow = LogNormalSigma(S.Flow())
    assert flow.log_prob(torch.tensor([0.0, 1.0])).tolist() == [-math.inf] * 2
    assert math.isfinite(flow.log_prob(torch.tensor(1e-5, dtype=F64)))
    assert not LogNormalSigma(S.VarianceExploding()).log_prob(torch.tensor([0.0, 1.0])).isinf().any()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=F64)
    for times in (LogitNormal(), flow, LogNormalSigma(S.Sigmoid())):
        t = times.sample(ends)
        assert bool(t.isfinite().all())
        assert t[0] < t[1]
    # u = 0 counts as the smallest u above 0
    assert times_module._EDGE == 2.0**-53
    assert float(LogitNormal().sample(torch.tensor(0.0))) == pytest.approx(1 / (1 + math.exp(-norm.ppf(2.0**-53))))
    assert float(LogitNormal().sample(torch.tensor(1.0))) == pytest.approx(1 / (1 + math.exp(norm.ppf(2.0**-53))))
    far = LogNormalSigma(S.VarianceExploding(1e-9, 1e9), 0.0, 1.0)
    for u, edge in ((0.0, 2.0**-53), (1.0, 1 - 2.0**-53)):
        expected = (norm.ppf(edge) - math.log(1e-9)) / math.log(1e18)
        assert float(far.sample(torch.tensor(u))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("T", [1, 2, 3, 1000])
def test_steps_are_uniform_on_the_chain(T):
    u = (torch.arange(4 * T, dtype=F64) + 0.5) / (4 * T)
    k = (UniformSteps(T).sample(u) * T).round().long()
    assert torch.equal(torch.bincount(k, minlength=T + 1), torch.tensor([0] + [4] * T))
    assert UniformSteps(T).sample(torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=F64)).tolist() == [1 / T, 1, 1]
    grid = torch.arange(T + 2, dtype=F64) / T
    log_prob = UniformSteps(T).log_prob(grid)
    assert log_prob.tolist() == [-math.inf, *[-math.log(T)] * T, -math.inf]
    off = torch.tensor([0.5 / T, (1 + 2e-6) / T, (1 - 2e-6) / T], dtype=F64)
    assert UniformSteps(T).log_prob(off).tolist() == [-math.inf] * 3
    assert UniformSteps(T).log_prob(torch.tensor([(1 + 5e-7) / T], dtype=F64)).item() == -math.log(T)
    assert UniformSteps(T).log_prob(torch.tensor(1.0)).dtype == F64


# --- loss-aware steps ------------------------------------------------------------------------------------------------

MOMENTS = torch.tensor([9.0, 0.0, 1.0, 0.25, 4.0, 100.0, 1.0], dtype=F64)  # E[L²] of seven steps


def aware(moments=MOMENTS, fraction=0.001, T=None) -> LossAwareSteps:
    return LossAwareSteps(T or len(moments), fraction, moments[:, None].expand(-1, HISTORY_LENGTH).clone())


@pytest.mark.parametrize("fraction", [0.001, 0.2, 1.0])
def test_probabilities_follow_the_root_of_the_second_moment(fraction):
    root = torch.tensor([3.0, 0.0, 1.0, 0.5, 2.0, 10.0, 1.0], dtype=F64)
    expected = (1 - fraction) * root / 17.5 + fraction / 7
    times = aware(fraction=fraction)
    torch.testing.assert_close(times.probabilities(), expected)
    t = torch.arange(9, dtype=F64) / 7
    log_prob = times.log_prob(t)
    torch.testing.assert_close(log_prob[1:8], torch.log(expected))
    assert log_prob[[0, 8]].tolist() == [-math.inf] * 2
    off = torch.tensor([0.5 / 7, (1 + 2e-6) / 7, (1 + 5e-7) / 7], dtype=F64)
    assert torch.isfinite(times.log_prob(off)).tolist() == [False, False, True]
    torch.testing.assert_close(times.importance_weight(t[1:8]), 1 / (7 * expected))
    assert float(times.importance_weight(t[1:8]).max()) <= 1 / fraction + 1e-9
    mixed = LossAwareSteps(2, 1e-9, torch.tensor([range(10), [1.0] * 10], dtype=F64))  # the mean of the whole history
    assert float(mixed.probabilities()[0]) == pytest.approx(math.sqrt(4.5) / (1 + math.sqrt(4.5)), abs=1e-8)


def test_importance_weights_keep_the_mean_and_minimize_the_variance():
    """Sums over all steps: Σ p L/(T p) = mean L; E[(L/(T p))²] is at least (mean √M)², and mean M if p is uniform."""
    t, loss = torch.arange(1, 8, dtype=F64) / 7, torch.tensor([3.0, -0.1, 1.0, 0.5, 2.0, 10.0, 1.0], dtype=F64)
    steps = aware(loss**2, fraction=1e-12)
    for times in (steps, aware(), aware(fraction=0.3), aware(loss.abs())):
        p, weighted = times.probabilities(), loss * times.importance_weight(t)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        assert float((p * weighted).sum()) == pytest.approx(float(loss.mean()), abs=1e-9)
    second = {
        name: float((times.probabilities() * (loss * times.importance_weight(t)) ** 2).sum())
        for name, times in {"best": steps, "uniform": aware(fraction=1.0), "off": aware(loss.abs(), 1e-12)}.items()
    }
    assert second["best"] == pytest.approx(float(loss.abs().mean()) ** 2, rel=1e-9)
    assert second["uniform"] == pytest.approx(float((loss**2).mean()), rel=1e-9)
    assert second["best"] < second["off"] < second["uniform"]
    # the variances themselves: 57 times less on these losses
    variance = {name: value - float(loss.mean()) ** 2 for name, value in second.items()}
    assert variance["uniform"] / variance["best"] > 50


def test_loss_aware_sample_is_the_quantile_function():
    times = aware(fraction=0.2)
    p = times.probabilities()
    u = (torch.arange(700_000, dtype=F64) + 0.5) / 700_000
    k = (times.sample(u) * 7).round().long()
    counted = torch.bincount(k, minlength=8)
    assert counted[0] == 0
    assert float((counted[1:] / 700_000 - p).abs().max()) < 2e-6
    assert bool((k.diff() >= 0).all())
    edges = torch.tensor([[0.0, 1 - 2**-53, 1.0]], dtype=F64)
    assert times.sample(edges).tolist() == [[1 / 7, 1.0, 1.0]]
    never = LossAwareSteps(2, 1e-300, torch.tensor([[0.0] * HISTORY_LENGTH, [1.0] * HISTORY_LENGTH], dtype=F64))
    assert never.sample(torch.tensor([0.0, 0.5])).tolist()[1] == 1.0
    assert times.sample(torch.tensor(0.5)).dtype == F64


def test_loss_aware_steps_are_uniform_until_every_step_has_ten_losses():
    times = loss_aware(3)
    assert times.history.tolist() == [[-1.0] * 10] * 3
    t = torch.tensor([1, 2, 3], dtype=F64) / 3
    for n in range(HISTORY_LENGTH):
        torch.testing.assert_close(times.probabilities(), torch.full((3,), 1 / 3, dtype=F64))
        assert times.importance_weight(t).tolist() == pytest.approx([1.0] * 3)
        before = times
        times = times.update(t[: 3 if n < 9 else 2], torch.tensor([1.0, -2.0, 4.0])[: 3 if n < 9 else 2])
    assert before.history[:, 0].tolist() == [-1.0] * 3  # unchanged
    assert times.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    times = times.update(t[2:], torch.tensor([4.0]))
    torch.testing.assert_close(times.probabilities(), 0.999 * torch.tensor([1, 2, 4]).double() / 7 + 0.001 / 3)
    zero = loss_aware(2, uniform_fraction=0.5).update(torch.tensor([0.5, 1.0] * 10), torch.zeros(20))
    assert zero.probabilities().tolist() == [0.5, 0.5]  # without any loss to distinguish the steps


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-3, 3)), min_size=1, max_size=60), st.integers(1, 60))
def test_the_history_holds_the_last_ten_losses_of_each_stratum(updates, batch):
    """For any batches, as a list per stratum would: here of steps 1 and 2, 3 and 4, and 5."""
    times, lists = loss_aware(5, strata=3), [[-1.0] * HISTORY_LENGTH for _ in range(3)]
    for start in range(0, len(updates), batch):
        k, loss = zip(*updates[start : start + batch], strict=True)
        times = times.update(torch.tensor(k, dtype=F64) / 5, torch.tensor(loss, dtype=F64, requires_grad=True))
    for k, loss in updates:
        lists[(k - 1) // 2].append(loss**2)
    assert times.history.tolist() == [held[-HISTORY_LENGTH:] for held in lists]
    assert not times.history.requires_grad


def test_steps_of_a_stratum_are_equally_likely():
    times = aware(torch.tensor([1.0, 4.0, 9.0], dtype=F64), fraction=0.1, T=5)  # steps 1 and 2, 3 and 4, 5
    expected = 0.9 * torch.tensor([1.0, 1, 2, 2, 3], dtype=F64) / 9 + 0.02
    torch.testing.assert_close(times.probabilities(), expected)
    assert loss_aware(10_000).history.shape == (1000, 10)
    assert loss_aware(10_000).probabilities().shape == (10_000,)
    assert loss_aware(999).history.shape == (999, 10)
    single = loss_aware(10_000).update(torch.tensor([1e-4, 1e-3, 1.1e-3, 1.0], dtype=F64), torch.arange(1.0, 5.0))
    assert single.history[[0, 1, 999], -1].tolist() == [4.0, 9.0, 16.0]
    assert single.history[0, -2:].tolist() == [1.0, 4.0]
    assert loss_aware(10, uniform_fraction=1.0, strata=1).history.shape == (1, 10)
    for settings in ({"uniform_fraction": 0.0}, {"uniform_fraction": 1.1}, {"strata": 0}, {"strata": 2.5}):
        rule = "uniform_fraction must be above 0 and at most 1, strata a whole number from 1"
        with pytest.raises(ConfigError, match=f"times 'loss_aware', uniform_fraction = .*: {rule}"):
            loss_aware(10, **settings)


@given(st.integers(1, 50), st.floats(0, 0.999))
def test_low_discrepancy_has_one_number_per_interval(n, u):
    v = low_discrepancy(torch.tensor(u), n)
    assert v.dtype == F64
    assert bool(((v >= 0) & (v < 1)).all())
    expected = [(float(torch.tensor(u)) + i / n) % 1 for i in range(n)]
    assert v.tolist() == pytest.approx(expected, abs=1e-12)
    assert sorted((v * n).floor().int().tolist()) == list(range(n)) or bool(((v * n) % 1 > 1 - 1e-9).any())


def test_settings_that_are_no_distribution_are_refused():
    for name, settings in (
        ("uniform", {"low": 0.9, "high": 0.5}),
        ("uniform", {"low": -0.1}),
        ("logit_normal", {"std": 0.0}),
        ("log_normal_sigma", {"std": -1.0}),
        ("log_normal_sigma", {"std": math.inf}),
    ):
        with pytest.raises(ConfigError, match=r"error\[TIMES\] times"):
            build(name, S.Flow(), 10, **settings)
    one = build("uniform", S.Flow(), 1)  # the times of a chain of one step
    assert (float(one.sample(torch.tensor(0.3))), float(one.log_prob(torch.tensor([1.0])))) == (1.0, 0.0)


def test_build():
    schedule = DS.linear(10)
    assert build("steps", schedule, 10) == UniformSteps(10)
    made = build("loss_aware", schedule, 10, uniform_fraction=0.5, strata=2.0)
    assert (made.T, made.uniform_fraction, made.history.shape) == (10, 0.5, (2, 10))
    assert build("loss_aware", schedule, 10).uniform_fraction == 0.001
    assert build("uniform", schedule, 8) == UniformTime(0.125, 1.0)
    assert build("uniform", schedule, 8, low=0.5, high=0.75) == UniformTime(0.5, 0.75)
    assert build("logit_normal", schedule, 10, mean=1.0) == LogitNormal(1.0, 1.0)
    assert build("log_normal_sigma", schedule, 10, std=2.0) == LogNormalSigma(schedule, -1.2, 2.0)
    for name, settings, message in (
        ("nope", {}, f"'nope': no such distribution of times. Use one of {', '.join(TIME_DISTRIBUTIONS)}."),
        ("loss_aware", {"history": 1.0}, "times 'loss_aware': no such setting among history. See"),
        ("steps", {"a": 1.0, "b": 2.0}, "times 'steps': no such setting among a, b. See the documentation of"),
        ("uniform", {"mean": 1.0}, "times 'uniform': no such setting among mean. See"),
    ):
        with pytest.raises(ConfigError) as error:
            build(name, schedule, 10, **settings)
        assert str(error.value).startswith(f"error[TIMES] {message}")

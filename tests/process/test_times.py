import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.process import times as times_module
from undiffuse.process.times import LogitNormal, LogNormalSigma, Steps, Uniform, build, low_discrepancy

F64 = torch.float64


def truncated(schedule, mean, std):
    """The distribution function of a normal log(sigma/alpha) cut to the schedule's range."""

    def cdf(t):
        low, now, high = (norm.cdf((-0.5 * float(schedule(v).log_snr) - mean) / std) for v in (schedule.t_min, t, 1.0))
        return (now - low) / (high - low)

    return cdf


DENSITIES = {  # name: the density, its support and its distribution function; one row each
    "uniform": (Uniform(), (0, 1), lambda t: t),
    "uniform, cut": (Uniform(0.25, 0.75), (0.25, 0.75), lambda t: 2 * t - 0.5),
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
        ("table", S.cosine(6), (0.0, 1.0)),
        ("preserving", S.LinearLogSNR(), (-0.5, 1.0)),
    )
}


def test_defaults_are_the_papers():
    assert (LogitNormal().mean, LogitNormal().std) == (0.0, 1.0)
    assert (Uniform().low, Uniform().high) == (0.0, 1.0)
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
    steps = getattr(getattr(times, "schedule", None), "steps", None)
    points = [k / steps for k in range(1, steps)] if steps else [0.26, 0.5, 0.74]
    # near 0 the times of a fine schedule crowd, so the integral is taken in log t too
    middle = max(low, 0.01)
    f = lambda t: math.exp(times.log_prob(torch.tensor(t, dtype=F64)))  # noqa: E731
    total = quad(f, middle, high, points=[p for p in points if middle < p < high], epsabs=1e-9, limit=200)[0]
    if middle > low:
        total += quad(lambda v: f(math.exp(v)) * math.exp(v), math.log(max(low, 1e-9)), math.log(middle), epsabs=1e-9)[
            0
        ]
    assert total == pytest.approx(1, abs=1e-6)


def test_ends_of_the_range():
    assert Uniform(0.25, 0.75).log_prob(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([math.log(2)] * 2)
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
    # u = 0 is as far out as the least u that is not 0
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
    k = (Steps(T).sample(u) * T).round().long()
    assert torch.equal(torch.bincount(k, minlength=T + 1), torch.tensor([0] + [4] * T))
    assert Steps(T).sample(torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=F64)).tolist() == [1 / T, 1, 1]
    grid = torch.arange(T + 2, dtype=F64) / T
    log_prob = Steps(T).log_prob(grid)
    assert log_prob.tolist() == [-math.inf, *[-math.log(T)] * T, -math.inf]
    off = torch.tensor([0.5 / T, (1 + 2e-6) / T, (1 - 2e-6) / T], dtype=F64)
    assert Steps(T).log_prob(off).tolist() == [-math.inf] * 3
    assert Steps(T).log_prob(torch.tensor([(1 + 5e-7) / T], dtype=F64)).item() == -math.log(T)
    assert Steps(T).log_prob(torch.tensor(1.0)).dtype == F64


@given(st.integers(1, 50), st.floats(0, 0.999))
def test_low_discrepancy_covers(n, u):
    v = low_discrepancy(torch.tensor(u), n)
    assert v.dtype == F64
    assert bool(((v >= 0) & (v < 1)).all())
    expected = [(float(torch.tensor(u)) + i / n) % 1 for i in range(n)]
    assert v.tolist() == pytest.approx(expected, abs=1e-12)
    assert sorted((v * n).floor().int().tolist()) == list(range(n)) or bool(((v * n) % 1 > 1 - 1e-9).any())


def test_build():
    schedule = S.linear(10)
    assert build("steps", schedule, 10) == Steps(10)
    assert build("uniform", schedule, 8) == Uniform(0.125, 1.0)
    assert build("uniform", schedule, 8, low=0.5, high=0.75) == Uniform(0.5, 0.75)
    assert build("logit_normal", schedule, 10, mean=1.0) == LogitNormal(1.0, 1.0)
    assert build("log_normal_sigma", schedule, 10, std=2.0) == LogNormalSigma(schedule, -1.2, 2.0)
    for name, settings, message in (
        ("nope", {}, "'nope': no such density of times. Use steps, uniform, logit_normal or log_normal_sigma."),
        ("steps", {"a": 1.0, "b": 2.0}, "times 'steps': no such setting among a, b. See the documentation of"),
        ("uniform", {"mean": 1.0}, "times 'uniform': no such setting among mean. See"),
    ):
        with pytest.raises(ConfigError) as error:
            build(name, schedule, 10, **settings)
        assert str(error.value).startswith(f"error[TIMES] {message}")

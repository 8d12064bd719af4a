"""The bound in continuous time against closed forms, in expectation over eps and as an integral over log-SNR."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import MixtureData, Spy, gaussian_kl, gaussian_log_prob
from test_vlb import DATA, MEAN, VAR, Affine, X, analytic, feed, total

from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.likelihood.decoder import ValueSoftmax, clean_nll
from undiffuse.likelihood.nll import make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.likelihood.vlb_continuous import vlb_continuous
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import time_sampling as T
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.noise_level import stack
from undiffuse.process.schedule import finite_ends
from undiffuse.sampling.time_grids import time_grid

tensor = partial(torch.tensor, dtype=torch.float64)
HIGH, LOW = 6.0, -4.0


def learned():
    schedule = S.build("learned", high=HIGH, low=LOW, ends="fixed", width=6)
    with torch.no_grad():
        schedule.log_slopes.copy_(tensor([0.0, 1.5, -1.0, 0.5, -2.0, 1.0]))
    return schedule.requires_grad_(False)


SCHEDULES = {
    "linear log-SNR": S.LinearLogSNR(HIGH, LOW),
    "linear log-SNR, cut": S.LinearLogSNR(13.3, -5.0),
    "learned": learned(),
    "flow": S.Flow(),
    "sigmoid": S.Sigmoid(),
    "exploding": S.VarianceExploding(math.exp(-HIGH / 2), math.exp(-LOW / 2)),
}


def cut(schedule, high=HIGH, low=LOW):
    """(top, clean) of a schedule at two log-SNRs."""
    return schedule(schedule.inverse(low)), schedule(schedule.inverse(high))


class GaussLegendre:
    """A density of times with ``n`` equally likely points, those of Gauss-Legendre quadrature between two levels."""

    def __init__(self, top, clean, n):
        nodes, weights = np.polynomial.legendre.leggauss(n)
        half = 0.5 * float(top.t - clean.t)
        self.n, self.t, self.weights = n, float(clean.t) + half * tensor(nodes + 1), half * tensor(weights)

    def sample(self, u):
        return self.t[(u * self.n).floor().long()]

    def log_prob(self, t):
        nearest = (t[..., None] - self.t).abs().argmin(-1)
        return -torch.log(self.n * self.weights[nearest])


def exactly(denoise, x, top, clean, n=160, **settings):
    """The bound with the integral by n points of Gauss-Legendre in t and the exact expectation over eps."""
    settings = {"points": n, "times": GaussLegendre(top, clean, n), "u": torch.full((2 * len(x),), 0.5)} | settings
    u = settings.pop("u")
    sign = tensor([1.0, -1.0]).repeat_interleave(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    noise = lambda draws: sign.expand(draws, -1, *x.shape[1:])  # noqa: E731
    both = vlb_continuous(denoise, torch.cat([x, x]), top, clean, noise, u, **settings)
    parts = (
        v.reshape(2, len(x), *v.shape[1:]).mean(0)
        for v in (both.prior, both.diffusion_nats, both.decoder, both.per_step)
    )
    prior, steps, decoder, per_step = parts
    return make_nll(prior, steps, decoder, both.calls, per_step)


def error(x, log_snr):
    """E‖eps − ε̂‖² of the exact denoiser at each item, for log_snr of any shape; a function of the SNR only."""
    snr = torch.exp(log_snr).reshape(*log_snr.shape, *[1] * x.ndim)
    return ((snr * VAR / (1 + snr * VAR)) ** 2 + snr * ((x - MEAN) / (1 + snr * VAR)) ** 2).flatten(-2).sum(-1)


def integral(x, high, low):
    """½ ∫ error d log_snr = ½ Σ [log(1 + SNR v) + 1/(1 + SNR v) − (x − m)²/(v (1 + SNR v))] between the ends."""

    def at(log_snr):
        w = 1 + math.exp(log_snr) * VAR
        return total(torch.log(w) + 1 / w - (x - MEAN) ** 2 / (VAR * w))

    return 0.5 * (at(high) - at(low))


# --- the expectation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_is_its_integral_for_any_schedule_between_the_ends(name):
    schedule = SCHEDULES[name]
    top, clean = cut(schedule)
    result = exactly(DATA.denoiser(schedule), X, top, clean)
    times = GaussLegendre(top, clean, 160)
    rate, log_snr = schedule.log_snr_rate(times.t), schedule(times.t).log_snr
    expected = 0.5 * times.weights * -rate * error(X, log_snr).T
    torch.testing.assert_close(result.per_step, expected, rtol=1e-9, atol=1e-12)
    assert float((result.diffusion_nats - integral(X, HIGH, LOW)).abs().max()) < 6e-8
    assert float((result.diffusion_nats - result.per_step.sum(1)).abs().max()) < 1e-12
    decoder = total(0.5 * torch.log(2 * math.pi * math.e * torch.exp(tensor(-HIGH)) + 0 * X))
    torch.testing.assert_close(result.decoder, decoder, rtol=1e-10, atol=0)
    scale = 1.0 if name not in ("flow", "exploding") else float(top.sigma)
    prior = total(gaussian_kl(top.alpha * X, top.sigma**2 + 0 * X, 0 * X, scale**2 + 0 * X))
    torch.testing.assert_close(result.prior, prior, rtol=1e-9, atol=1e-12)
    assert result.calls == 160


def test_without_the_rate_of_log_snr_it_would_depend_on_the_schedule():
    """Half the error's mean over t times the range is right for a linear schedule, 9, 14 and 19 % off for others."""
    values = {}
    for name, schedule in SCHEDULES.items():
        times = GaussLegendre(*cut(schedule), 160)
        mean = 0.5 * (times.weights @ error(X, schedule(times.t).log_snr)) / times.weights.sum()
        values[name] = (HIGH - LOW) * mean / integral(X, HIGH, LOW)
    torch.testing.assert_close(values["linear log-SNR"], torch.ones(3, dtype=torch.float64), rtol=1e-8, atol=0)
    for name, wrong in {"learned": 0.9116, "flow": 0.8552, "sigmoid": 0.8063}.items():
        assert float(values[name][0]) == pytest.approx(wrong, abs=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_exact_marginal_as_prior_only_the_clean_end_costs(name):
    """KL(q(z_0|x) to q(z_0)) plus the decoder, for every x: the reverse process in continuous time is exact."""
    schedule = SCHEDULES[name]
    top, clean = cut(schedule)
    marginal = Gaussian((top.alpha * MEAN)[None], torch.log(DATA.marginal_var(top))[None])
    result = exactly(DATA.denoiser(schedule), X, top, clean, prior=marginal)
    path = gaussian_kl(clean.alpha * X, clean.sigma**2 + 0 * X, clean.alpha * MEAN, DATA.marginal_var(clean))
    torch.testing.assert_close(result.total - result.decoder, total(path), rtol=0, atol=6e-8)
    assert float(result.total[:2].mean() - DATA.entropy()) > 1e-3  # the mean over the data


MIXTURE = MixtureData(tensor([0.3, 0.5, 0.2]), tensor([[-1.5], [0.3], [1.2]]), tensor([[0.2], [0.05], [0.4]]))


@pytest.mark.parametrize("name", ["learned", "flow", "exploding"])
@pytest.mark.parametrize("x", [-2.0, -0.4, 0.3, 2.5])
def test_on_a_mixture(name, x):
    """∫ by Gauss-Legendre, E over eps by Gauss-Hermite, against the KLs of the two ends by another integral."""
    schedule = SCHEDULES[name]
    (top, clean), n = cut(schedule), 96
    nodes, weights = (tensor(v) for v in np.polynomial.hermite_e.hermegauss(120))
    weights = weights / weights.sum()
    items = torch.full((120, 1), x, dtype=torch.float64)
    times = GaussLegendre(top, clean, n)
    noise = lambda draws: nodes[:, None].expand(draws, -1, 1)  # noqa: E731
    u = torch.full((120,), 0.5)
    run = vlb_continuous(MIXTURE.denoiser(schedule), items, top, clean, noise, u, points=n, times=times)

    def kl(level):
        z = level.alpha * x + level.sigma * nodes[:, None]
        own = gaussian_log_prob(z, level.alpha * x, level.sigma**2)[:, 0]
        return weights @ (own - MIXTURE.log_density(z, level))

    assert float(weights @ run.diffusion_nats) == pytest.approx(float(kl(clean) - kl(top)), abs=1e-8)


@pytest.mark.parametrize("name", ["linear log-SNR", "learned", "flow", "sigmoid"])
def test_the_chain_bound_falls_to_it_as_steps_double(name):
    """Averaged over the data, the excess of T nested steps is positive and falls, finally as 1/T."""
    schedule = SCHEDULES[name]
    x = X[:2]  # quadratic in x, so the mean over ± one standard deviation is the mean over the data
    top, clean = cut(schedule)
    denoise = DATA.denoiser(schedule)
    limit = exactly(denoise, x, top, clean).diffusion_nats.mean()
    excess = []
    for steps in (32, 64, 128):
        times = (clean.t + (top.t - clean.t) * torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
        chain = ReverseChain(denoise, time_grid(schedule, times=times))
        excess.append(float(analytic(chain, x).diffusion_nats.mean() - limit))
    assert all(0 < later < before for before, later in pairwise(excess))
    assert 1.7 < excess[1] / excess[2] < 2.3


# --- the estimate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCHEDULES, "table"])
def test_points_are_quantiles_and_terms_by_hand(name):
    schedule = DS.cosine(50) if name == "table" else SCHEDULES[name]
    top, clean = cut(schedule)
    u, eps = tensor([0.0, 0.3, 0.999]), torch.randn(5, *X.shape, generator=torch.Generator().manual_seed(0)).double()
    spy = Spy(Affine())
    spy.denoise.schedule = schedule
    cond = Condition(label=torch.arange(3))
    result = vlb_continuous(spy, X, top, clean, feed(eps), u, points=4, cond=cond)
    for i, (x_t, level, call_cond, _) in enumerate(spy.seen):
        log_snr = HIGH + (LOW - HIGH) * (i + u) / 4
        torch.testing.assert_close(level.log_snr, log_snr, rtol=0, atol=1e-10)
        at = level.broadcast_like(X)
        torch.testing.assert_close(at.alpha * X + at.sigma * eps[i], x_t, rtol=1e-12, atol=0)
        term = 0.5 * (HIGH - LOW) / 4 * total((eps[i] - (0.6 * x_t - 0.2)) ** 2)
        torch.testing.assert_close(result.per_step[:, i], term, rtol=1e-12, atol=0)
        assert call_cond is cond
    assert len(spy.seen) == result.calls == 4
    assert result.per_step.shape == (3, 4)
    torch.testing.assert_close(result.decoder, total(clean_nll(X, clean, eps[4])), rtol=1e-14, atol=0)


def test_the_decoder_of_discrete_data_is_that_of_the_chain():
    schedule, transform = SCHEDULES["linear log-SNR"], IntegerLevels(101)
    x = transform.to_model(transform.to_data(X), torch.float64)
    decode = ValueSoftmax(transform)
    eps = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).double()
    top, clean = finite_ends(schedule)
    one = vlb_continuous(Affine(), x, top, clean, feed(eps), torch.zeros(3), points=1, decode=decode)
    chain = ReverseChain(Affine(), [top, clean])
    other = vlb(chain, x, feed(eps), edges=transform.edges(x), decode=decode)
    torch.testing.assert_close(one.decoder, other.decoder, rtol=1e-14, atol=0)
    torch.testing.assert_close(one.prior, other.prior, rtol=1e-14, atol=0)
    assert bool((one.decoder != vlb(chain, x, feed(eps)).decoder).all())


IMPORTANCE = {
    "uniform in t": T.UniformTime(),
    "logit normal": T.LogitNormal(0.3, 1.5),
    "normal in log-SNR": T.LogNormalSigma(SCHEDULES["flow"], 0.5, 2.0),
    "wider than the ends": T.UniformTime(0.01, 0.99),
}


@pytest.mark.parametrize("name", IMPORTANCE)
def test_any_density_of_times_gives_the_same_integral(name):
    """100 points for each of 64 offsets: the midpoint rule with 6400 intervals of the quantile function."""
    schedule = SCHEDULES["flow"]
    top, clean = cut(schedule)
    u = ((torch.arange(64, dtype=torch.float64) + 0.5) / 64).repeat(2)
    x = X[2:].expand(64, -1, -1)
    result = exactly(DATA.denoiser(schedule), x, top, clean, points=100, times=IMPORTANCE[name], u=u)
    assert float(result.diffusion_nats.mean()) == pytest.approx(float(integral(X[2:], HIGH, LOW)), rel=1e-3)
    outside = (result.per_step == 0).double().mean()
    assert bool(outside > 0.01)


def variance_of(steps):
    return float(steps.var(correction=0))


def test_the_estimate_is_unbiased_and_its_offsets_cut_the_variance():
    """Deterministic: the expectation over eps, at 2000 offsets. Eight points with one offset against eight offsets.

    The mean is the integral by the midpoint rule; the variance is below a tenth, and falls as 1/points².
    """
    schedule, n, m = SCHEDULES["linear log-SNR"], 2000, 8
    top, clean = finite_ends(schedule)
    x, u = X[2:].expand(n, -1, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n
    run = {
        points: exactly(DATA.denoiser(schedule), x, top, clean, points=points, times=None, u=u.repeat(2)).diffusion_nats
        for points in (1, m, 2 * m)
    }
    for steps in run.values():
        assert float(steps.mean()) == pytest.approx(float(integral(X[2:], HIGH, LOW)), rel=1e-5)
    alone = variance_of(run[1]) / m
    assert variance_of(run[m]) < 0.1 * alone
    assert variance_of(run[2 * m]) == pytest.approx(variance_of(run[m]) / 4, rel=0.1)


def test_random_numbers_estimate_the_bound():
    """|z| < 4.89: a false alarm for one seed in 1e6. The standard error is 0.4 % of the integral, so a wrong factor of
    ½, a missing rate (9 % and more, see above) or a biased offset would be over 20 standard errors off."""
    schedule, n = SCHEDULES["flow"], 4000
    top, clean = cut(schedule)
    g = torch.Generator().manual_seed(7)
    x, u = X[2:].expand(n, -1, -1), torch.rand(n, generator=g, dtype=torch.float64)
    noise = lambda draws: torch.randn(draws, n, 2, 3, generator=g, dtype=torch.float64)  # noqa: E731
    result = vlb_continuous(DATA.denoiser(schedule), x, top, clean, noise, u, points=4)
    exact = exactly(DATA.denoiser(schedule), X[2:], top, clean)
    off = (result.total.mean() - exact.total).item()
    assert abs(off) < 4.89 * float(result.stderr)
    assert float(result.stderr) < 0.005 * float(exact.diffusion_nats)
    steps_error = float(result.diffusion_nats.std()) / math.sqrt(n)
    assert abs(float(result.diffusion_nats.mean() - exact.diffusion_nats)) < 4.89 * steps_error


def test_an_item_does_not_depend_on_its_batch_and_the_network_gets_its_dtype():
    schedule = SCHEDULES["sigmoid"]
    top, clean = cut(schedule)
    u, eps = tensor([0.1, 0.5, 0.9]), torch.randn(7, *X.shape, generator=torch.Generator().manual_seed(3)).double()
    run = lambda items, x=X: vlb_continuous(  # noqa: E731
        DATA.denoiser(schedule), x[items], top, clean, feed(eps[:, items]), u[items], points=6
    )
    whole, part = run(slice(None)), run(slice(1, 3))
    for field in ("prior", "diffusion_nats", "decoder", "per_step"):
        torch.testing.assert_close(getattr(part, field), getattr(whole, field)[1:], rtol=1e-12, atol=0)
    spy = Spy(DATA.denoiser(schedule))
    single = vlb_continuous(spy, X.float(), top, clean, feed(eps.float()), u.float(), points=6)
    assert {x_t.dtype for x_t, *_ in spy.seen} == {torch.float32}
    for field in ("prior", "diffusion_nats", "decoder", "per_step", "stderr"):
        assert getattr(single, field).dtype == torch.float64
        torch.testing.assert_close(getattr(single, field), getattr(whole, field), rtol=1e-4, atol=1e-5)


# --- ends ----------------------------------------------------------------------------------------------------------


def test_ends_of_every_schedule_are_finite():
    for name, schedule in SCHEDULES.items() | {("table", DS.linear(100)), ("zero", DS.Tabulated([0.1, 0.5, 1.0]))}:
        top, clean = finite_ends(schedule)
        assert float(clean.t) == schedule.t_min
        assert torch.isfinite(stack([top, clean]).log_snr).all(), name
        if name == "flow":
            assert float(top.log_snr) == pytest.approx(-20.0, abs=1e-9)
        else:
            assert float(top.t) == pytest.approx(
                2 / 3 if name == "zero" else 1.0, abs=2e-2 if name == "sigmoid" else 1e-9
            )


def test_the_noisy_end_of_a_long_table_is_at_the_lowest_log_snr():
    """The linear table of 10,000 steps goes to log-SNR −101; uniform points on that would mostly be wasted."""
    schedule = DS.linear(10_000)
    top, clean = finite_ends(schedule)
    assert float(schedule(1.0).log_snr) < -100
    assert float(top.log_snr) == pytest.approx(-20.0, abs=0.01)
    assert 0.3 < float(top.t) < 0.6
    assert float(clean.t) == schedule.t_min


@pytest.mark.parametrize(
    ("top", "clean", "cause"),
    [
        (1.0, 0.1, "log_snr from -inf to 4.39445"),
        (0.9, 0.0, "log_snr from -4.39445 to inf"),
        (0.1, 0.9, "log_snr from 4.39445 to -4.39445"),
        (0.5, 0.5, "log_snr from 0 to 0"),
    ],
)
def test_ends_without_signal_or_noise_are_refused(top, clean, cause):
    flow = S.Flow()
    with pytest.raises(ConfigError) as caught:
        vlb_continuous(Affine(), X, flow(top), flow(clean), feed([]), torch.zeros(3))
    assert str(caught.value).startswith(f"error[BOUND_ENDS] {cause}: the integral goes from a finite log-SNR")


@pytest.mark.parametrize("times", [T.UniformSteps(10), T.UniformTime(0.2, 1.0), T.UniformTime(0.0, 0.8)])
def test_a_density_that_does_not_cover_the_range_is_refused(times):
    top, clean = cut(S.Flow())
    with pytest.raises(
        ConfigError, match=r"^error\[TIMES\] \w+\(.*\): this density of times is 0 in a part of \[0.047"
    ):
        vlb_continuous(Affine(), X, top, clean, feed([]), torch.zeros(3), times=times)


def test_a_density_on_exactly_the_range_is_accepted():
    top, clean = cut(S.Flow())
    exact_range = T.UniformTime(float(clean.t), float(top.t))
    noises = torch.randn(1, *X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)[: len(X)]
    assert bool(
        torch.isfinite(vlb_continuous(Affine(), X, top, clean, lambda n: noises, u, times=exact_range).total).all()
    )

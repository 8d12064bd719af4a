"""Guidance on labelled mixtures, whose conditional and unconditional denoisers and classifier have closed forms."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import GaussianData, LabelledMixture, Spy
from scipy.integrate import solve_ivp

from undiffuse.denoising.denoiser import ConditionedDenoiser, Prediction
from undiffuse.denoising.guidance import (
    Autoguided,
    ClassifierFree,
    ClassifierGuided,
    DynamicThreshold,
    Guide,
    extrapolate,
    same_process,
)
from undiffuse.errors import ConfigError
from undiffuse.likelihood.probability_flow import ode_nll
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.solvers import build as solver_called
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import rescale, trajectory

F64 = torch.float64
DATA = LabelledMixture(
    torch.tensor([0.3, 0.2, 0.4, 0.1]),
    torch.tensor([[-1.0, 0.5], [1.2, 0.3], [0.0, -1.0], [0.4, 1.5]]),
    torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.4, 0.1], [0.05, 0.2]]),
    torch.tensor([0, 1, 2, 0]),
)
SCHEDULES = {"log-SNR": S.LinearLogSNR(), "flow": S.Flow(), "exploding": S.VarianceExploding(), "linear": DS.linear()}
LABELS = Condition(label=torch.tensor([0, 2, 1, 0, 2]))
X_T = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def scores(level, scale, x_t=X_T, label=LABELS.label):
    """∇log q(x_t) + scale ∇log p(label|x_t), with the gradient as the difference of two scores."""
    free = DATA.score(x_t, level)
    return free + scale * (DATA.score(x_t, level, label) - free)


def score_of(prediction: Prediction, level: NoiseLevel, x_t=X_T):
    """−ε̂/sigma, after a check that x_t = alpha x̂ + sigma ε̂."""
    at = level.broadcast_like(x_t)
    torch.testing.assert_close(at.alpha * prediction.x + at.sigma * prediction.eps, x_t, rtol=1e-10, atol=1e-10)
    return -prediction.eps / at.sigma


def exact_log_prob(x_t, level, cond):
    """log p(label|x_t); 0 for the null label."""
    each = DATA.log_posterior(x_t, level).gather(1, cond.label.clamp(min=0)[:, None])[:, 0]
    return torch.where(cond.label < 0, 0.0, each)


def unconditional(schedule):
    return ConditionedDenoiser(DATA.denoiser(schedule), None)


@pytest.mark.parametrize(
    "t", [0.02, 0.5, torch.tensor([0.02, 0.1, 0.4, 0.7, 1.0], dtype=F64)], ids=["clean", "mid", "many"]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_guided_score_is_the_closed_form(name, t):
    schedule = SCHEDULES[name]
    level = schedule(t)
    for scale in (-1.0, 0.0, 0.5, 1.0, 4.0):
        wanted = scores(level, scale)
        for guided in (
            ClassifierFree(DATA.denoiser(schedule), scale),
            ClassifierGuided(unconditional(schedule), exact_log_prob, scale),
            ClassifierGuided(ClassifierFree(DATA.denoiser(schedule), scale - 1), exact_log_prob),
        ):
            assert guided.schedule is schedule
            found = score_of(guided(X_T, level, LABELS), level)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scale_1_of_the_exact_classifier_is_the_conditional_denoiser(name):
    schedule = SCHEDULES[name]
    level = schedule(torch.tensor([0.02, 0.1, 0.4, 0.7, 0.9], dtype=F64))
    conditional = DATA.denoiser(schedule)(X_T, level, LABELS)
    guided = ClassifierGuided(unconditional(schedule), exact_log_prob)(X_T, level, LABELS)
    torch.testing.assert_close(guided[:2], conditional[:2], rtol=1e-10, atol=1e-10)
    assert torch.equal(ClassifierFree(DATA.denoiser(schedule), 1.0)(X_T, level, LABELS).x, conditional.x)


def test_the_scale_in_the_notation_of_ho():
    """Ho's (1 + w) conditional − w null has scale 1 + w [Ho22 eq. 6], for x̂ and v alike."""
    level = S.Flow()(0.4)
    conditional, null = (DATA.denoiser(S.Flow())(X_T, level, cond) for cond in (LABELS, None))
    w = 1.7
    guided = extrapolate(conditional, null, 1 + w)
    torch.testing.assert_close(guided.eps, (1 + w) * conditional.eps - w * null.eps)
    torch.testing.assert_close(guided.x, (1 + w) * conditional.x - w * null.x)
    v, v_told, v_null = (level.alpha * p.eps - level.sigma * p.x for p in (guided, conditional, null))
    torch.testing.assert_close(v, v_null + (1 + w) * (v_told - v_null))


# --- how the denoiser within is called --------------------------------------------------------------------------------


def test_both_predictions_in_one_call():
    var_interp = torch.arange(20, dtype=F64).reshape(10, 2)

    def denoise(x_t, level, cond, next_level):
        return DATA.denoiser(S.Flow(), var_interp[: len(x_t)])(x_t, level, cond, next_level)

    spy = Spy(denoise)
    guided = ClassifierFree(spy, 3.0)
    one, many = S.Flow()(0.4), S.Flow()(torch.linspace(0.3, 0.7, 5, dtype=F64))
    assert torch.equal(guided(X_T, many, LABELS, one).var_interp, var_interp[:5])
    x_t, level, cond, to = spy.seen.pop()
    assert spy.seen == []
    assert torch.equal(x_t, torch.cat([X_T, X_T]))
    assert all(torch.equal(found, torch.cat([v, v])) for found, v in zip(level[:4], many[:4], strict=True))
    assert level.frac_fn == many.frac_fn
    assert torch.equal(cond.label, torch.tensor([0, 2, 1, 0, 2, -1, -1, -1, -1, -1]))
    assert to is not None
    assert to[:4] == one[:4]
    guided(X_T, one, LABELS)
    assert spy.seen.pop()[3] is None
    for quiet in (guided, ClassifierGuided(spy, exact_log_prob)):  # without a condition there is nothing to guide to
        assert quiet(X_T, one, None, many).x.shape == X_T.shape
        assert spy.seen.pop() == (X_T, one, None, many)
    ClassifierFree(spy, 1.0)(X_T, one, LABELS, many)
    assert spy.seen.pop() == (X_T, one, LABELS, many)
    assert ClassifierGuided(spy, exact_log_prob)(X_T, one, LABELS, many).var_interp is not None
    assert spy.seen.pop() == (X_T, one, LABELS, many)


def test_the_interval_is_of_log_snr():
    """sigma/alpha in (σ_low, σ_high] is log_snr in [−2 log σ_high, −2 log σ_low) [Kynkäänniemi24 eq. 5]."""
    schedule = S.LinearLogSNR(10.0, -10.0)
    level = schedule(torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0], dtype=F64))  # log-SNR 10, 2, 0, −2, −10
    spy = Spy(DATA.denoiser(schedule))
    for (low, high), inside in {
        (-2.0, 2.0): [0, 0, 1, 1, 0],
        (-2.0, None): [1, 1, 1, 1, 0],
        (None, 2.0): [0, 0, 1, 1, 1],
    }.items():
        guided = ClassifierFree(spy, 3.0, low, high)(X_T, level, LABELS)
        scale = torch.where(torch.tensor(inside) == 1, 3.0, 1.0)[:, None]
        torch.testing.assert_close(score_of(guided, level), scores(level, scale), rtol=1e-10, atol=1e-10)
        assert len(spy.seen.pop()[0]) == 10
    outside = ClassifierFree(spy, 3.0, -2.0, 2.0)(X_T, schedule(0.4), LABELS)
    assert len(spy.seen.pop()[0]) == 5
    torch.testing.assert_close(score_of(outside, schedule(0.4)), scores(schedule(0.4), 1.0), rtol=1e-10, atol=1e-10)


def test_rescaling_by_hand():
    """[Lin23 §3.4], item by item, on x̂; ε̂ follows."""
    level, share = S.LinearLogSNR()(0.6), 0.7
    plain = ClassifierFree(DATA.denoiser(S.LinearLogSNR()), 3.0)
    conditional = DATA.denoiser(S.LinearLogSNR())(X_T, level, LABELS).x.numpy()
    found = replace(plain, rescale=share)(X_T, level, LABELS)
    for item, x, mine in zip(found.x.numpy(), plain(X_T, level, LABELS).x.numpy(), conditional, strict=True):
        np.testing.assert_allclose(item, share * x * mine.std() / x.std() + (1 - share) * x, rtol=1e-12)
    score_of(found, level)
    full = replace(plain, rescale=1.0)(X_T, level, LABELS).x.numpy()
    np.testing.assert_allclose(full.std(1), conditional.std(1), rtol=1e-12)
    flat = ClassifierFree(lambda x_t, *_: Prediction(torch.ones_like(x_t), x_t), 3.0, rescale=1.0)
    assert torch.equal(flat(X_T, level, LABELS).x, torch.ones_like(X_T))  # nothing to scale
    assert torch.equal(flat(X_T[:, :1], level, LABELS).x, torch.ones(5, 1, dtype=F64))  # an item of one number


def test_a_weak_model_by_hand():
    schedule, level = S.Flow(), S.Flow()(0.6)
    weak = GaussianData(DATA.mean(), DATA.covariance())
    spies = Spy(DATA.denoiser(schedule, 0.3)), Spy(weak.denoiser(schedule))
    guided = Autoguided(*spies, 2.5)
    assert guided.schedule is schedule
    found = guided(X_T, level, LABELS, level)
    wanted = weak.score(X_T, level) + 2.5 * (DATA.score(X_T, level, LABELS.label) - weak.score(X_T, level))
    torch.testing.assert_close(score_of(found, level), wanted, rtol=1e-10, atol=1e-10)
    assert (found.var_interp == 0.3).all()
    assert [spy.seen for spy in spies] == [[(X_T, level, LABELS, level)]] * 2
    assert torch.equal(replace(guided, scale=1.0)(X_T, level).x, spies[0](X_T, level).x)
    assert len(spies[1].seen) == 1


def test_dynamic_threshold_by_hand():
    """[Saharia22 §2.3]: the quantile 0.75 of four numbers is the third largest but one."""
    level = S.LinearLogSNR()(0.6)
    x = torch.tensor([[0.1, -3.0, 2.0, 0.5], [0.1, -0.9, 0.2, 5.0], [-0.2, 0.3, 0.1, 0.4]], dtype=F64)[:, None]
    x_t = torch.ones_like(x)

    def denoise(x_t, level, cond=None, next_level=None):
        return Prediction(x, x_t, torch.tensor(7.0))

    found = DynamicThreshold(denoise, 0.75)(x_t, level)
    wanted = torch.tensor([[0.05, -1.0, 1.0, 0.25], [0.1, -0.9, 0.2, 1.0], [-0.2, 0.3, 0.1, 0.4]], dtype=F64)[:, None]
    torch.testing.assert_close(found.x, wanted)
    assert float(found.var_interp) == 7
    score_of(found, level, x_t)
    torch.testing.assert_close(DynamicThreshold(denoise, 0.75, limit=2.0)(x_t, level).x, x.clamp(-2, 2))
    torch.testing.assert_close(DynamicThreshold(denoise, 1.0, 0.5)(x_t, level).x[1], x[1] / 10)
    few = DynamicThreshold(denoise, 1e-9, 0.01)(x_t, level).x  # no less than the least of them
    torch.testing.assert_close(few[0], torch.tensor([[0.01, -0.01, 0.01, 0.01]], dtype=F64))


# --- under every solver and likelihood --------------------------------------------------------------------------------

GUIDED = {
    "classifier-free": lambda d: ClassifierFree(d, 2.0, -3.0, 5.0, 0.5),
    "classifier": lambda d: ClassifierGuided(ConditionedDenoiser(d, None), exact_log_prob, 2.0),
    "weak": lambda d: Autoguided(d, GaussianData(DATA.mean(), DATA.covariance()).denoiser(d.schedule), 1.5),
    "dynamic": lambda d: DynamicThreshold(d, 0.9),
    "all": lambda d: DynamicThreshold(
        ClassifierGuided(ClassifierFree(Autoguided(d, ConditionedDenoiser(d, None), 2.0), 2.0), exact_log_prob)
    ),
    "inside out": lambda d: Autoguided(
        ClassifierFree(ClassifierGuided(DynamicThreshold(d), exact_log_prob), 2.0), d, 2.0
    ),
}


def sampled(denoise, solver, levels, x, cond=LABELS):
    random = torch.Generator().manual_seed(1)

    def noise(draws):
        return torch.randn(draws, *x.shape, generator=random, dtype=x.dtype)

    with torch.no_grad():
        *_, last = trajectory(ConditionedDenoiser(denoise, cond), solver, levels, x, noise)
    return rescale(last.x, last.level)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", GUIDED)
def test_every_solver_takes_every_guidance(guidance, solver):
    schedule = S.LinearLogSNR()
    settings = {"annealed_langevin": {"updates_per_level": 2}, "adaptive": {"rtol": 0.1, "atol": 0.1}}.get(solver, {})
    guided = GUIDED[guidance](DATA.denoiser(schedule))
    x = sampled(guided, solver_called(solver, **settings), time_grid(schedule, 4), X_T.float())
    assert x.shape == X_T.shape
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert not x.requires_grad


@pytest.mark.parametrize("guidance", GUIDED)
@pytest.mark.parametrize("schedule", [S.Flow(), DS.Tabulated([0.1, 0.3, 0.5, 1.0])], ids=["flow", "table"])
def test_where_no_signal_is_left(guidance, schedule):
    """At alpha = 0 the classifier does not depend on x_t, x̂ is unchanged, and sampling continues to the data."""
    guided = GUIDED[guidance](DATA.denoiser(schedule))
    x = sampled(guided, DDIM(), time_grid(schedule, 4), X_T)
    assert torch.isfinite(x).all()
    level = schedule(1.0)
    assert float(level.alpha) == 0
    torch.testing.assert_close(guided(X_T, level, LABELS).eps, X_T)
    if guidance == "classifier":
        torch.testing.assert_close(guided(X_T, level, LABELS).x, DATA.mean().expand(5, 2))


def test_ddim_at_scale_1_samples_the_condition():
    """The denoiser of each label, the conditional one, and both kinds of guidance at scale 1 give the same samples."""
    schedule = S.LinearLogSNR()
    levels, d = time_grid(schedule, 20), DATA.denoiser(schedule)
    wanted = torch.cat(
        [
            sampled(DATA.group(int(label)).denoiser(schedule), DDIM(), levels, x[None], None)
            for label, x in zip(LABELS.label, X_T, strict=True)
        ]
    )
    for guided in (ClassifierFree(d, 1.0), ClassifierGuided(ConditionedDenoiser(d, None), exact_log_prob)):
        torch.testing.assert_close(sampled(guided, DDIM(), levels, X_T), wanted, rtol=1e-9, atol=1e-9)


def test_the_flow_of_the_exact_classifier_has_the_conditional_density():
    """The gradient of the gradient is right too: the divergence of the guided flow gives log p(x|label)."""
    schedule = S.LinearLogSNR(8.0, -8.0)
    top, clean = schedule(1.0), schedule(0.0)

    def prior(x):
        return DATA.log_density(x, top, LABELS.label)

    found = ode_nll(
        ClassifierGuided(unconditional(schedule), exact_log_prob), X_T, top, clean, cond=LABELS, prior=prior
    )
    wanted = DATA.log_density(clean.alpha * X_T, clean, LABELS.label) + 2 * clean.alpha.log()
    torch.testing.assert_close(found.total, -wanted, rtol=0, atol=1e-3)


# --- the laws that guided sampling draws ------------------------------------------------------------------------------


V, W, EXPLODING = 0.25, 0.6, S.VarianceExploding(1e-3, 50.0)
STRONG, WEAK = (GaussianData(torch.zeros(1), torch.tensor([u])).denoiser(EXPLODING) for u in (V, W))


def size(level, scale):
    """The scale by which the guided flow of N(0, V) and weak N(0, W) multiplies x."""
    return math.prod((u + float(level.sigma) ** 2) ** (p / 2) for u, p in ((V, scale), (W, 1 - scale)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_distribution_of_two_gaussians(scale):
    """The flow from N(0, sigma²) ends in the std V^(scale/2) W^((1 − scale)/2).

    Not in that of the product of powers, 1/(scale/V + (1 − scale)/W), which at scale 3 is another.
    """
    ratios = []
    for steps in (100, 200):
        levels = time_grid(EXPLODING, steps)
        start = torch.tensor([[size(levels[0], scale)]], dtype=F64)
        end = sampled(Autoguided(STRONG, WEAK, scale), DDIM(), levels, start, None)
        ratios.append(float(end) / size(levels[-1], scale))
    assert size(levels[-1], scale) == pytest.approx(V ** (scale / 2) * W ** ((1 - scale) / 2), rel=1e-5)
    assert 2 * ratios[1] - ratios[0] == pytest.approx(1, abs=1e-3)  # what is left is of the solver's second order


def test_the_density_of_two_gaussians():
    """The likelihood of the guided flow is the density of its samples from N(0, sigma²)."""
    top, clean = EXPLODING(1.0), EXPLODING(0.0)
    x = torch.tensor([[-0.5], [0.0], [0.3]], dtype=F64)
    std = float(top.sigma) * size(clean, 3.0) / size(top, 3.0)
    wanted = 0.5 * (x[:, 0] / std) ** 2 + math.log(std) + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(ode_nll(Autoguided(STRONG, WEAK, 3.0), x, top, clean).total, wanted, rtol=0, atol=1e-3)
    assert std == pytest.approx(0.208, abs=1e-3)


LINE = LabelledMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.0], [0.8], [0.0]]),
    torch.tensor([[0.09], [0.04], [0.25]]),
    torch.tensor([0, 1, 1]),
)


@pytest.mark.parametrize("interval", [None, (-2.0, 3.0)])
def test_the_distribution_of_a_guided_mixture(interval):
    """In one dimension the flow keeps quantiles: those of N(0, 1), by a reference integration, are the guided ones.

    Without randomness, so without a false alarm. The reference is SciPy's, of dx/dσ̃ = ε̂ for x/alpha with the score
    from densities differentiated numerically.
    """
    schedule, scale = S.LinearLogSNR(8.0, -6.0), 2.5
    low, high = interval or (None, None)
    d = LINE.denoiser(schedule)
    q = torch.linspace(0.02, 0.98, 25, dtype=F64)
    start = torch.special.ndtri(q)[:, None]
    cond = Condition(label=torch.ones(25, dtype=torch.int64))

    guided = ClassifierFree(d, scale, low, high)
    # DDIM in 70 and 140 steps, extrapolated to infinitely many; both have a level where the interval ends
    half, full = (sampled(guided, DDIM(), time_grid(schedule, n), start, cond)[:, 0].numpy() for n in (70, 140))
    found = 2 * full - half

    spread = np.sqrt([0.09, 0.04, 0.25])

    def log_density(y, ratio, members):  # of x + ratio eps
        z = (y[:, None] - np.array([-1.0, 0.8, 0.0])) / np.hypot(spread, ratio)
        each = np.array([0.5, 0.3, 0.2]) * np.exp(-0.5 * z**2) / np.hypot(spread, ratio)
        return np.log(each[:, members].sum(1))

    def move(log_ratio, y):
        ratio, h = math.exp(log_ratio), 1e-4 * math.exp(log_ratio)

        def score(members):
            return (log_density(y + h, ratio, members) - log_density(y - h, ratio, members)) / (2 * h)

        free, conditional = score([0, 1, 2]), score([1, 2])
        inside = (low is None or -2 * log_ratio >= low) and (high is None or -2 * log_ratio < high)
        return -(ratio**2) * (free + scale * (conditional - free) if inside else conditional)

    stops = [3.0, *([1.0, -1.5] if interval else []), -4.0]  # −log_snr/2, piece by piece
    y = (start[:, 0] / schedule(1.0).alpha).numpy()
    for a, b in pairwise(stops):
        y = solve_ivp(move, (a, b), y, rtol=1e-6, atol=1e-8).y[:, -1]
    np.testing.assert_allclose(found, y, atol=2e-3)
    assert (np.diff(found) > 0).all()
    conditional = sampled(d, DDIM(), time_grid(schedule, 35), start, cond)[:, 0].numpy()
    assert np.abs(found - conditional).max() > 1  # five hundred times the tolerance


# --- the guidance of a sampler ----------------------------------------------------------------------------------------


def test_a_sampler_applies_its_guidance():
    d = DATA.denoiser(S.Flow())
    assert Sampler().guide(d) is d
    sampler = Sampler(
        guidance=2.0,
        guidance_interval=(-1.0, 3.0),
        guidance_rescale=0.7,
        classifier_scale=0.5,
        autoguidance_scale=1.5,
        threshold="dynamic",
    )
    assert sampler.guide(d, Guide(exact_log_prob, d)) == DynamicThreshold(
        ClassifierGuided(Autoguided(ClassifierFree(d, 2.0, -1.0, 3.0, 0.7), d, 1.5), exact_log_prob, 0.5)
    )
    assert Sampler().guide(d, Guide(weak=d)) == Autoguided(d, d, 2.0)
    assert Sampler().guide(d, Guide(exact_log_prob)) == ClassifierGuided(d, exact_log_prob, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: ClassifierFree(d, math.nan), r"scale = nan: it is not a number from -1000 to 1000\. Give one"),
        (lambda d: ClassifierFree(d, -1000.5), r"scale = -1000.5: it is not a number from -1000 to 1000"),
        (lambda d: Autoguided(d, d, math.inf), r"scale = inf: it is not a number from"),
        (lambda d: ClassifierGuided(d, exact_log_prob, math.nan), r"scale = nan: it is not a number from"),
        (
            lambda d: ClassifierFree(d, 2.0, rescale=1.1),
            r"rescale = 1.1: it is out of range\. Give a number from 0 to 1",
        ),
        (lambda d: ClassifierFree(d, 2.0, rescale=-0.1), "rescale = -0.1"),
        (
            lambda d: ClassifierFree(d, 2.0, 1.0, 1.0),
            r"the interval 1.0 to 1.0: the interval is empty\. Give two numbers, the lower",
        ),
        (lambda d: ClassifierFree(d, 2.0, None, math.nan), "the interval None to nan: an end of it is NaN"),
        (lambda d: DynamicThreshold(d, 0.0), r"quantile = 0.0, limit = 1.0: these settings"),
        (lambda d: DynamicThreshold(d, 1.01), "quantile = 1.01"),
        (lambda d: DynamicThreshold(d, limit=0.0), "limit = 0.0"),
        (lambda d: Sampler(threshold="hard"), r"'hard': unknown\. Use one of static, dynamic\."),
        (lambda d: Autoguided(d, DATA.denoiser(S.LinearLogSNR()), 2.0), r"different noise processes\. Use an earlier"),
    ],
)
def test_guidance_errors(make, message):
    with pytest.raises(ConfigError, match=rf"^error\[GUIDANCE\] .*{message}"):
        make(DATA.denoiser(S.Flow()))


def test_same_process():
    assert same_process(S.LinearLogSNR(), S.LinearLogSNR())
    assert same_process(DS.cosine(), DS.cosine())
    assert not same_process(S.LinearLogSNR(), S.LinearLogSNR(13.2))
    assert not same_process(DS.linear(), DS.linear(500))
    assert not same_process(S.VarianceExploding(), S.VarianceExploding(0.02))

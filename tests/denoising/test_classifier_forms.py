"""The two forms of classifier guidance on labelled mixtures: the mean of a step shifted, and the score [Dhariwal21]."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import LabelledMixture

from undiffuse.denoising.denoiser import ConditionedDenoiser
from undiffuse.denoising.guidance import ClassifierGuided, Guide
from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import log_var_large, log_var_small, transition_frac
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.ancestral import Ancestral, ClassifierGuidedAncestral
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

F64 = torch.float64
PLANE = LabelledMixture(
    torch.tensor([0.3, 0.2, 0.4, 0.1]),
    torch.tensor([[-1.0, 0.5], [1.2, 0.3], [0.0, -1.0], [0.4, 1.5]]),
    torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.4, 0.1], [0.05, 0.2]]),
    torch.tensor([0, 1, 2, 0]),
)
LINE = LabelledMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.0], [0.8], [0.0]]),
    torch.tensor([[0.09], [0.04], [0.25]]),
    torch.tensor([0, 1, 1]),
)
SCHEDULES = {"log-SNR": S.LinearLogSNR(), "flow": S.Flow(), "exploding": S.VarianceExploding(), "linear": DS.linear()}
LABELS = Condition(label=torch.tensor([0, 2, 1, 0, 2]))
X_T = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def log_prob_of(data):
    return lambda x_t, level, cond: data.log_posterior(x_t, level).gather(1, cond.label[:, None])[:, 0]


def forms(data, schedule, cond, scale=1.0, variance="small"):
    """p(x_s given x_t) of both forms, as functions of (x_t, t, s), from the exact unconditional denoiser."""
    denoise, log_prob = ConditionedDenoiser(data.denoiser(schedule, 0.3), None), log_prob_of(data)
    score = ConditionedDenoiser(ClassifierGuided(denoise, log_prob, scale), cond)
    mean = ClassifierGuidedAncestral(variance, log_prob=log_prob, cond=cond, scale=scale)
    return {
        "score": lambda x_t, t, s: Ancestral(variance).transition(score, x_t, t, s),
        "mean": lambda x_t, t, s: mean.transition(denoise, x_t, t, s),
    }


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_shift_of_the_mean_is_the_variance_times_the_gradient(name, variance):
    """μ + w Σ ∇log p; the score form shifts by w (alpha_s/alpha_t) sigma_t² frac ∇log p. Closed forms of every part."""
    schedule, scale = SCHEDULES[name], 2.5
    t, s = schedule(0.6), schedule(0.55)
    gradient = PLANE.score(X_T, t, LABELS.label) - PLANE.score(X_T, t)
    x = PLANE.denoiser(schedule)(X_T, t).x
    mean = (t.alpha / s.alpha) * (s.sigma / t.sigma) ** 2 * X_T + s.alpha * transition_frac(t, s) * x
    small, large = log_var_small(t, s), log_var_large(t, s)
    log_var = {"small": small, "large": large, "learned": 0.3 * large + 0.7 * small}[variance]
    found = {form: step(X_T, t, s) for form, step in forms(PLANE, schedule, LABELS, scale, variance).items()}
    for step in found.values():
        torch.testing.assert_close(step.log_var.expand(5, 2), log_var.expand(5, 2))
    torch.testing.assert_close(found["mean"].mean, mean + scale * log_var.exp() * gradient, rtol=1e-10, atol=1e-10)
    wanted = mean + scale * s.alpha / t.alpha * large.exp() * gradient
    torch.testing.assert_close(found["score"].mean, wanted, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_forms_agree_to_first_order_in_the_step(variance):
    """The shifts are of the first order in the step h and differ by the second: half h has a half and a quarter."""
    schedule = S.LinearLogSNR()
    shifts, gaps = [], []
    for h in (0.004, 0.002, 0.001):
        t, s = schedule(0.6), schedule(0.6 - h)
        one, none = (forms(PLANE, schedule, LABELS, scale, variance) for scale in (1.0, 0.0))
        score, mean = (one[form](X_T, t, s).mean for form in ("score", "mean"))
        shifts.append(float((score - none["score"](X_T, t, s).mean).norm()))
        gaps.append(float((score - mean).norm()))
    for (shift, half), (gap, quarter) in zip(pairwise(shifts), pairwise(gaps), strict=True):
        assert math.log2(shift / half) == pytest.approx(1, abs=0.1)
        assert math.log2(gap / quarter) == pytest.approx(2, abs=0.1)
    assert gaps[-1] < 0.1 * shifts[-1]


POINTS = 161


@torch.no_grad()
def moments(transition, levels, label):
    """Mean and standard deviation of the end of a chain that starts with the density of the ``label``, by quadrature.

    The density on a grid, each step an integral with the step's Gaussian kernel by the trapezoidal rule, whose error is
    below 1e-9 here as every standard deviation of a step is above twice the spacing.
    """
    grid = torch.linspace(-6, 6, POINTS, dtype=F64)
    density = LINE.log_density(grid[:, None], levels[0], torch.full((POINTS,), label)).exp()
    for t, s in pairwise(levels):
        mean, log_var = (v.expand(POINTS, 1) for v in transition(grid[:, None], t, s))
        assert float((0.5 * log_var).exp().min()) > 0.15
        kernel = torch.exp(-0.5 * (grid - mean) ** 2 * torch.exp(-log_var) - 0.5 * log_var)
        density = density @ kernel * float(grid[1] - grid[0]) / math.sqrt(2 * math.pi)
    density = density / density.sum()
    mean = density @ grid
    return torch.stack([mean, (density @ (grid - mean) ** 2).sqrt()])


@pytest.mark.parametrize("label", [0, 1])
def test_both_forms_sample_the_class_to_first_order_in_the_step(label):
    """Chains of 8, 16 and 32 steps at scale 1: their errors and the difference of the two halve with the step.

    The law of a chain by quadrature, so without randomness; that of the class at the last level is a closed form.
    """
    schedule = S.LinearLogSNR(2.0, -6.0)
    cond = Condition(label=torch.full((POINTS,), label))
    grid = torch.linspace(-6, 6, 1201, dtype=F64)
    law = LINE.log_density(grid[:, None], schedule(0.0), torch.full((1201,), label)).exp() * 0.01
    exact = torch.stack([law @ grid, (law @ (grid - law @ grid) ** 2).sqrt()])
    results = {"score": [], "mean": []}
    for steps in (8, 16, 32):
        for form, transition in forms(LINE, schedule, cond).items():
            results[form].append(moments(transition, time_grid(schedule, steps), label))
    for found in results.values():
        errors = [float((moment - exact).norm()) for moment in found]
        assert errors[-1] < 0.1
        assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.15)
    gaps = [float((one - other).norm()) for one, other in zip(*results.values(), strict=True)]
    assert math.log2(gaps[1] / gaps[2]) == pytest.approx(1, abs=0.15)


# --- the form of a sampler --------------------------------------------------------------------------------------------


def test_a_sampler_has_the_form():
    denoise, guide = PLANE.denoiser(S.Flow()), Guide(log_prob_of(PLANE))
    score, mean = (
        Sampler("ancestral", settings={"variance": "large"}, classifier_scale=3.0, classifier_form=form)
        for form in ("score", "mean")
    )
    assert score.guide(denoise, guide) == ClassifierGuided(denoise, guide.log_prob, 3.0)
    assert mean.guide(denoise, guide) is denoise
    solver = mean.build_solver()
    wanted = ClassifierGuidedAncestral("large", log_prob=guide.log_prob, cond=LABELS, scale=3.0)
    assert mean.guide_solver(solver, guide, LABELS) == wanted
    for other, given in ((score, guide), (mean, Guide(weak=denoise)), (mean, None)):
        assert other.guide_solver(solver, given, LABELS) is solver
    assert Sampler.from_dict(mean.to_dict()) == mean


def test_a_trajectory_of_the_mean_form_ends_in_the_mean_of_its_last_step():
    """The last step into data draws no noise, and is shifted like every other, as in the authors' code."""
    schedule = DS.linear(4)
    solver = ClassifierGuidedAncestral("large", log_prob=log_prob_of(PLANE), cond=LABELS, scale=2.0)
    denoise, levels = ConditionedDenoiser(PLANE.denoiser(schedule), None), time_grid(schedule, 4)
    noise = torch.ones(1, 5, 2, dtype=F64)
    *_, before, last = trajectory(denoise, solver, levels, X_T, lambda n: noise)
    torch.testing.assert_close(last.x, solver.transition(denoise, before.x, levels[-2], levels[-1]).mean)
    assert not last.x.requires_grad


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"classifier_form": "noise"}, r"classifier_form 'noise': unknown\. Use 'score' or 'mean'"),
        ({"classifier_form": "mean"}, r"the solver 'ancestral', and this one is 'ddim'\. Use that solver, or the form"),
    ],
)
def test_forms_that_cannot_be(sampler, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**sampler)
    with pytest.raises(ConfigError, match="scale = nan: it is not a number"):
        ClassifierGuidedAncestral(log_prob=log_prob_of(PLANE), cond=LABELS, scale=math.nan)

"""Posterior denoisers against Bayes' rule for Gaussians, as functions and as samplers, without randomness."""

from functools import partial

import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from posterior_cases import (
    COV,
    DATA,
    F64,
    MEAN,
    OPERATORS,
    PAIR,
    SCHEDULES,
    SHAPE,
    D,
    Net,
    bayes,
    dense,
    moments,
    random,
)

from undiffuse.denoising.denoiser import Clipped, NetworkDenoiser, Preconditioning, Prediction
from undiffuse.denoising.linear_operators import mask
from undiffuse.denoising.posterior_guidance import DPS, MMPS, Observation, PiGDM, PosteriorGuidance, conjugate_gradients
from undiffuse.errors import ConfigError
from undiffuse.likelihood.probability_flow import ode_nll
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.schedule import finite_ends
from undiffuse.process.target import TARGETS
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

# --- as functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nudge", [0.05, None])
@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", OPERATORS)
def test_mmps_is_the_posterior_mean_of_gaussian_data(name, process, std, nudge):
    operator, (schedule, times) = OPERATORS[name], SCHEDULES[process]
    y = random(1, *operator.out_shape, seed=6)
    exact = bayes(operator, y, std)
    guided = MMPS(DATA.denoiser(schedule), Observation(operator, y, std), iterations=3 * D, fd_step=nudge)
    assert guided.schedule is schedule
    for t in times:
        if (t, std) == (1e-5, 0.0):
            continue  # where the rounding of a singular covariance shows in the reference
        level = schedule(t)
        x_t = level.alpha * random(5, *SHAPE, seed=7) + level.sigma * random(5, *SHAPE, seed=8)
        with torch.no_grad():
            x, eps, var_interp = guided(x_t, level)
        expected = exact.predict(x_t, level)
        torch.testing.assert_close(x, expected.x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(level.alpha * x + level.sigma * eps, x_t, rtol=1e-9, atol=1e-9)
        assert var_interp is None
        assert [x.requires_grad, eps.requires_grad] == [False, False]


def test_every_item_has_its_own_observation_and_level():
    operator, schedule = OPERATORS["matrix"], S.LinearLogSNR()
    y, t = random(3, 3, seed=6), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    x_t = random(3, *SHAPE)
    together = MMPS(DATA.denoiser(schedule), Observation(operator, y, 0.2), 9)(x_t, schedule(t))
    for i in range(3):
        alone = bayes(operator, y[i : i + 1], 0.2).predict(x_t[i : i + 1], schedule(t[i]))
        torch.testing.assert_close(together.x[i : i + 1], alone.x)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps)


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_pigdm_is_exact_where_the_data_are_isotropic(std):
    """N(m, d² I) through any A; with another d, or other data, it is not."""
    operator, schedule = OPERATORS["matrix"], S.LinearLogSNR()
    d, y, level = 0.6, random(1, 3, seed=6), S.LinearLogSNR()(0.7)
    data, A = GaussianData(MEAN, torch.full(SHAPE, 0.6**2)), dense(OPERATORS["matrix"])
    gain = d**2 * A.T @ torch.linalg.inv(d**2 * A @ A.T + std**2 * torch.eye(3))
    mean = MEAN + (gain @ (y[0] - A @ MEAN.flatten())).reshape(SHAPE)
    exact = GaussianData(mean, d**2 * (torch.eye(D) - (gain @ A + A.T @ gain.T) / 2))
    x_t, observation = random(5, *SHAPE), Observation(operator, y, std)
    torch.testing.assert_close(
        PiGDM(data.denoiser(schedule), observation, d)(x_t, level).x, exact.predict(x_t, level).x
    )
    for wrong in (PiGDM(data.denoiser(schedule), observation, 1.0), PiGDM(DATA.denoiser(schedule), observation, d)):
        against = exact if wrong.denoise.data is data else bayes(operator, y, std)
        assert float((wrong(x_t, level).x - against.predict(x_t, level).x).abs().max()) > 0.01


def test_dps_is_the_gradient_of_the_likelihood_of_the_mean():
    """x̂ − (sigma²/alpha) ∇‖y − A x̂‖²/(2 noise_std²) by automatic differentiation of that norm."""
    operator, schedule = OPERATORS["matrix"], S.LinearLogSNR()
    denoise, level, y = DATA.denoiser(schedule), schedule(0.4), random(5, 3, seed=6)
    x_t = random(5, *SHAPE).requires_grad_()
    distance = (y - operator(denoise(x_t, level).x)).square().sum(1)
    score = torch.autograd.grad(-distance.sum() / (2 * 0.3**2), x_t)[0]
    guided = DPS(denoise, Observation(operator, y, 0.3))(x_t.detach(), level)
    torch.testing.assert_close(guided.x, denoise(x_t.detach(), level).x + level.sigma**2 / level.alpha * score)


def test_the_steps_of_dps_are_those_of_its_algorithm():
    """x_s − step ∇‖y − A x̂‖ after the ancestral step without it [Chung23 alg. 1]."""
    operator, schedule = OPERATORS["pool"], DS.linear(50)
    denoise, y, noise = DATA.denoiser(schedule), random(5, 1, 1, 1, seed=6), random(1, 5, *SHAPE, seed=8)
    for k, end in ((30, 29), (50, 40), (1, 0)):
        t, s = schedule(k / 50), schedule(end / 50)
        x_t = random(5, *SHAPE).requires_grad_()
        distance = (y - operator(denoise(x_t, t).x)).flatten(1).norm(dim=1)
        slope = torch.autograd.grad(distance.sum(), x_t)[0]
        plain = Ancestral().step(denoise, x_t.detach(), t, s, (), noise)[0]
        guided = DPS(denoise, Observation(operator, y), step=0.7)
        found = Ancestral().step(guided, x_t.detach(), t, s, (), noise)[0]
        torch.testing.assert_close(found, plain - 0.7 * slope, rtol=1e-10, atol=1e-10)


def test_dps_needs_noise_or_both_levels():
    denoise, observation = DATA.denoiser(DS.linear()), Observation(OPERATORS["identity"], MEAN[None])
    with pytest.raises(ConfigError, match=r"error\[DPS\] noise_std = 0: .* which is 0"):
        DPS(denoise, observation)(MEAN[None], DS.linear()(0.5))
    with pytest.raises(ConfigError, match=r"error\[DPS\] step = 2: .* only one is given"):
        DPS(denoise, observation, 2.0)(MEAN[None], DS.linear()(0.5))
    exact = DPS(denoise, Observation(OPERATORS["identity"], denoise(MEAN[None], DS.linear()(0.5)).x), 2.0)
    assert torch.isfinite(
        exact(MEAN[None], DS.linear()(0.5), next_level=DS.linear()(0.4)).x
    ).all()  # the residual is zero


KINDS = {
    "mmps": lambda denoise, observation: MMPS(denoise, observation),
    "pigdm": lambda denoise, observation: PiGDM(denoise, observation),
    "dps": lambda denoise, observation: DPS(denoise, observation._replace(noise_std=observation.noise_std or 0.1)),
    "dps step": lambda denoise, observation: DPS(denoise, observation, 1.0),
    "by autograd": lambda denoise, observation: MMPS(denoise, observation, fd_step=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_signal_the_prediction_is_unchanged(kind):
    schedule = S.Flow()
    for std in (0.0, 0.2):
        observation = Observation(OPERATORS["mask"], random(1, 3), std)
        guided = KINDS[kind](DATA.denoiser(schedule), observation)
        x, eps, _ = guided(random(2, *SHAPE), schedule(1.0), next_level=schedule(0.9))
        torch.testing.assert_close([x, eps], [*DATA.predict(random(2, *SHAPE), schedule(1.0))[:2]])
        both = schedule(torch.tensor([1.0, 0.5], dtype=F64))
        assert torch.isfinite(guided(random(2, *SHAPE), both, next_level=schedule(0.2)).x).all()
        learned = KINDS[kind](lambda x_t, *_: Prediction(0.5 * x_t, x_t), observation)  # its derivative is not 0 there
        x_t = random(2, *SHAPE)
        torch.testing.assert_close([*learned(x_t, schedule(1.0), next_level=schedule(0.9))[:2]], [0.5 * x_t, x_t])


@pytest.mark.parametrize("target", ["v", "x", "eps"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_networks_from_one_end_to_the_other(kind, target):
    schedule = S.LinearLogSNR()
    denoise = NetworkDenoiser(Net(), schedule, TARGETS[target], Preconditioning(), learned_variance=True)
    guided = Clipped(KINDS[kind](denoise, Observation(OPERATORS["mask"], torch.zeros(1, 3))))
    levels = time_grid(schedule, 20)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        args = guided.denoise(x, levels[3], Condition(label=torch.tensor([0, 1, 2])), levels[4])
        *_, last = trajectory(guided, DDIM(), levels, x, lambda n: x.new_empty(n, *x.shape))
    assert last.x.dtype == torch.float32
    assert torch.isfinite(last.x).all()
    with torch.no_grad():
        plain = denoise(x, levels[3], Condition(label=torch.tensor([0, 1, 2])), levels[4])
    torch.testing.assert_close(args.var_interp, plain.var_interp)
    assert not args.var_interp.requires_grad
    assert all(p.grad is None for p in denoise.network.parameters())
    assert not torch.allclose(args.x[1:], guided.denoise(x, levels[3], next_level=levels[4]).x[1:])


def test_the_network_gets_the_arguments_of_the_solver():
    """Once for x̂ and once for each product with J, or only once with autograd."""
    t, s = DS.linear()(0.5), DS.linear()(0.4)
    cond = Condition(label=torch.tensor([3]))
    for nudge, calls in ((0.05, 1 + 4 + 1), (None, 1)):
        spy = Spy(DATA.denoiser(DS.linear()))
        MMPS(spy, Observation(OPERATORS["mask"], random(1, 3)), 4, fd_step=nudge)(MEAN[None], t, cond, s)
        assert len(spy.seen) == calls
        assert torch.equal(spy.seen[0][0], MEAN[None])
        assert all(args == [t, cond, s] for _, *args in spy.seen)


def test_fd_step_is_relative_to_sigma():
    """So roughness of a network on a smaller scale does not matter, unlike for its gradient."""
    schedule = S.LinearLogSNR()
    level, x_t = schedule(0.5), random(2, *SHAPE)
    spy = Spy(DATA.denoiser(schedule))
    MMPS(spy, Observation(OPERATORS["matrix"], random(2, 3)), 2, fd_step=0.1)(x_t, level)
    for moved, *_ in spy.seen[1:]:
        sizes = (moved - x_t).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(sizes, (0.1 * level.sigma).expand(2))


@pytest.mark.parametrize("nudge", [0.05, None])
def test_gradients_flow_if_x_t_requires_them(nudge):
    """They are finite at a zero residual, and absent under no_grad."""
    denoise, level = DATA.denoiser(DS.linear()), DS.linear()(0.5)
    x_t = random(2, *SHAPE).requires_grad_()
    y = OPERATORS["mask"](denoise(x_t, level).x).detach()
    y[1] += 1.0
    guided = MMPS(denoise, Observation(OPERATORS["mask"], y, 0.1), 3, fd_step=nudge)
    found = torch.autograd.grad(guided(x_t, level).x.sum(), x_t)[0]
    exact = bayes(OPERATORS["mask"], y[1:], 0.1)  # affine in x_t, of a slope that y has no part in
    expected = torch.autograd.grad(exact.predict(x_t, level).x.sum(), x_t)[0]
    torch.testing.assert_close(found[1], expected[1])
    assert torch.isfinite(found[0]).all()
    with torch.no_grad():
        x, eps, _ = guided(x_t, level)
    assert [x.requires_grad, eps.requires_grad] == [False, False]


def test_the_base_class_has_no_weights():
    with pytest.raises(NotImplementedError):
        PosteriorGuidance(DATA.denoiser(DS.linear()), Observation(OPERATORS["identity"], MEAN[None]))(
            MEAN[None], DS.linear()(1.0)
        )


# --- conjugate gradients ----------------------------------------------------------------------------------------------


def test_conjugate_gradients_solve_in_as_many_iterations_as_eigenvalues():
    matrix = torch.stack([COV, torch.diag(torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=F64)), torch.eye(D, dtype=F64)])
    right = random(3, 2, 2)
    apply = lambda v: torch.einsum("bij,bj->bi", matrix, v.flatten(1)).reshape(v.shape)  # noqa: E731
    expected = torch.linalg.solve(matrix, right.flatten(1)).reshape(right.shape)
    for iterations, solved in ((D, 0), (2, 1), (1, 2), (40, 0)):  # two eigenvalues take two, one takes one
        found = conjugate_gradients(apply, right, iterations)
        torch.testing.assert_close(found[solved:], expected[solved:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(conjugate_gradients(apply, right, D - 1)[0], expected[0])
    assert torch.equal(conjugate_gradients(apply, right, 0), torch.zeros_like(right))


def test_conjugate_gradients_stop_where_the_matrix_is_not_positive():
    matrix = torch.diag(torch.tensor([1.0, -0.1, 0.0], dtype=F64))
    right = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    found = [conjugate_gradients(lambda v: v @ matrix, right.double(), n) for n in (1, 2, 9)]
    expected = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=F64)
    for v in found:
        torch.testing.assert_close(v[:4], expected)
        torch.testing.assert_close(v[4], right[4].double() * 5 / 3.9)  # one step; the next would diverge


# --- as samplers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(), DDIM(0.5)])
@pytest.mark.parametrize("name", ["mask", "matrix"])
def test_samples_have_the_moments_of_the_exact_posterior(name, solver):
    """With MMPS any solver samples the data given y: the same mean and covariance to 1e-8, for any number of steps."""
    operator, schedule = OPERATORS[name], DS.cosine(20)
    y = random(1, 3, seed=6)
    exact = bayes(operator, y, 0.3).denoiser(schedule)
    guided = MMPS(DATA.denoiser(schedule), Observation(operator, y, 0.3), 3 * D)
    for found, expected in zip(*(moments(solver, d, time_grid(schedule)) for d in (guided, exact)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


"""Mean and covariance of two elements of correlation 0.9, the first observed as 1 with noise of variance ¼:"""
AFTER = torch.tensor([0.8, 0.72], dtype=F64), torch.tensor([[0.2, 0.18], [0.18, 0.352]], dtype=F64)
FIRST = mask(torch.tensor([True, False]), (2,))
QUICK = {"mmps": partial(MMPS, iterations=1), "pigdm": partial(PiGDM, iterations=1), "dps": DPS}
KNOWN = torch.tensor([1.0, 0.9], dtype=F64), torch.tensor([[0.0, 0.0], [0.0, 0.19]], dtype=F64)
BIASES = {  # of the mean, and the covariance, after 100 cosine steps with the small variance: docs/inverse.md
    ("mmps", 0.5): ([0.0, 0.0], [[-0.01398, -0.00809], [-0.00809, -0.02081]]),
    ("pigdm", 0.5): ([-0.03727, -0.04353], [[0.00941, 0.01898], [0.01898, 0.01073]]),
    ("dps", 0.5): ([0.18346, 0.24491], [[-0.08803, -0.09568], [-0.09568, -0.12664]]),
    ("mmps", 0.0): ([0.0, 0.0], [[0.0, 0.0], [0.0, -0.01452]]),
    ("pigdm", 0.0): ([0.0, -0.04693], [[0.0, 0.0], [0.0, 0.00969]]),
}


@pytest.mark.parametrize(("kind", "std"), BIASES)
def test_the_bias_of_each_method(kind, std):
    """MMPS and the exact denoiser share the error of the small variance; PiGDM and DPS are biased further."""
    schedule, observation = DS.cosine(100), Observation(FIRST, torch.ones(1, 1, dtype=F64), std)
    mean, cov = moments(Ancestral(), QUICK[kind](PAIR.denoiser(schedule), observation), time_grid(schedule), (2,))
    for found, true, bias in zip((mean, cov), AFTER if std else KNOWN, BIASES[kind, std], strict=True):
        torch.testing.assert_close(found - true, torch.tensor(bias, dtype=F64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nudge", [0.05, None])
def test_the_likelihood_given_y_is_that_of_the_posterior(nudge):
    """The flow of the posterior denoiser has the density p(x given y); gradients go through the conjugate gradients."""
    schedule = S.LinearLogSNR(high=14.0, low=-30.0)
    guided = MMPS(PAIR.denoiser(schedule), Observation(FIRST, torch.ones(1, 1, dtype=F64), 0.5), 1, fd_step=nudge)
    top, clean = finite_ends(schedule)
    exact = GaussianData(*AFTER)
    x = exact.sample(3, torch.Generator().manual_seed(0))
    expected = exact.log_density(clean.alpha * x, clean) + 2 * torch.log(clean.alpha)
    torch.testing.assert_close(-ode_nll(guided, x, top, clean).total, expected, rtol=1e-4, atol=1e-4)


def test_more_than_gaussian_data():
    """On a mixture MMPS is nearest to the data behind the observations: 4000 of them, the same for all methods."""
    means = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=F64)
    data, schedule = MixtureData(torch.ones(2), means, PAIR.cov.expand(2, 2, 2)), S.LinearLogSNR()
    level, x = schedule(0.7), data.sample(4000, torch.Generator().manual_seed(0))
    observation = Observation(FIRST, FIRST(x) + 0.3 * random(4000, 1, seed=1), 0.3)
    x_t = level.alpha * x + level.sigma * random(4000, 2, seed=2)
    denoisers = {kind: build(data.denoiser(schedule), observation) for kind, build in QUICK.items()}
    denoisers["none"] = data.denoiser(schedule)
    error = {kind: float((denoise(x_t, level).x - x).square().mean()) for kind, denoise in denoisers.items()}
    assert error["mmps"] < 0.95 * min(error["pigdm"], error["dps"])
    assert error["mmps"] < 0.8 * error["none"]


def test_samples_converge_to_the_closed_form():
    """In many steps: the error of the first-order flow falls with their number."""
    errors = []
    for steps in (50, 100, 200):
        schedule = S.LinearLogSNR(high=12.0, low=-12.0)
        guided = MMPS(PAIR.denoiser(schedule), Observation(FIRST, torch.ones(1, 1, dtype=F64), 0.5), 1)
        found = moments(DDIM(), guided, time_grid(schedule, steps), (2,))
        errors.append(max(float((one - true).abs().max()) for one, true in zip(found, AFTER, strict=True)))
    assert errors[2] < 0.02
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]

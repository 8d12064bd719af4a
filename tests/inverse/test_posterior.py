"""Posterior denoisers against Bayes' rule for Gaussians, as functions and as samplers, without randomness."""

import math
from functools import partial

import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from torch import nn

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Clipped, NetworkDenoiser, Preconditioning
from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.inverse.operators import Linear, identity, mask, mean_pool
from undiffuse.inverse.posterior import DPS, MMPS, Observation, PiGDM, Posterior, conjugate_gradients
from undiffuse.likelihood import finite_ends, ode_nll
from undiffuse.process import schedule as S
from undiffuse.process.target import TARGETS
from undiffuse.sample import trajectory
from undiffuse.solvers import DDIM, Ancestral

F64 = torch.float64
SHAPE, D = (1, 2, 2), 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


ROOT = random(D, D, seed=3)
COV = ROOT @ ROOT.T / D + 0.05 * torch.eye(D)
MEAN = random(*SHAPE, seed=4)
DATA = GaussianData(MEAN, COV)
MATRIX = random(3, D, seed=5)
OPERATORS = {
    "mask": mask(torch.tensor([[True, False], [True, True]]), SHAPE),
    "pool": mean_pool(2, SHAPE),
    "matrix": Linear(lambda x: x.flatten(1) @ MATRIX.to(x).T, SHAPE),
    "identity": identity(SHAPE),
}
SCHEDULES = {
    "linear": (S.linear(), [1.0, 0.5, 0.001]),
    "log-SNR": (S.LinearLogSNR(), [1.0, 0.4, 0.0]),
    "flow": (S.Flow(), [0.999, 0.5, 1e-3, 1e-5]),
    "exploding": (S.VarianceExploding(), [1.0, 0.5, 0.0]),
}


def dense(operator: Linear) -> torch.Tensor:
    return operator(torch.eye(D, dtype=F64).reshape(D, *SHAPE)).flatten(1).T


def bayes(operator: Linear, y: torch.Tensor, std: float) -> GaussianData:
    """The law of x given y of one item: the textbook's formula in information form."""
    A, precision = dense(operator), torch.linalg.inv(COV)
    if std == 0:  # the formula's limit, by projection
        gain = COV @ A.T @ torch.linalg.inv(A @ COV @ A.T)
        cov = COV - gain @ A @ COV
        return GaussianData(MEAN + (gain @ (y[0].flatten() - A @ MEAN.flatten())).reshape(SHAPE), (cov + cov.T) / 2)
    cov = torch.linalg.inv(precision + A.T @ A / std**2)
    mean = cov @ (precision @ MEAN.flatten() + A.T @ y[0].flatten() / std**2)
    return GaussianData(mean.reshape(SHAPE), (cov + cov.T) / 2)


def law(solver, denoise, levels, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of what an affine sampler makes of normal noise: columns from basis vectors."""
    dims, steps = math.prod(shape), len(levels) - 1
    n = 1 + dims * (1 + steps * solver.draws)
    fresh = torch.eye(n, dtype=F64)[:, 1:].reshape(n, 1 + steps * solver.draws, *shape).movedim(1, 0)
    numbers = iter(fresh[1:].reshape(steps, solver.draws, n, *shape))
    *_, last = trajectory(denoise, solver, levels, fresh[0], lambda _: next(numbers))
    columns = (last.x[1:] - last.x[0]).flatten(1)
    return last.x[0], columns.T @ columns


# --- as functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nudge", [0.05, None])
@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", OPERATORS)
def test_mmps_is_the_posterior_mean_of_gaussian_data(name, process, std, nudge):
    operator, (schedule, times) = OPERATORS[name], SCHEDULES[process]
    y = random(1, *operator.seen, seed=6)
    exact = bayes(operator, y, std)
    guided = MMPS(DATA.denoiser(schedule), Observation(operator, y, std), iterations=3 * D, nudge=nudge)
    assert guided.schedule is schedule
    for t in times:
        if (t, std) == (1e-5, 0.0):
            continue  # where the rounding of a singular covariance shows in the reference
        level = schedule(t)
        x_t = level.alpha * random(5, *SHAPE, seed=7) + level.sigma * random(5, *SHAPE, seed=8)
        with torch.no_grad():
            x, eps, nu = guided(x_t, level)
        expected = exact.predict(x_t, level)
        torch.testing.assert_close(x, expected.x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(level.alpha * x + level.sigma * eps, x_t, rtol=1e-9, atol=1e-9)
        assert nu is None
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
    x_t, seen = random(5, *SHAPE), Observation(operator, y, std)
    torch.testing.assert_close(PiGDM(data.denoiser(schedule), seen, d)(x_t, level).x, exact.predict(x_t, level).x)
    for wrong in (PiGDM(data.denoiser(schedule), seen, 1.0), PiGDM(DATA.denoiser(schedule), seen, d)):
        against = exact if wrong.denoise.data is data else bayes(operator, y, std)
        assert float((wrong(x_t, level).x - against.predict(x_t, level).x).abs().max()) > 0.01


def test_dps_is_the_gradient_of_the_likelihood_of_the_mean():
    """x̂ − (sigma²/alpha) ∇‖y − A x̂‖²/(2 noise_std²) by automatic differentiation of that very norm."""
    operator, schedule = OPERATORS["matrix"], S.LinearLogSNR()
    denoise, level, y = DATA.denoiser(schedule), schedule(0.4), random(5, 3, seed=6)
    x_t = random(5, *SHAPE).requires_grad_()
    distance = (y - operator(denoise(x_t, level).x)).square().sum(1)
    score = torch.autograd.grad(-distance.sum() / (2 * 0.3**2), x_t)[0]
    guided = DPS(denoise, Observation(operator, y, 0.3))(x_t.detach(), level)
    torch.testing.assert_close(guided.x, denoise(x_t.detach(), level).x + level.sigma**2 / level.alpha * score)


def test_the_steps_of_dps_are_those_of_its_algorithm():
    """x_s − step ∇‖y − A x̂‖ after the ancestral step without it [Chung23 alg. 1]."""
    operator, schedule = OPERATORS["pool"], S.linear(50)
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


def test_dps_without_noise_or_aim_is_refused():
    denoise, seen = DATA.denoiser(S.linear()), Observation(OPERATORS["identity"], MEAN[None])
    with pytest.raises(ConfigError, match=r"error\[DPS\] noise_std = 0: .* there is no noise"):
        DPS(denoise, seen)(MEAN[None], S.linear()(0.5))
    with pytest.raises(ConfigError, match=r"error\[DPS\] step = 2: .* only one is given"):
        DPS(denoise, seen, 2.0)(MEAN[None], S.linear()(0.5))
    exact = DPS(denoise, Observation(OPERATORS["identity"], denoise(MEAN[None], S.linear()(0.5)).x), 2.0)
    assert torch.isfinite(exact(MEAN[None], S.linear()(0.5), to=S.linear()(0.4)).x).all()  # nothing is left to fit


KINDS = {
    "mmps": lambda denoise, seen: MMPS(denoise, seen),
    "pigdm": lambda denoise, seen: PiGDM(denoise, seen),
    "dps": lambda denoise, seen: DPS(denoise, seen._replace(noise_std=seen.noise_std or 0.1)),
    "dps step": lambda denoise, seen: DPS(denoise, seen, 1.0),
    "by autograd": lambda denoise, seen: MMPS(denoise, seen, nudge=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_signal_the_prediction_is_left_as_it_is(kind):
    schedule = S.Flow()
    for std in (0.0, 0.2):
        seen = Observation(OPERATORS["mask"], random(1, 3), std)
        guided = KINDS[kind](DATA.denoiser(schedule), seen)
        x, eps, _ = guided(random(2, *SHAPE), schedule(1.0), to=schedule(0.9))
        torch.testing.assert_close([x, eps], [*DATA.predict(random(2, *SHAPE), schedule(1.0))[:2]])
        both = schedule(torch.tensor([1.0, 0.5], dtype=F64))
        assert torch.isfinite(guided(random(2, *SHAPE), both, to=schedule(0.2)).x).all()


class Net(nn.Module):
    """A small network of y, and of a number between the variances, told a label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D + 2, 16), nn.SiLU(), nn.Linear(16, 2 * D))

    def forward(self, x, time, cond=None):
        told = torch.zeros(len(x)) if cond is None else cond.label.float()
        facts = torch.stack([time.to(x), told.to(x)], 1)
        return self.layers(torch.cat([x.flatten(1), facts], 1)).reshape(len(x), 2 * x.shape[1], *x.shape[2:])


@pytest.mark.parametrize("target", ["v", "x", "eps"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_networks_from_one_end_to_the_other(kind, target):
    schedule = S.LinearLogSNR()
    denoise = NetworkDenoiser(Net(), schedule, TARGETS[target], Preconditioning(), learned_variance=True)
    guided = Clipped(KINDS[kind](denoise, Observation(OPERATORS["mask"], torch.zeros(1, 3))))
    levels = grid(schedule, 20)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = guided.denoise(x, levels[3], Condition(label=torch.tensor([0, 1, 2])), levels[4])
        *_, last = trajectory(guided, DDIM(), levels, x, lambda n: x.new_empty(n, *x.shape))
    assert last.x.dtype == torch.float32
    assert torch.isfinite(last.x).all()
    with torch.no_grad():
        plain = denoise(x, levels[3], Condition(label=torch.tensor([0, 1, 2])), levels[4])
    torch.testing.assert_close(told.nu, plain.nu)
    assert not told.nu.requires_grad
    assert all(p.grad is None for p in denoise.network.parameters())
    assert not torch.allclose(told.x[1:], guided.denoise(x, levels[3], to=levels[4]).x[1:])


def test_the_network_is_called_with_what_the_solver_says():
    """Once for x̂ and once for each product with J, or only once with autograd."""
    t, s = S.linear()(0.5), S.linear()(0.4)
    cond = Condition(label=torch.tensor([3]))
    for nudge, calls in ((0.05, 1 + 4 + 1), (None, 1)):
        spy = Spy(DATA.denoiser(S.linear()))
        MMPS(spy, Observation(OPERATORS["mask"], random(1, 3)), 4, nudge=nudge)(MEAN[None], t, cond, s)
        assert len(spy.seen) == calls
        assert torch.equal(spy.seen[0][0], MEAN[None])
        assert all(told == [t, cond, s] for _, *told in spy.seen)


def test_a_nudge_is_a_share_of_sigma():
    """And so a network that is rough on a smaller scale is seen as smooth, which its gradient does not."""
    schedule = S.LinearLogSNR()
    level, x_t = schedule(0.5), random(2, *SHAPE)
    spy = Spy(DATA.denoiser(schedule))
    MMPS(spy, Observation(OPERATORS["matrix"], random(2, 3)), 2, nudge=0.1)(x_t, level)
    for moved, *_ in spy.seen[1:]:
        sizes = (moved - x_t).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(sizes, (0.1 * level.sigma).expand(2))


@pytest.mark.parametrize("nudge", [0.05, None])
def test_gradients_are_there_where_they_are_asked_for(nudge):
    """Finite where nothing is left to fit; and not within no_grad, whatever x_t carries from outside."""
    denoise, level = DATA.denoiser(S.linear()), S.linear()(0.5)
    x_t = random(2, *SHAPE).requires_grad_()
    y = OPERATORS["mask"](denoise(x_t, level).x).detach()
    y[1] += 1.0
    guided = MMPS(denoise, Observation(OPERATORS["mask"], y, 0.1), 3, nudge=nudge)
    found = torch.autograd.grad(guided(x_t, level).x.sum(), x_t)[0]
    exact = bayes(OPERATORS["mask"], y[1:], 0.1)  # affine in x_t, of a slope that y has no part in
    expected = torch.autograd.grad(exact.predict(x_t, level).x.sum(), x_t)[0]
    torch.testing.assert_close(found[1], expected[1])
    assert torch.isfinite(found[0]).all()
    with torch.no_grad():
        x, eps, _ = guided(x_t, level)
    assert [x.requires_grad, eps.requires_grad] == [False, False]


def test_a_posterior_of_no_kind_is_none():
    with pytest.raises(NotImplementedError):
        Posterior(DATA.denoiser(S.linear()), Observation(OPERATORS["identity"], MEAN[None]))(
            MEAN[None], S.linear()(1.0)
        )


# --- conjugate gradients ----------------------------------------------------------------------------------------------


def test_conjugate_gradients_solve_in_as_many_iterations_as_there_are_numbers():
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
        torch.testing.assert_close(v[4], right[4].double() * 5 / 3.9)  # one step, and the next would rise for ever


# --- as samplers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(), DDIM(0.5)])
@pytest.mark.parametrize("name", ["mask", "matrix"])
def test_samples_have_the_law_of_those_from_the_exact_posterior(name, solver):
    """MMPS makes of any solver the sampler of the data given y: the same mean and covariance to 1e-8, at any steps."""
    operator, schedule = OPERATORS[name], S.cosine(20)
    y = random(1, 3, seed=6)
    exact = bayes(operator, y, 0.3).denoiser(schedule)
    guided = MMPS(DATA.denoiser(schedule), Observation(operator, y, 0.3), 3 * D)
    for found, expected in zip(*(law(solver, d, grid(schedule)) for d in (guided, exact)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


PAIR = GaussianData(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64))
"""Two numbers of correlation 0.9; the first, seen as 1 with noise of variance ¼, leaves them this law:"""
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
def test_how_far_each_method_is_from_the_law_given_y(kind, std):
    """MMPS and the exact denoiser share the small variance's error; PiGDM and DPS have a bias of their own."""
    schedule, seen = S.cosine(100), Observation(FIRST, torch.ones(1, 1, dtype=F64), std)
    mean, cov = law(Ancestral(), QUICK[kind](PAIR.denoiser(schedule), seen), grid(schedule), (2,))
    for found, true, bias in zip((mean, cov), AFTER if std else KNOWN, BIASES[kind, std], strict=True):
        torch.testing.assert_close(found - true, torch.tensor(bias, dtype=F64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("nudge", [0.05, None])
def test_the_likelihood_given_y_is_that_of_the_posterior(nudge):
    """The flow of the posterior denoiser has the density p(x given y); gradients go through the conjugate gradients."""
    schedule = S.LinearLogSNR(high=14.0, low=-30.0)
    guided = MMPS(PAIR.denoiser(schedule), Observation(FIRST, torch.ones(1, 1, dtype=F64), 0.5), 1, nudge=nudge)
    top, clean = finite_ends(schedule)
    exact = GaussianData(*AFTER)
    x = exact.sample(3, torch.Generator().manual_seed(0))
    expected = exact.log_density(clean.alpha * x, clean) + 2 * torch.log(clean.alpha)
    torch.testing.assert_close(-ode_nll(guided, x, top, clean).total, expected, rtol=1e-4, atol=1e-4)


def test_more_than_gaussian_data():
    """On a mixture, nearer to the data that were seen than the others: 4000 of them, the same for all."""
    means = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=F64)
    data, schedule = MixtureData(torch.ones(2), means, PAIR.cov.expand(2, 2, 2)), S.LinearLogSNR()
    level, x = schedule(0.7), data.sample(4000, torch.Generator().manual_seed(0))
    seen = Observation(FIRST, FIRST(x) + 0.3 * random(4000, 1, seed=1), 0.3)
    x_t = level.alpha * x + level.sigma * random(4000, 2, seed=2)
    denoisers = {kind: build(data.denoiser(schedule), seen) for kind, build in QUICK.items()}
    denoisers["none"] = data.denoiser(schedule)
    error = {kind: float((denoise(x_t, level).x - x).square().mean()) for kind, denoise in denoisers.items()}
    assert error["mmps"] < 0.95 * min(error["pigdm"], error["dps"])
    assert error["mmps"] < 0.8 * error["none"]


def test_samples_have_the_law_given_y():
    """And so the closed form itself, in many steps: the error of the first-order flow falls with their number."""
    errors = []
    for steps in (50, 100, 200):
        schedule = S.LinearLogSNR(high=12.0, low=-12.0)
        guided = MMPS(PAIR.denoiser(schedule), Observation(FIRST, torch.ones(1, 1, dtype=F64), 0.5), 1)
        found = law(DDIM(), guided, grid(schedule, steps), (2,))
        errors.append(max(float((one - true).abs().max()) for one, true in zip(found, AFTER, strict=True)))
    assert errors[2] < 0.02
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]

"""The loss in continuous time, and the gradients of a learned schedule."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import gaussian_kl, gaussian_log_prob

from undiffuse.denoising.denoiser import Prediction
from undiffuse.model import losses
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.gaussian import diffuse
from undiffuse.process.learned_schedule import LearnedSchedule

tensor = partial(torch.tensor, dtype=torch.float64)
MEAN, VAR = tensor([0.5, -1.0, 0.0]), tensor([0.05, 2.0, 0.6])


def exact(x_t, level, mean=MEAN, var=VAR):
    """The exact denoiser of N(mean, var), differentiable w.r.t. the level."""
    at = level.broadcast_like(x_t)
    eps = at.sigma * (x_t - at.alpha * mean) / (at.alpha**2 * var + at.sigma**2)
    return Prediction((x_t - at.sigma * eps) / at.alpha, eps)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_schedule(seed=0, **settings):
    schedule = LearnedSchedule(**({"high": 6.0, "low": -4.0, "width": 5} | settings))
    with torch.no_grad():
        schedule.log_slopes.normal_(generator=torch.Generator().manual_seed(seed))
    return schedule


def loss_and_shape(schedule, x, at, eps):
    """(loss (B,), shape) of items x at the times ``at``, with the schedule's graph."""
    shape = schedule.shape(at)
    t, rate = schedule.levels_from_shape(at, *shape)
    return losses.continuous(exact(diffuse(x, t, eps), t).eps, targets.build("eps"), x, eps, rate, t), shape


@pytest.mark.parametrize("schedule", [S.LinearLogSNR(), S.Flow(), S.VarianceExploding(), DS.cosine(100)])
@pytest.mark.parametrize("name", ["x", "eps", "v", "flow", "edm"])
def test_it_is_half_the_rate_of_log_snr_times_the_error_in_any_frame(name, schedule):
    at, x, eps = tensor([0.03, 0.4, 0.97]), noise(3, 3), noise(3, 3, seed=1)
    t, rate, target = schedule(at), schedule.log_snr_rate(at), targets.build(name)
    x_t = diffuse(x, t, eps)
    prediction = exact(x_t, t)
    loss = losses.continuous(target.combine(*prediction[:2], t), target, x, eps, rate, t)
    torch.testing.assert_close(loss, -0.5 * rate * ((eps - prediction.eps) ** 2).mean(1), rtol=1e-9, atol=1e-12)


def test_the_endpoint_loss_is_prior_and_decoder():
    schedule, x, eps = S.LinearLogSNR(5.0, -3.0), noise(4, 3), noise(4, 3, seed=1)
    top, clean = schedule(1.0), schedule(0.0)
    prior = gaussian_kl(top.alpha * x, top.sigma**2 + 0 * x, 0 * x, 1 + 0 * x)
    z = x + clean.sigma / clean.alpha * eps
    density = -gaussian_log_prob(x, z, tensor(math.exp(-5.0)))
    torch.testing.assert_close(losses.endpoint_loss(x, eps, top, clean), (prior + density).mean(1), rtol=1e-9, atol=0)
    decode = lambda x, z, level: -3 * x.double() + z / level.alpha  # noqa: E731
    loss = losses.endpoint_loss(x.float(), eps.float(), top, clean, decode)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, (prior + 3 * x - z).mean(1), rtol=1e-5, atol=1e-6)


def numerical_gradient(function, parameter, h=1e-5):
    """d function/d parameter by central differences."""
    gradient = torch.zeros_like(parameter).view(-1)
    for i in range(parameter.numel()):
        for sign in (1, -1):
            parameter.data.view(-1)[i] += sign * h
            gradient[i] += sign * function().detach() / (2 * h)
            parameter.data.view(-1)[i] -= sign * h
    return gradient.view_as(parameter)


def test_one_backward_pass_gives_the_gradients_of_squared_loss_to_shape_and_of_bound_to_ends():
    schedule, n = random_schedule(), 40
    at, x, eps = (torch.arange(n).double() + 0.5) / n, noise(n, 3), noise(n, 3, seed=1)

    def bound():
        one = torch.ones((), dtype=torch.float64)
        return loss_and_shape(schedule, x, at, eps)[0] + losses.endpoint_loss(x, eps, schedule(one), schedule(0 * one))

    loss, shape = loss_and_shape(schedule, x, at, eps)
    total = loss + losses.endpoint_loss(x, eps, schedule(1.0), schedule(0.0))
    losses.reweight_schedule_gradient(loss, shape)
    total.mean().backward()
    square = numerical_gradient(lambda: (loss_and_shape(schedule, x, at, eps)[0] ** 2).mean(), schedule.log_slopes)
    torch.testing.assert_close(schedule.log_slopes.grad, square, rtol=1e-6, atol=1e-8)
    for end in (schedule.high, schedule.low):
        torch.testing.assert_close(end.grad, numerical_gradient(lambda: bound().mean(), end), rtol=1e-6, atol=1e-8)
    plain = torch.autograd.grad(loss_and_shape(schedule, x, at, eps)[0].mean(), schedule.log_slopes)[0]
    assert float((plain - square).abs().max()) > 0.1 * float(
        square.abs().max()
    )  # the two gradients differ, so the test can tell them apart


def test_a_schedule_without_a_graph_gets_no_hooks():
    with torch.no_grad():
        losses.reweight_schedule_gradient(
            *loss_and_shape(random_schedule(), noise(2, 3), tensor([0.1, 0.9]), noise(2, 3))
        )


def quadrature(n=200):
    nodes, weights = (tensor(v) for v in np.polynomial.legendre.leggauss(n))
    return (nodes + 1) / 2, weights / 2


def expected(schedule, power, mean=MEAN, var=VAR):
    """E loss^power over data, eps and t by quadrature: eps − ε̂ is N(0, v) per dimension, v = SNR var/(1 + SNR var)."""
    at, weights = quadrature()
    snr = torch.exp(schedule(at).log_snr)[:, None]
    v = snr * var / (1 + snr * var)
    error = v.mean(1) if power == 1 else v.mean(1) ** 2 + 2 * (v**2).sum(1) / len(var) ** 2
    return weights @ ((-0.5 * schedule.log_snr_rate(at)) ** power * error)


def test_the_mean_of_the_loss_depends_on_the_ends_only():
    """So the gradient of the mean square is that of the variance. Its derivative by an end is half the error there."""
    schedule = random_schedule()
    bound = expected(schedule, 1)
    shape, high, low = torch.autograd.grad(bound, [schedule.log_slopes, schedule.high, schedule.low])
    assert float(shape.abs().max()) < 1e-9
    error = lambda log_snr: (math.exp(log_snr) * VAR / (1 + math.exp(log_snr) * VAR)).mean()  # noqa: E731
    torch.testing.assert_close(high, 0.5 * error(6.0), rtol=1e-8, atol=0)
    torch.testing.assert_close(low, -0.5 * error(-4.0), rtol=1e-8, atol=0)
    assert float(torch.autograd.grad(expected(schedule, 2), schedule.log_slopes)[0].abs().max()) > 0.1


def test_training_the_shape_reduces_the_variance_towards_its_minimum():
    """300 steps of Adam on the shape only, 64 random items each, with the exact denoiser; takes a second.

    The density of log_snr with the least E loss² is proportional to √E error², which leaves ¼ (∫ √E error² d log_snr)².
    For 32 dimensions with variances from 0.02 to 2 between log_snr 12 and −9 the variance of the one-point estimate
    is 0.887 times its squared mean at the start, 0.067 at best, and 0.100 at the end.
    """
    var = torch.logspace(math.log10(0.02), math.log10(2), 32, dtype=torch.float64)
    schedule = LearnedSchedule(12.0, -9.0, ends="fixed")
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    mean = 0 * var

    def relative():
        with torch.no_grad():
            return float(expected(schedule, 2, mean, var) / expected(schedule, 1, mean, var) ** 2 - 1)

    at, weights = quadrature()
    snr = torch.exp(12.0 - 21.0 * at)[:, None]
    v = snr * var / (1 + snr * var)
    root = torch.sqrt(v.mean(1) ** 2 + 2 * (v**2).sum(1) / 32**2)
    best = float((weights @ root) ** 2 / (weights @ v.mean(1)) ** 2 - 1)
    start = relative()
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        x = var.sqrt() * torch.randn(64, 32, generator=g, dtype=torch.float64)
        u = (torch.rand((), generator=g, dtype=torch.float64) + torch.arange(64)) / 64
        shape = schedule.shape(u)
        t, rate = schedule.levels_from_shape(u, *shape)
        eps = torch.randn(64, 32, generator=g, dtype=torch.float64)
        prediction = exact(diffuse(x, t, eps), t, mean, var)
        loss = losses.continuous(prediction.eps, targets.build("eps"), x, eps, rate, t)
        losses.reweight_schedule_gradient(loss, shape)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (start, best) == (pytest.approx(0.887, abs=1e-3), pytest.approx(0.0673, abs=1e-4))
    assert best < relative() < 0.12

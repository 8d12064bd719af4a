"""The likelihood by the probability flow against exact densities."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import EmpiricalData, GaussianData, MixtureData, Spy, gaussian_kl, gaussian_log_prob
from scipy.linalg import hadamard
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning, Prediction
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.likelihood.decoder import ValueSoftmax
from undiffuse.likelihood.dequantization import ForwardNoise
from undiffuse.likelihood.probability_flow import divergence, integrate_flow, ode_nll
from undiffuse.networks.condition import Condition
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.ode_integrator import Integrator, flow_time, log_snr_at_flow_time
from undiffuse.process.prior import prior_kl, prior_log_prob
from undiffuse.process.seeded_noise import ItemNoise

tensor = partial(torch.tensor, dtype=torch.float64)
TIGHT = Integrator(rtol=5e-7, atol=5e-7)
BIT = math.log(2)
MEAN, VAR = tensor([0.5, -1.0]), tensor([0.05, 4.0])
GAUSS = GaussianData(MEAN, VAR)
SCHEDULES = {
    "linear log-SNR": (S.LinearLogSNR(), 1.0, None),
    "exploding": (S.VarianceExploding(), 1.0, None),
    "linear": (DS.linear(), 1.0, None),
    "cosine, a sub-range": (DS.cosine(40), 0.9, 0.1),
    "zero terminal, cut": (DS.Tabulated([0.05] * 20 + [1.0]), 20 / 21, None),
    "sigmoid": (S.Sigmoid(), 1.0, None),
    "flow, cut": (S.Flow(), 0.98, 0.02),
    "flow": (S.Flow(), 1.0, None),  # to a level without signal
}


def ends(schedule):
    """(top, clean) at t = 1 and t_min, with finite log-SNR or not."""
    return schedule(1.0), schedule(schedule.t_min)


def mixture(d):
    """Two narrow, correlated components that the flow must merge."""
    numbers = torch.randn(2, d, d + 1, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    covs = 0.2 * numbers[..., :d] @ numbers[..., :d].mT / d + 0.05 * torch.eye(d, dtype=torch.float64)
    return MixtureData(tensor([0.3, 0.7]), numbers[..., d], covs)


def levels_of(name):
    schedule, last, first = SCHEDULES[name]
    return schedule, schedule(last), schedule(schedule.t_min if first is None else first)


def exact(data, x, clean):
    """−log p(x) from the known density of x_0 = alpha_0 x."""
    return -(data.log_density(clean.alpha * x, clean) + x[0].numel() * math.log(clean.alpha))


def items(data, n=3):
    """Samples of the data, and a point away from them."""
    draws = data.sample(n, torch.Generator().manual_seed(1))
    return torch.cat([draws, 1.5 * draws[:1] + 0.3])


# --- exact if the prior is the exact marginal -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "d"), [*((name, 2) for name in SCHEDULES), *(("linear log-SNR", d) for d in (1, 3, 8))]
)
def test_with_the_exact_marginal_as_prior_it_is_exact(name, d):
    schedule, top, clean = levels_of(name)
    data = mixture(d)
    x = items(data)
    run = ode_nll(data.denoiser(schedule), x, top, clean, prior=lambda z: data.log_density(z, top), integrator=TIGHT)
    assert float((run.total - exact(data, x, clean)).abs().max()) / d / BIT < 1e-5
    assert float(run.diffusion_nats.abs().min()) > 0.1  # a flow with divergence


@pytest.mark.parametrize("name", ["cosine, a sub-range", "exploding"])
def test_gaussian_data_follow_the_closed_form(name):
    schedule, top, clean = levels_of(name)
    x_s = clean.alpha * items(GAUSS)
    end = integrate_flow(GAUSS.denoiser(schedule), x_s, clean, top, integrator=TIGHT)
    torch.testing.assert_close(end.x, GAUSS.flow(x_s, clean, top), rtol=1e-4, atol=1e-4 * float(top.sigma))
    log_det = 0.5 * torch.log(GAUSS.marginal_var(top) / GAUSS.marginal_var(clean)).sum()
    assert float((end.log_det - log_det).abs().max()) / 2 / BIT < 5e-6
    assert end.calls.dtype == torch.int64
    assert end.calls.shape == (4,)


def test_the_parts():
    _, top, clean = levels_of("flow, cut")
    x, denoise = items(mixture(2)), mixture(2).denoiser(S.Flow())
    end = integrate_flow(denoise, clean.alpha * x, clean, top, integrator=TIGHT)
    run = ode_nll(denoise, x, top, clean, integrator=TIGHT)
    torch.testing.assert_close(run.prior, -gaussian_log_prob(end.x, 0.0, tensor(0.98**2)).sum(1))
    torch.testing.assert_close(run.diffusion_nats, -end.log_det)
    torch.testing.assert_close(run.decoder, torch.full((4,), -2 * math.log(0.98), dtype=torch.float64))
    assert run.calls == math.ceil(end.calls.double().mean())
    assert len(set(end.calls.tolist())) > 1
    assert run.per_step.shape == (4, 0)
    assert float(run.stderr) == pytest.approx(float(run.total.std()) / 2)


@pytest.mark.parametrize("name", ["cosine, a sub-range", "exploding", "flow, cut"])
def test_another_prior_costs_its_divergence_from_the_marginal(name):
    """At every x it costs log q(x_1) − log p(x_1); on average KL(q(x_1) to p), at most the bound's prior term."""
    schedule, top, clean = levels_of(name)
    spread = GAUSS.marginal_var(clean).sqrt() / clean.alpha
    x = torch.stack([MEAN + spread, MEAN - spread])  # terms are quadratic, so their mean is the mean over the data
    denoise = GAUSS.denoiser(schedule)
    scale = 1.0 if name == "cosine, a sub-range" else float(top.sigma)
    reached = []

    def prior(z):
        reached.append(z)
        return prior_log_prob(z, top)

    gap = ode_nll(denoise, x, top, clean, prior=prior, integrator=TIGHT).total - exact(GAUSS, x, clean)
    pointwise = GAUSS.log_density(reached[0], top) - gaussian_log_prob(reached[0], 0.0, tensor(scale**2)).sum(1)
    torch.testing.assert_close(gap, pointwise, rtol=0, atol=1e-4)
    kl = gaussian_kl(top.alpha * MEAN, GAUSS.marginal_var(top), 0 * MEAN, torch.full_like(MEAN, scale**2)).sum()
    assert float(gap.mean()) == pytest.approx(float(kl), abs=1e-4)
    at_data = MEAN + tensor([[1.0], [-1.0]]) * VAR.sqrt()
    assert 0 < float(kl) < float(prior_kl(at_data, top).sum(1).mean())


def test_priors():
    x = tensor([[1.0, -2.0], [0.5, 0.0]])
    own = Gaussian(tensor([0.3, 0.1]), tensor([0.2, -0.4]))
    by_hand = gaussian_log_prob(x, own.mean, own.log_var.exp()).sum(1)
    level = S.VarianceExploding(0.01, 50.0)(1.0)
    torch.testing.assert_close(prior_log_prob(x, level, own), by_hand)
    torch.testing.assert_close(prior_log_prob(x, level, lambda z: z.sum(1)), x.sum(1))
    torch.testing.assert_close(prior_log_prob(x, level), gaussian_log_prob(x, 0.0, tensor(2500.0)).sum(1))
    torch.testing.assert_close(prior_log_prob(x, DS.cosine()(1.0)), gaussian_log_prob(x, 0.0, tensor(1.0)).sum(1))


def test_a_density_integrates_to_one():
    """The default prior differs from the marginal, so this density differs from that of the data."""
    data, (top, clean) = mixture(1), ends(S.LinearLogSNR(high=6.0, low=-1.0))
    x = torch.linspace(-12, 12, 801, dtype=torch.float64)[:, None]
    run = ode_nll(data.denoiser(S.LinearLogSNR(high=6.0, low=-1.0)), x, top, clean)
    mass = torch.trapezoid(torch.exp(-run.total), x[:, 0])
    assert float(mass) == pytest.approx(1, abs=1e-5)
    assert float((run.total - exact(data, x, clean)).abs().max()) > 0.1


def test_only_the_ends_of_a_schedule_matter():
    data, x = mixture(2), items(mixture(2))
    high, low = 3.0, -2.0
    runs = []
    learned = S.build("learned")  # its levels are in a graph
    learned.log_slopes.data = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for schedule in (S.LinearLogSNR(), DS.cosine(100), learned):
        top, clean = (schedule(schedule.inverse(v)) for v in (low, high))
        runs.append(ode_nll(data.denoiser(schedule), x, top, clean, integrator=TIGHT).total)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-4)


# --- integrators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
def test_order(method, order):
    data, schedule = mixture(1), S.LinearLogSNR(high=3.0, low=-3.0)
    top, clean = ends(schedule)
    x = items(data)
    goal, steps, errors = exact(data, x, clean), 2 ** np.arange(4, 7), []
    for n in steps:
        run = ode_nll(
            data.denoiser(schedule),
            x,
            top,
            clean,
            prior=lambda z: data.log_density(z, top),
            integrator=Integrator(method, num_steps=int(n)),
        )
        errors.append(float((run.total - goal).norm()))
        assert run.calls == n * order
    logs = np.log2(steps), np.log2(errors)
    assert abs(-np.polyfit(*logs, 1)[0] - order) < 0.15
    assert np.corrcoef(*logs)[0, 1] ** 2 >= 0.995


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_the_tolerance_is_kept(tol):
    schedule, top, clean = levels_of("linear log-SNR")
    data = mixture(2)
    x = items(data)[:3]
    run = ode_nll(
        data.denoiser(schedule),
        x,
        top,
        clean,
        prior=lambda z: data.log_density(z, top),
        integrator=Integrator(rtol=tol, atol=tol),
    )
    assert float((run.total - exact(data, x, clean)).abs().max()) / 2 < 20 * tol


def test_an_item_does_not_depend_on_its_batch():
    """Item 1 lies between two data points and needs more calls than item 0, which lies at one."""
    data, schedule = EmpiricalData(tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.4]])), S.LinearLogSNR(high=4.0, low=-4.0)
    top, clean = ends(schedule)
    x = tensor([[-1.0, 0.0], [1e-4, 0.05], [1.0, 0.2]])
    flow = partial(integrate_flow, data.denoiser(schedule), s=clean, t=top)
    together = flow(x)
    assert 1.5 * int(together.calls[0]) < int(together.calls[1])
    for i in range(3):
        alone = flow(x[i : i + 1])
        assert int(alone.calls) == int(together.calls[i])
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone.log_det[0], together.log_det[i], rtol=1e-11, atol=1e-11)


# --- the trace -----------------------------------------------------------------------------------------------------


def test_probes_are_unbiased_and_independent_of_the_batch():
    """With fixed steps the estimate is unbiased. 6000 items, |z| < 4.89: one false alarm in 1e6 seeds.

    The standard error is 0.2 % of the divergence's integral: a bias of 1 % is 5 standard errors and is found in more
    than half of all cases, a bias of 2 % always.
    """
    data, (schedule, top, clean) = mixture(3), levels_of("linear log-SNR")
    denoise, x, few = data.denoiser(schedule), items(data)[:1], Integrator("rk4", num_steps=6)
    exact_steps = float(ode_nll(denoise, x, top, clean, integrator=few).diffusion_nats)
    noise = ItemNoise(0, range(6000), (3,), "bound")
    run = ode_nll(denoise, x.expand(6000, -1), top, clean, noise, trace="hutchinson", integrator=few)
    error = float(run.diffusion_nats.std()) / math.sqrt(6000)
    assert error < 0.003 * abs(exact_steps)
    assert abs(float(run.diffusion_nats.mean()) - exact_steps) < 4.89 * error
    again = ItemNoise(0, [4321], (3,), "bound")
    alone = ode_nll(denoise, x, top, clean, again, trace="hutchinson", integrator=few)
    torch.testing.assert_close(alone.total, run.total[4321:4322], rtol=1e-12, atol=0)


def test_a_probe_is_constant_along_the_path_and_several_are_averaged():
    data, (schedule, top, clean) = mixture(3), levels_of("linear log-SNR")
    denoise, x = data.denoiser(schedule), items(data)
    draws = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(3))
    few = Integrator("rk4", num_steps=6)

    def run(which, probes):
        noise = lambda n: draws[which][:n]  # noqa: E731
        return ode_nll(denoise, x, top, clean, noise, trace="hutchinson", probes=probes, integrator=few).diffusion_nats

    alone = torch.stack([run([i], 1) for i in range(4)])
    assert float(alone.std(0).min()) > 1e-3
    torch.testing.assert_close(run([0, 1, 2, 3], 4), alone.mean(0), rtol=1e-12, atol=1e-12)


def test_one_probe_is_exact_on_independent_dimensions():
    schedule, top, clean = levels_of("exploding")
    x, denoise = items(GAUSS), GAUSS.denoiser(schedule)
    few = Integrator("heun", num_steps=9)
    noise = ItemNoise(5, range(4), (2,))
    by_probe = ode_nll(denoise, x, top, clean, noise, trace="hutchinson", integrator=few)
    torch.testing.assert_close(
        by_probe.total, ode_nll(denoise, x, top, clean, integrator=few).total, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"trace": "hutchinson"}, "no noise to estimate it from"),
        ({"trace": "skilling", "noise": ItemNoise(0, range(4), (2,))}, "no such trace"),
        ({"trace": "hutchinson", "probes": 0, "noise": ItemNoise(0, range(4), (2,))}, "no such trace"),
    ],
)
def test_invalid_traces_are_refused(settings, cause):
    _, top, clean = levels_of("linear")
    with pytest.raises(ConfigError, match=cause) as error:
        ode_nll(GAUSS.denoiser(DS.linear()), items(GAUSS), top, clean, **settings)
    assert error.value.code == "TRACE"


def test_the_exact_trace_of_large_items_is_refused_before_any_call():
    _, top, clean = levels_of("linear")
    spy = Spy(GAUSS.denoiser(DS.linear()))
    with pytest.raises(ConfigError, match="Use trace='hutchinson'"):
        ode_nll(spy, torch.zeros(2, 1, 65, 65), top, clean)
    assert not spy.seen


# --- networks ------------------------------------------------------------------------------------------------------


def random_weights(network, scale):
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return network.eval()


def test_the_log_determinant_of_a_random_network_is_that_of_its_map():
    """The Jacobian of the whole map by central differences, without traces."""
    schedule = S.LinearLogSNR(high=3.0, low=-2.0)
    network = random_weights(MLP(2, width=8, depth=1).double(), 0.6)
    denoise = NetworkDenoiser(network, schedule, targets.build("v"), Preconditioning())
    top, clean = ends(schedule)
    x, h = tensor([[0.4, -0.9]]), 1e-4
    around = torch.cat([x, x + tensor([[h, 0], [-h, 0], [0, h], [0, -h]])])
    end = integrate_flow(denoise, around, clean, top, integrator=Integrator(rtol=1e-8, atol=1e-8))
    jacobian = torch.stack([end.x[1] - end.x[2], end.x[3] - end.x[4]], 1) / (2 * h)
    assert float(end.log_det[0]) == pytest.approx(float(torch.log(torch.det(jacobian))), abs=1e-5)
    assert not any(p.grad is not None for p in network.parameters())
    assert not end.log_det.requires_grad


def test_the_divergence_of_a_unet_with_attention_is_the_trace_of_its_jacobian():
    schedule = S.LinearLogSNR()
    network = random_weights(UNet(1, widths=[4, 8], blocks=1, attention=[0, 1]), 0.3)
    denoise = NetworkDenoiser(network, schedule, targets.build("v"), Preconditioning())
    top, clean = ends(schedule)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    level = schedule(torch.tensor([0.4, 0.7]))

    def v(flat):
        with sdpa_kernel(SDPBackend.MATH):
            return network(flat.reshape(-1, 1, 4, 4), level.log_snr.float(), None).flatten(1)

    at = x.flatten(1).requires_grad_()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row, t: _one(network, row, t)))(at, level.log_snr.float())
    torch.testing.assert_close(divergence(v(at), at), jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-4, atol=1e-4)
    probes = torch.from_numpy(hadamard(16)).reshape(16, 1, 1, 4, 4).expand(-1, 2, -1, -1, -1)  # HᵀH = 16 I
    few = Integrator("heun", num_steps=1)
    exact_trace = ode_nll(denoise, x.detach(), top, clean, integrator=few)
    by_probe = ode_nll(denoise, x.detach(), top, clean, lambda n: probes, trace="hutchinson", probes=16, integrator=few)
    torch.testing.assert_close(by_probe.diffusion_nats, exact_trace.diffusion_nats, rtol=1e-5, atol=1e-4)
    assert float(exact_trace.diffusion_nats.abs().min()) > 0.1


def _one(network, row, t):
    with sdpa_kernel(SDPBackend.MATH):
        return network(row.reshape(1, 1, 4, 4), t[None], None).flatten()


def test_the_denoiser_gets_levels_of_its_schedule_conditions_and_dtype():
    label = torch.tensor([7, 8, 9, 6])
    calls = []

    class Checked(nn.Module):
        schedule = DS.cosine(20)

        def forward(self, x_t, level, cond=None, next_level=None):
            assert next_level is None
            assert x_t.dtype == torch.float32
            on = self.schedule(level.t)
            for field in ("alpha", "sigma", "log_snr"):
                assert torch.equal(getattr(level, field), getattr(on, field))
            calls.append((level.log_snr, cond.label))
            return data.denoiser(self.schedule)(x_t, level)

    data, (top, clean) = mixture(2), ends(DS.cosine(20))
    x = items(data)
    run = ode_nll(Checked(), x.float(), top, clean, cond=Condition(label=label))
    expected = ode_nll(data.denoiser(DS.cosine(20)), x, top, clean)
    torch.testing.assert_close(run.total, expected.total, rtol=1e-4, atol=1e-4)
    assert torch.equal(calls[0][1], label)
    assert len(calls[-1][1]) < 4  # only the items that are not finished
    assert sum(len(call_label) for _, call_label in calls) <= 4 * run.calls
    u = torch.cat([flow_time(log_snr) for log_snr, _ in calls])
    assert float(u.min()) == pytest.approx(float(flow_time(clean.log_snr)))
    assert float(u.max()) == pytest.approx(float(flow_time(top.log_snr)))


def test_a_fixed_grid_is_uniform_in_flow_time():
    spy = Spy(GAUSS.denoiser(S.Flow()))
    top, clean = S.Flow()(1.0), S.Flow()(0.1)
    run = ode_nll(spy, items(GAUSS), top, clean, integrator=Integrator("heun", num_steps=4))
    log_snrs = [float(level.log_snr[0]) for _, level, *_ in spy.seen[1:]]  # the first call checks the noisy end
    grid = float(flow_time(clean.log_snr)) * (1 - tensor([0, 1, 1, 2, 2, 3, 3, 4]) / 4)
    assert log_snrs == pytest.approx(log_snr_at_flow_time(grid).tolist())
    assert run.calls == 8


# --- ends ----------------------------------------------------------------------------------------------------------


def test_ends():
    for schedule in (DS.linear(10), S.LinearLogSNR(), S.Flow()):
        top, clean = ends(schedule)
        assert (float(top.t), float(clean.t)) == (1.0, schedule.t_min)


@pytest.mark.parametrize(
    ("schedule", "last", "first", "cause"),
    [
        (DS.linear(10), 1.0, 0.0, "no density at the clean end.* Begin at t = 0.1"),
        (DS.linear(10), 1.0, 0.05, "no density at the clean end"),
        (S.Flow(), 1.0, 1e-6, "no density at the clean end"),
        (S.LinearLogSNR(), 0.2, 0.3, "Exchange the ends"),
        (S.LinearLogSNR(), 0.2, 0.2, "Exchange the ends"),
        (DS.Tabulated([0.1, 0.2, 0.3, 1.0]), 1.0, 0.25, "not continuous in its last step. End at t = 0.75"),
    ],
)
def test_ends_that_the_flow_cannot_reach(schedule, last, first, cause):
    with pytest.raises(ConfigError, match=cause) as error:
        ode_nll(GAUSS.denoiser(schedule), items(GAUSS), schedule(last), schedule(first))
    assert error.value.code == "ODE_END"


def test_without_signal_the_model_must_predict_a_finite_x():
    cond = Condition(label=torch.arange(3))
    batches = []

    class Network(nn.Module):
        def forward(self, x, time, cond):
            batches.append(len(cond.label))
            return torch.tanh(x)

    schedule = S.Flow()
    top, clean = schedule(1.0), schedule(0.3)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))

    def run(target, top):
        denoise = NetworkDenoiser(Network(), schedule, targets.build(target), Preconditioning())
        return ode_nll(denoise, x, top, clean, cond=cond)

    with pytest.raises(ConfigError, match=r"does not predict a finite x .* target 'v' or 'x'"):
        run("eps", top)
    assert batches == [1]
    assert bool(torch.isfinite(run("v", top).total).all())
    assert bool(torch.isfinite(run("eps", schedule(0.999)).total).all())


def test_a_denoiser_that_returns_nan_is_an_error():
    class Broken:
        schedule = S.LinearLogSNR(high=4.0, low=0.0)

        def __call__(self, x_t, level, cond=None, next_level=None):
            x, eps, _ = GAUSS.predict(x_t, level)
            return Prediction(x + torch.where(level.log_snr < 2, math.nan, 0.0)[:, None], eps)

    top, clean = ends(Broken.schedule)
    with pytest.raises(NonFiniteError, match=r"item 0 of the batch: .* log_snr = 2\."):
        ode_nll(Broken(), items(GAUSS)[:2], top, clean)


# --- with a dequantizer --------------------------------------------------------------------------------------------


def test_a_dequantizer_draws_first_and_adds_its_log_density():
    schedule, top, clean = levels_of("linear log-SNR")
    grid = tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    x = grid[torch.tensor([[0, 1], [4, 3]])]
    dequantizer = ForwardNoise(clean, ValueSoftmax(IntegerLevels(5)))
    draws = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(2))
    fresh = iter([draws, torch.ones(2, 2, 2)])
    run = ode_nll(
        GAUSS.denoiser(schedule),
        x,
        top,
        clean,
        lambda n: next(fresh),
        trace="hutchinson",
        probes=2,
        prior=lambda v: GAUSS.log_density(v, top),
        dequantizer=dequantizer,
        integrator=TIGHT,
    )
    assert next(fresh, None) is None
    z, log_q = dequantizer(x, lambda n: draws)
    torch.testing.assert_close(run.total, log_q + exact(GAUSS, z, clean), rtol=0, atol=1e-4)
    torch.testing.assert_close(run.decoder, log_q - 2 * torch.log(clean.alpha))

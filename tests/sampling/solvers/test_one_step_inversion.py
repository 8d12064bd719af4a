"""The forward step solved for its start: exact with the noise of that step, while a chain without noise shrinks."""

import math

import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from solver_table import PROCESSES
from test_affine import CHAINS, COVS, MEAN, D, probe

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import diffuse, forward
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.one_step_inversion import OneStepInversion, invert, step_noise
from undiffuse.sampling.time_grids import time_grid

f64 = torch.float64
PAIRS = {
    "table": (DS.linear()(0.3), DS.linear()(0.299)),
    "sub-grid": (DS.linear()(0.9), DS.linear()(0.2)),
    "to data": (DS.linear()(0.1), DS.linear()(0.0)),
    "exploding": (S.VarianceExploding()(0.8), S.VarianceExploding()(0.7)),
    "flow": (S.Flow()(0.6), S.Flow()(0.5)),
}
pairs = pytest.mark.parametrize(("t", "s"), PAIRS.values(), ids=PAIRS)
FULL = GaussianData(torch.from_numpy(MEAN), torch.from_numpy(COVS["full"]))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


# --- one step ------------------------------------------------------------------------------------------------------


@pairs
def test_with_the_noise_of_the_step_it_is_exact(t, s):
    x_s, eps_t = randn(2, 3, 4)
    torch.testing.assert_close(invert(forward(x_s, s, t).sample(eps_t), eps_t, t, s), x_s, rtol=1e-9, atol=1e-9)


def test_in_the_notation_of_ho():
    """x_{t−1} = (x_t − √β ε_t)/√(1−β), and E[ε_t given x_t, ε] = √(β/(1−ᾱ)) ε."""
    schedule = DS.linear(50)
    beta = schedule.beta.numpy()
    bar = np.cumprod(1 - beta)
    x_t, eps = randn(2, 1, 3)
    for k in (1, 2, 30, 50):
        t, s, b = schedule(k / 50), schedule((k - 1) / 50), beta[k - 1]
        expected = (x_t - math.sqrt(b) * eps) / math.sqrt(1 - b)
        torch.testing.assert_close(invert(x_t, eps, t, s), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(step_noise(eps, t, s), math.sqrt(b / (1 - bar[k - 1])) * eps, rtol=1e-12, atol=0)
    batch = [schedule(torch.tensor(v, dtype=f64)) for v in ([0.5, 1.0], [0.2, 0.6])]
    x, e, z = randn(3, 2, 3)
    whole = invert(x, step_noise(e, *batch, z), *batch)
    for i in range(2):
        t, s = (level.take(i) for level in batch)
        torch.testing.assert_close(whole[i], invert(x[i], step_noise(e[i], t, s, z[i]), t, s))


@pairs
def test_the_step_noise_has_the_distribution_of_the_step(t, s):
    """x_t = r x_s + √v eps_t and x_s = alpha_s x + sigma_s eps_s: (eps, eps_t) are normal with correlation √frac, so
    given eps it is √frac eps, with variance 1 − frac."""
    one = torch.ones(1, 1, dtype=f64)
    v = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    correlation = torch.sqrt(v) / t.sigma  # of sigma_t eps = r sigma_s eps_s + √v eps_t with eps_t
    assert float(step_noise(one, t, s)) == pytest.approx(float(correlation), rel=1e-10)
    spread = step_noise(0 * one, t, s, one)
    assert float(spread**2) == pytest.approx(float(1 - correlation**2), rel=1e-9, abs=1e-12)
    together = step_noise(one, t, s, 2 * one)
    torch.testing.assert_close(together, step_noise(one, t, s) + 2 * spread)


@pairs
def test_the_mean_noise_of_the_step_on_a_mixture(t, s):
    """E[eps_t given x_t] = √frac E[eps given x_t], by quadrature of q(x_s) q(x_t given x_s) over eps_t."""
    data = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.2]]), torch.tensor([[0.04], [0.2]]))
    z = torch.linspace(-12, 12, 4801, dtype=f64)
    for at in (-1.0, 0.1, 0.9):
        x_t = diffuse(torch.full((1, 1), at, dtype=f64), t, torch.full((1, 1), 0.4, dtype=f64))
        r = float(t.alpha / s.alpha)
        std = math.sqrt(float(t.sigma**2) - (r * float(s.sigma)) ** 2)
        log_w = data.log_density((x_t - std * z[:, None]) / r, s) - 0.5 * z**2
        truth = float(torch.softmax(log_w, 0) @ z)
        eps = data.predict(x_t, t).eps
        assert float(step_noise(eps, t, s)) == pytest.approx(truth, rel=1e-9)


@pairs
def test_an_error_in_the_step_before_is_one_in_the_noise_of_the_step(t, s):
    """‖x_s − x̂_s‖² = ((1−α)/α) ‖ε_t − ε̂_t‖² in the notation of Ho, α = (alpha_t/alpha_s)²."""
    x_t, right, wrong = randn(3, 1, 3)
    off = invert(x_t, right, t, s) - invert(x_t, wrong, t, s)
    weight = (t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2) / (t.alpha / s.alpha) ** 2
    torch.testing.assert_close(off**2, weight * (right - wrong) ** 2, rtol=1e-9, atol=0)


# --- chains --------------------------------------------------------------------------------------------------------

WITH_SIGNAL = [name for name in CHAINS if name not in ("zero terminal", "flow")]


def predictor(cov, alpha, sigma):
    """(W, w) of x̂ = W x_t + w."""
    W = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(D))
    return W, MEAN - W @ (alpha * MEAN)


def by_hand(form, alphas, sigmas):
    """(matrix, offset) of the chain in the notation of Ho, α = (alpha_t/alpha_s)²."""
    matrix, offset = np.eye(D), np.zeros(D)
    for k in range(len(alphas) - 1):
        W, w = predictor(COVS["full"], alphas[k], sigmas[k])
        r = alphas[k] / alphas[k + 1]
        variance = sigmas[k] ** 2 - (r * sigmas[k + 1]) ** 2  # 1 − α where variance is preserved
        share = {"printed": 1.0, "scaled": math.sqrt(variance) / sigmas[k]}[form]
        on_eps = -math.sqrt(variance) * share / r
        E, e = (np.eye(D) - alphas[k] * W) / sigmas[k], -alphas[k] * w / sigmas[k]  # ε̂ = E x_t + e
        M = np.eye(D) / r + on_eps * E
        matrix, offset = M @ matrix, M @ offset + on_eps * e
    return matrix, offset


@pytest.mark.parametrize("form", ["scaled", "printed"])
@pytest.mark.parametrize("chain", WITH_SIGNAL)
def test_affine_map(form, chain):
    formula, times = CHAINS[chain]
    schedule = PROCESSES[formula].schedule
    levels, solver = time_grid(schedule, times=times), OneStepInversion(form)
    spy = Spy(FULL.denoiser(schedule))
    result = probe(solver, spy, levels)
    assert len(spy.seen) == solver.calls * (len(times) - 1)
    for (_, level, _, to), t, s in zip(spy.seen, levels[:-1], levels[1:], strict=True):
        assert (level, to) == (t, s)
    assert (solver.order, solver.noises_per_step) == (None, 0)
    matrix, offset = by_hand(form, [float(v.alpha) for v in levels], [float(v.sigma) for v in levels])
    scale = max(np.abs(matrix).max(), 1e-300)
    np.testing.assert_allclose(result.matrix, matrix, rtol=1e-8, atol=1e-9 * scale)
    np.testing.assert_allclose(result.offset, offset, rtol=1e-8, atol=1e-9)


class Right:
    """Inversion with the noise of the step drawn from its distribution given x_t and ε̂."""

    order, calls, noises_per_step = 1, 1, 1

    def init(self, x, levels):
        return ()

    def step(self, denoise, x_t, t, s, state, noise):
        return invert(x_t, step_noise(denoise(x_t, t, next_level=s).eps, t, s, -noise[0]), t, s), state


@pytest.mark.parametrize("chain", WITH_SIGNAL)
def test_with_its_noise_it_is_ancestral_sampling_with_the_small_variance(chain):
    """(and with −z for z). Without noise it is the mean of every step of that chain."""
    formula, times = CHAINS[chain]
    schedule = PROCESSES[formula].schedule
    denoise, levels = FULL.denoiser(schedule), time_grid(schedule, times=times)
    still = Ancestral(variance=lambda t, s: torch.full((), -math.inf, dtype=f64))
    close = {"rtol": 1e-7, "atol": 1e-8 * float(levels[0].sigma)}
    for right, theirs in ((Right(), Ancestral("small")), (OneStepInversion(), still)):
        a, b = (probe(solver, denoise, levels) for solver in (right, theirs))
        np.testing.assert_allclose(a.matrix, b.matrix, **close)
        np.testing.assert_allclose(a.offset, b.offset, **close)
        if right.noises_per_step:
            np.testing.assert_allclose(a.noise, b.noise, **close)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_chain_of_means_ends_in_the_mean(steps):
    """E[… E[E[x given x_1] given x_2] …] = E[x given x_T] where means are affine: the rest of x is lost."""
    schedule = DS.linear(50)
    levels = time_grid(schedule, steps)
    result = probe(OneStepInversion(), FULL.denoiser(schedule), levels)
    W, w = predictor(COVS["full"], float(levels[0].alpha), float(levels[0].sigma))
    np.testing.assert_allclose(result.matrix, W, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(result.offset, w, rtol=1e-9, atol=1e-11)


def variances(T: int, v: float) -> dict[str, float]:
    """The variance of x_0 by each chain on N(0, v) data, from the exact distribution of x_T, in the notation of Ho."""
    beta = np.minimum(np.linspace(0.1, 20, T) / T, 0.999)
    bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    left = dict.fromkeys(("printed", "scaled", "small", "ddim"), v * bar[T] + 1 - bar[T])
    for t in range(T, 0, -1):
        b, s = beta[t - 1], np.sqrt(1 - bar[t])
        eps = s / (v * bar[t] + 1 - bar[t])  # ε̂ = eps x_t
        mean = (1 - b / s * eps) / np.sqrt(1 - b)
        left["printed"] *= ((1 - np.sqrt(b) * eps) / np.sqrt(1 - b)) ** 2
        left["scaled"] *= mean**2
        left["small"] = mean**2 * left["small"] + b * (1 - bar[t - 1]) / (1 - bar[t])
        clean = (1 - s * eps) / np.sqrt(bar[t])
        left["ddim"] *= (np.sqrt(bar[t - 1]) * clean + np.sqrt(1 - bar[t - 1]) * eps) ** 2
    return left


SHRUNK = {  # of N(0, 1), from x_T ~ N(0, 1)
    10: (2.0e-21, 1.438e-17, 0.4610, 0.6052),
    100: (1.1e-24, 2.039e-05, 0.9208, 0.9634),
    1000: (3.5e-74, 4.036e-05, 0.9911, 0.9963),
    10000: (4.9e-233, 4.290e-05, 0.99907, 0.99962),
}


@pytest.mark.parametrize("v", [1.0, 0.3])
@pytest.mark.parametrize("T", SHRUNK)
def test_the_remaining_variance(T, v):
    """Ancestral sampling and DDIM keep all of it as the steps grow. The chain of means keeps v² ᾱ_T/V_T whatever
    the steps; as printed it keeps exp(−2 √T ∫ √B σ/V dt), B = 0.1 + 19.9 t, which is none."""
    left = variances(T, v)
    schedule = DS.linear_rescaled(T)
    if T <= 100:
        data, levels = GaussianData(torch.zeros(1), torch.tensor([v], dtype=f64)), time_grid(schedule)
        start = float(data.marginal_var(levels[0]))
        chosen = {
            "printed": OneStepInversion("printed"),
            "scaled": OneStepInversion(),
            "small": Ancestral(),
            "ddim": DDIM(),
        }
        for name, solver in chosen.items():
            map_ = probe(solver, data.denoiser(schedule), levels, dims=1)
            total = start * float(map_.matrix[0, 0]) ** 2 + float((map_.noise**2).sum())
            assert total == pytest.approx(left[name], rel=1e-6)
    bar = float(schedule(1.0).alpha) ** 2
    assert left["scaled"] == pytest.approx(v**2 * bar / (v * bar + 1 - bar), rel=1e-9)
    if v == 1:
        assert tuple(left.values()) == tuple(pytest.approx(x, rel=2e-2 if x < 1e-20 else 2e-4) for x in SHRUNK[T])
    if T >= 1000:  # what is lost halves as the steps double
        twice = variances(2 * T, v)
        for name in ("small", "ddim"):
            assert (v - twice[name]) / (v - left[name]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("v", [1.0, 0.3])
def test_the_rate_at_which_the_printed_form_shrinks(v):
    t = (np.arange(2000) + 0.5) / 2000
    bar = np.exp(-(0.1 * t + 9.95 * t**2))
    rate = 2 * np.mean(np.sqrt((0.1 + 19.9 * t) * (1 - bar)) / (v * bar + 1 - bar))
    assert rate == pytest.approx({1.0: 5.357, 0.3: 6.005}[v], abs=0.001)
    few, many = (math.log(variances(T, v)["printed"]) for T in (2500, 10_000))  # whose roots are 50 and 100
    assert (few - many) / 50 == pytest.approx(rate, rel=2e-3)


def test_settings():
    assert OneStepInversion() == OneStepInversion("scaled") != OneStepInversion("printed")
    with pytest.raises(ConfigError, match="Use 'scaled' or 'printed'"):
        OneStepInversion("right")
    with pytest.raises(ConfigError, match=r"'inversion': .*zero-terminal SNR.*Use 'ddim'"):
        probe(OneStepInversion(), FULL.denoiser(S.Flow()), time_grid(S.Flow(), 4))
    assert OneStepInversion().init(torch.zeros(1), time_grid(S.Flow(), times=[0.9, 0.0])) == ()
    kept = (torch.ones(1),)
    x = torch.zeros(1, D, dtype=f64)
    assert OneStepInversion().step(FULL.denoiser(S.Flow()), x, *PAIRS["flow"], kept, x[:0])[1] is kept

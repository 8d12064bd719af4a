"""The oracles against differentiation, integration and scipy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import EmpiricalData, GaussianData, LabelledMixture, MixtureData, gaussian_kl, gaussian_log_prob
from scipy import integrate, stats

from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S

f64 = torch.float64
tensor = partial(torch.tensor, dtype=f64)
rows = tensor([[0.3, -1.2, 0.8], [1.1, 0.4, -0.5]])
root = tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 0.4]])
DATA = {
    "diagonal": GaussianData(rows[0], tensor([0.01, 1.0, 4.0])),
    "full": GaussianData(rows[0], root @ root.T),
    "mixture": MixtureData(tensor([0.3, 0.7]), rows, tensor([[0.1, 1.0, 2.0], [0.5, 0.01, 0.2]])),
    "full mixture": MixtureData(tensor([3.0, 1.0]), rows, torch.stack([root @ root.T, torch.eye(3, dtype=f64)])),
    "empirical": EmpiricalData(torch.cat([rows, -rows])),
}
LEVELS = {
    "VP": S.LinearLogSNR()(0.6),
    "VE": S.VarianceExploding()(0.4),
    "flow": S.Flow()(0.7),
    "batch": S.LinearLogSNR()(tensor([0.3, 0.5, 0.9])),
}
x_t = tensor([[0.1, -0.7, 0.5], [1.3, 0.2, -2.0], [0.4, 0.5, 0.6]])


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_score_is_the_gradient_of_the_log_density_and_agrees_with_the_means(data, level):
    point = x_t.clone().requires_grad_()
    data.log_density(point, level).sum().backward()
    score = data.score(x_t, level)
    torch.testing.assert_close(score, point.grad, rtol=1e-10, atol=1e-10)
    at = level.broadcast_like(x_t)
    x, eps, nu = data.denoiser(S.Flow())(x_t, level)
    assert nu is None
    torch.testing.assert_close(x, (x_t + at.sigma**2 * score) / at.alpha, rtol=1e-9, atol=1e-9)  # Tweedie
    torch.testing.assert_close(eps, -at.sigma * score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at.alpha * x + at.sigma * eps, x_t, rtol=1e-12, atol=1e-12)


def test_density_agrees_with_scipy():
    alpha, sigma = (float(v) for v in LEVELS["VP"][1:3])
    for name, weights, means, covs in [
        ("full", [1.0], rows[:1], [root @ root.T]),
        ("full mixture", [0.75, 0.25], rows, [root @ root.T, torch.eye(3, dtype=f64)]),
        ("mixture", [0.3, 0.7], rows, [torch.diag(v) for v in tensor([[0.1, 1.0, 2.0], [0.5, 0.01, 0.2]])]),
        ("empirical", [0.25] * 4, torch.cat([rows, -rows]), [torch.zeros(3, 3)] * 4),
    ]:
        expected = sum(
            w * stats.multivariate_normal(alpha * m.numpy(), alpha**2 * c.numpy() + sigma**2 * np.eye(3)).pdf(x_t)
            for w, m, c in zip(weights, means, covs, strict=True)
        )
        np.testing.assert_allclose(DATA[name].log_density(x_t, LEVELS["VP"]).exp(), expected, rtol=1e-7)


@pytest.mark.parametrize("level", [LEVELS["VP"], LEVELS["flow"]])
def test_mean_and_density_agree_with_quadrature(level):
    alpha, sigma = float(level.alpha), float(level.sigma)
    data = MixtureData(tensor([0.4, 0.6]), tensor([[-1.0], [0.7]]), tensor([[0.09], [0.25]]))
    y = 0.35

    def joint(x):
        return (0.4 * stats.norm.pdf(x, -1, 0.3) + 0.6 * stats.norm.pdf(x, 0.7, 0.5)) * stats.norm.pdf(
            y, alpha * x, sigma
        )

    total, first = (integrate.quad(lambda x, p=p: x**p * joint(x), -8, 8, points=[-1, 0.7])[0] for p in (0, 1))
    at = tensor([[y]])
    assert float(data.log_density(at, level)) == pytest.approx(math.log(total), abs=1e-8)
    assert float(data.predict(at, level).x) == pytest.approx(first / total, abs=1e-8)

    def density(v):
        return float(data.log_density(tensor([[v]]), level).exp())

    assert integrate.quad(density, -12, 12)[0] == pytest.approx(1, abs=1e-7)
    below = integrate.quad(density, -12, y)[0]
    assert float(data.cdf(at, level)) == pytest.approx(below, abs=1e-7)


def test_empirical_data_are_a_mixture_of_zero_variance():
    points = torch.cat([rows, -rows])
    thin = MixtureData(torch.ones(4), points, torch.full((4, 3), 1e-13))
    level = S.Flow()(0.5)
    alpha, sigma = float(level.alpha), float(level.sigma)
    softmax = torch.softmax(-((x_t[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2), 1)
    for a, b in zip(thin.predict(x_t, level)[:2], DATA["empirical"].predict(x_t, level)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(DATA["empirical"].predict(x_t, level).x, softmax @ points, rtol=1e-12, atol=1e-12)


def test_moments_and_samples():
    for data in DATA.values():
        samples = data.sample(20_000, torch.Generator().manual_seed(0))
        std = data.covariance().diagonal().sqrt()
        assert bool(((samples.mean(0) - data.mean()).abs() < 5 * std / math.sqrt(20_000)).all())
        torch.testing.assert_close(samples.T.cov(), data.covariance(), rtol=0.05, atol=0.05)


def test_shaped_items_agree_with_flat_items():
    shaped = MixtureData(torch.ones(2), rows.reshape(2, 1, 3, 1), rows.abs().reshape(2, 1, 3, 1))
    flat = MixtureData(torch.ones(2), rows, rows.abs())
    for a, b in zip(shaped.predict(x_t.reshape(3, 1, 3, 1), LEVELS["batch"]), flat.predict(x_t, LEVELS["batch"])):  # noqa: B905
        assert a is b is None or torch.equal(a.reshape(3, 3), b)
    assert shaped.sample(2, torch.Generator()).shape == (2, 1, 3, 1)


@pytest.mark.parametrize("schedule", [S.LinearLogSNR(), S.Flow(), S.VarianceExploding(), DS.cosine(50)])
def test_reverse_variance_agrees_with_the_joint_gaussian(schedule):
    data = DATA["diagonal"]
    t, s = schedule(tensor([0.8, 0.5])), schedule(tensor([0.46, 0.0]))
    result = data.reverse_log_var(t, s)
    assert result.shape == (2, 3)
    for i in range(2):
        ti, si = t.take(i), s.take(i)
        torch.testing.assert_close(data.reverse_log_var(ti, si), result[i])
        c = float(ti.alpha / si.alpha)
        for d, var in enumerate([0.01, 1.0, 4.0]):
            below = float(si.alpha) ** 2 * var + float(si.sigma) ** 2
            above = float(ti.alpha) ** 2 * var + float(ti.sigma) ** 2
            precision = np.linalg.inv([[below, c * below], [c * below, above]])
            assert float(result[i, d]) == pytest.approx(-math.log(precision[0, 0]), abs=1e-6)


def rates(level, schedule):
    """(alpha', sigma') of a variance-preserving schedule or the flow."""
    if isinstance(schedule, S.Flow):
        return -1.0, 1.0
    rate = float(schedule.log_snr_rate(level.t))
    return 0.5 * float(level.alpha * level.sigma**2) * rate, -0.5 * float(level.sigma * level.alpha**2) * rate


@pytest.mark.parametrize("schedule", [S.LinearLogSNR(), S.Flow()])
@pytest.mark.parametrize("name", ["full", "diagonal", "1-D mixture"])
def test_flow_solves_the_probability_flow(name, schedule):
    one = MixtureData(tensor([0.4, 0.6]), tensor([[-1.0], [0.7]]), tensor([[0.09], [0.25]]))
    data = one if name == "1-D mixture" else DATA[name]
    start = x_t[:, :1] if data is one else x_t

    def velocity(t, y):
        level = schedule(t)
        return data.velocity(torch.as_tensor(y).reshape(start.shape), level, *rates(level, schedule)).numpy().ravel()

    solution = integrate.solve_ivp(velocity, (0.9, 0.2), start.numpy().ravel(), rtol=1e-10, atol=1e-12, method="DOP853")
    exact = data.flow(start, schedule(0.9), schedule(0.2))
    np.testing.assert_allclose(exact.numpy().ravel(), solution.y[:, -1], atol=1e-7)


@pytest.mark.parametrize("name", ["diagonal", "full"])
def test_loss_minimum_is_the_mean_squared_error_of_the_exact_denoiser(name):
    data, level = DATA[name], LEVELS["flow"]
    # the error is linear in (x, eps): average its square over each axis of the data and of the noise
    x = data.mean() + data.vectors[0].T * data.values[0].sqrt()[:, None]
    error = torch.zeros(1, dtype=f64)
    for axis in range(3):
        noise = torch.eye(3, dtype=f64)[axis : axis + 1]
        centre = data.mean()[None]
        pairs = [(x[axis : axis + 1], 0 * noise), (centre, noise)]
        for value, eps in pairs:
            error += ((data.predict(level.alpha * value + level.sigma * eps, level).eps - eps) ** 2).mean()
    assert float(error) == pytest.approx(float(data.loss_minimum(level)), rel=1e-12)
    assert data.loss_minimum(LEVELS["batch"]).shape == (3,)


def test_entropy_and_elementary_formulas():
    normal = stats.multivariate_normal(rows[0].numpy(), (root @ root.T).numpy())
    assert float(DATA["full"].entropy()) == pytest.approx(normal.entropy(), abs=1e-10)
    assert float(gaussian_log_prob(tensor(0.3), 1.0, 2.0)) == pytest.approx(stats.norm.logpdf(0.3, 1, 2**0.5))
    expected = integrate.quad(
        lambda v: stats.norm.pdf(v, 1, 2) * (stats.norm.logpdf(v, 1, 2) - stats.norm.logpdf(v, -1, 3)), -20, 20
    )[0]
    assert float(gaussian_kl(*(tensor(v) for v in (1.0, 4.0, -1.0, 9.0)))) == pytest.approx(expected, abs=1e-6)


LABELLED = LabelledMixture(
    tensor([0.2, 0.3, 0.5]), torch.cat([rows, -rows[:1]]), torch.stack([root @ root.T, *2 * [torch.eye(3, dtype=f64)]]),
    torch.tensor([0, 1, 0]),
)  # fmt: skip


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_label_selects_its_components(level):
    """The distribution of a label is that of its components, and those of all labels add up to the whole."""
    parts = []
    for c, (means, weights) in enumerate([(LABELLED.means[[0, 2]], [0.2, 0.5]), (LABELLED.means[[1]], [1.0])]):
        covs = torch.stack([root @ root.T, torch.eye(3, dtype=f64)]) if c == 0 else torch.eye(3, dtype=f64)[None]
        alone, label = MixtureData(tensor(weights), means, covs), torch.full((3,), c)
        parts.append(LABELLED.log_density(x_t, level, label) + math.log([0.7, 0.3][c]))
        close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
        close(LABELLED.log_density(x_t, level, label), alone.log_density(x_t, level))
        close(LABELLED.score(x_t, level, label), alone.score(x_t, level))
        prediction = LABELLED.denoiser(S.Flow())(x_t, level, Condition(label=label))
        close(prediction.x, alone.predict(x_t, level).x)
        close(prediction.eps, alone.predict(x_t, level).eps)
        close(LABELLED.group(c).score(x_t, level), alone.score(x_t, level))
        close(LABELLED.log_posterior(x_t, level)[:, c], parts[c] - LABELLED.log_density(x_t, level))
    torch.testing.assert_close(torch.logaddexp(*parts), LABELLED.log_density(x_t, level))


def test_labels_apply_per_item_and_minus_one_is_unconditional():
    level, denoise = LEVELS["batch"], LABELLED.denoiser(S.Flow())
    mixed = denoise(x_t, level, Condition(label=torch.tensor([1, -1, 0]))).x
    unconditional = denoise(x_t, level, Condition(label=torch.full((3,), -1))).x
    assert torch.equal(unconditional, denoise(x_t, level).x)
    assert torch.equal(unconditional, denoise(x_t, level, Condition()).x)
    for i, label in enumerate([1, -1, 0]):
        assert torch.equal(mixed[i], denoise(x_t, level, Condition(label=torch.full((3,), label))).x[i])
    assert not torch.isclose(mixed[[0, 2]], unconditional[[0, 2]]).all(1).any()


def test_the_gradient_of_the_classifier_is_the_difference_of_scores():
    point = x_t.clone().requires_grad_()
    label, level = torch.tensor([1, 0, 1]), LEVELS["batch"]
    LABELLED.log_posterior(point, level)[torch.arange(3), label].sum().backward()
    expected = LABELLED.score(x_t, level, label) - LABELLED.score(x_t, level)
    torch.testing.assert_close(point.grad, expected, rtol=1e-10, atol=1e-10)


def test_labelled_samples_have_the_moments_of_their_label():
    """|z| < 5.2 for 7 numbers: a false alarm in less than 1e-6; the mean of the other label is 100 deviations away."""
    n = 20_000
    x, label = LABELLED.sample_labelled(n, torch.Generator().manual_seed(0))
    assert abs(float((label == 0).sum()) - 0.7 * n) < 5.2 * math.sqrt(0.21 * n)
    for c in range(2):
        selected, expected = x[label == c], LABELLED.group(c)
        error = (selected.mean(0) - expected.mean()) / (expected.covariance().diagonal() / len(selected)).sqrt()
        assert (error.abs() < 5.2).all()

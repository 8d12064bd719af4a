"""Scores and the losses that match them: each loss differs from the others by the constant of its proof."""

import math
from functools import partial

import pytest
import torch
from oracles import EmpiricalData, GaussianData, MixtureData
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.denoising import score_matching as score
from undiffuse.denoising.denoiser import Prediction
from undiffuse.model import losses as loss
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process import target as targets
from undiffuse.process.gaussian import diffuse

f64 = torch.float64
LINE = MixtureData(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.2]]), torch.tensor([[0.04], [0.2]]))
PLANE = EmpiricalData(torch.tensor([[1.0, 0.5], [-1.0, 0.2], [0.1, -0.9]]))
LEVELS = {
    "table": DS.linear()(0.3),
    "flow": S.Flow()(0.4),
    "exploding": S.VarianceExploding(0.05, 2.0)(0.8),
}


def network(seed: int, dims: int = 1) -> nn.Sequential:
    """A model score that is far from right."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(dims, 6), nn.Tanh(), nn.Linear(6, dims)).double()


def grid(reach: float, h: float, dims: int) -> tuple[Tensor, float]:
    """(points of the trapezoid rule on the cube, its weight): exponentially exact for smooth functions."""
    axis = torch.arange(-reach, reach + h, h, dtype=f64)
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims), h**dims


def on_the_line(level):
    """(x_t, its weights), (x, eps, their weights): quadratures of q(x_t) and of q(x) N(eps; 0, I)."""
    x_t, h = grid(10 * float(level.sigma) + 6, 0.02, 1)
    pairs, cell = grid(9.0, 0.1, 2)
    normal = cell * torch.exp(-0.5 * (pairs**2).sum(1)) / (2 * math.pi)
    std = LINE.values[:, 0].sqrt()
    x = torch.cat([LINE.means[k] + std[k] * pairs[:, :1] for k in range(2)])
    joint = torch.cat([w * normal for w in LINE.weights])
    return (x_t, h * LINE.log_density(x_t, level).exp()), (x, pairs[:, 1:].repeat(2, 1), joint)


def on_the_plane(level):
    x_t, h = grid(8 * float(level.sigma) + 1, 0.25 * float(level.sigma), 2)
    eps, cell = grid(8.0, 0.25, 2)
    normal = cell * torch.exp(-0.5 * (eps**2).sum(1)) / (2 * math.pi) / 3
    joint = (PLANE.means.repeat_interleave(len(eps), 0), eps.repeat(3, 1), normal.repeat(3))
    return (x_t, h * PLANE.log_density(x_t, level).exp()), joint


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


# --- what scores are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_the_conditional_score_is_the_gradient_of_the_conditional_density(level):
    x, eps = torch.tensor([[0.3, -2.0]], dtype=f64), torch.tensor([[1.5, 0.2]], dtype=f64)
    x_t = diffuse(x, level, eps).requires_grad_()
    log_q = (-0.5 * ((x_t - level.alpha * x) / level.sigma) ** 2).sum()
    torch.testing.assert_close(score.conditional_score(eps, level), torch.autograd.grad(log_q, x_t)[0])
    torch.testing.assert_close(score.conditional_score(eps, level), targets.build("score").combine(x, eps, level))
    assert score.conditional_score(eps.float(), level).dtype == torch.float32


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("data", [LINE, PLANE], ids=["line", "plane"])
def test_the_exact_denoiser_is_the_exact_score(data, level):
    x_t = torch.linspace(-2, 2, 10, dtype=f64).reshape(-1, data.means.shape[1])
    exact = data.score(x_t, level)
    torch.testing.assert_close(
        score.score_from_prediction(data.predict(x_t, level), level), exact, rtol=1e-10, atol=1e-10
    )
    batch = type(level)(*(v.expand(len(x_t)) for v in level[:4]))
    for at in (level, batch):
        torch.testing.assert_close(score.as_score(data.denoiser(S.Flow()), at)(x_t), exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(score.tweedie(x_t, exact, at), data.predict(x_t, level).x, rtol=1e-10, atol=1e-10)


def test_a_score_passes_the_condition_on():
    conditional = score.as_score(lambda x_t, level, cond: Prediction(x_t, x_t + cond), LEVELS["flow"], cond=2.0)
    torch.testing.assert_close(conditional(torch.ones(1, 1)), torch.full((1, 1), -3 / 0.4))


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_the_second_order_of_tweedie_is_the_posterior_covariance(level):
    """Data points have a discrete posterior; Gaussian data have a Gaussian one."""
    x_t = torch.tensor([[0.2, 0.1], [-1.0, 0.6], [0.0, -2.0]], dtype=f64)
    distance = ((x_t[:, None] - level.alpha * PLANE.means) ** 2).sum(-1)
    share = torch.softmax(-0.5 * distance / level.sigma**2, 1)
    centred = PLANE.means - (share @ PLANE.means)[:, None]
    expected = torch.einsum("bk,bkd,bke->bde", share, centred, centred)
    result = score.posterior_covariance(partial(PLANE.score, level=level), x_t, level)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert not result.requires_grad
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.9]], dtype=f64)
    data = GaussianData(torch.tensor([1.0, -0.5]), cov)
    expected = torch.linalg.inv(torch.linalg.inv(cov) + (level.alpha / level.sigma) ** 2 * torch.eye(2, dtype=f64))
    levels = type(level)(*(v.expand(3) for v in level[:4]))
    for at in (level, levels):
        result = score.posterior_covariance(partial(data.score, level=level), x_t, at)
        torch.testing.assert_close(result, expected.expand(3, 2, 2), rtol=1e-9, atol=1e-9)


# --- score matching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize(("data", "quadrature"), [(LINE, on_the_line), (PLANE, on_the_plane)], ids=["line", "plane"])
def test_the_four_losses_differ_by_their_constants_and_have_one_gradient(data, quadrature, level, seed):
    dims = data.means.shape[1]
    model = network(seed, dims)
    (x_t, q), (x, eps, joint) = quadrature(level)
    assert float(q.sum()) == pytest.approx(1, abs=1e-11)
    assert float(joint.sum()) == pytest.approx(1, abs=1e-11)
    true = data.score(x_t, level)
    size = 0.5 * float(q @ (true**2).mean(1))  # ½ E‖∇ log q‖², per dimension
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=f64)] * dims).reshape(-1, dims)
    signs = signs[:, None].expand(-1, *x_t.shape)  # whose v vᵀ average to I

    at = level.broadcast_like(x)
    x_hat = (at.alpha * x + at.sigma * eps + at.sigma**2 * model(at.alpha * x + at.sigma * eps)) / at.alpha
    as_noise = Prediction(x_hat, (at.alpha * x + at.sigma * eps - at.alpha * x_hat) / at.sigma)
    explicit = q @ score.explicit(model, x_t, true)
    cases = {
        "implicit": (q @ score.implicit(model, x_t), -size),
        "sliced": (q @ score.sliced(model, x_t, signs), -size),
        "reduced": (q @ score.sliced(model, x_t, signs[:1] if dims == 1 else signs, reduced=True), -size),
        "denoising": (joint @ score.denoising(model, x, eps, level), 0.5 / float(level.sigma) ** 2 - size),
        "noise": (joint @ score.noise_form(as_noise, eps, level), 0.5 / float(level.sigma) ** 2 - size),
    }
    wanted = gradient(explicit, model)
    assert float(wanted.norm()) > 0.1
    for value, constant in cases.values():
        assert float(value.detach() - explicit.detach()) == pytest.approx(constant, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(gradient(value, model), wanted, rtol=1e-9, atol=1e-9)


def test_the_constant_of_denoising_is_the_irreducible_loss():
    """1/sigma² − E‖∇ log q‖² is the mean variance of −eps/sigma given x_t: 1/V fewer, on N(0, v)."""
    level, v = LEVELS["table"], 0.3
    data = GaussianData(torch.zeros(1), torch.tensor([v], dtype=f64))
    x_t, h = grid(12.0, 0.02, 1)
    q = h * data.log_density(x_t, level).exp()
    V = float(level.alpha**2 * v + level.sigma**2)
    assert float(q @ data.score(x_t, level)[:, 0] ** 2) == pytest.approx(1 / V, rel=1e-10)
    left = 0.5 * (1 / float(level.sigma) ** 2 - 1 / V)
    pairs, cell = grid(9.0, 0.1, 2)
    normal = cell * torch.exp(-0.5 * (pairs**2).sum(1)) / (2 * math.pi)
    x, eps = math.sqrt(v) * pairs[:, :1], pairs[:, 1:]
    least = normal @ score.denoising(partial(data.score, level=level), x, eps, level)
    assert float(least) == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize("t", [0.001, 0.1, 1.0])
def test_one_over_sigma_squared_is_the_weight_of_the_noise(t):
    """With 1/√(1−ᾱ) in place of 1/(1−ᾱ) the gradient is √(1−ᾱ) of the score's: 0.01 of it at the first step."""
    level = DS.linear()(t)
    model = network(0)
    (x_t, q), (x, eps, joint) = on_the_line(level)
    wanted = gradient(q @ score.explicit(model, x_t, LINE.score(x_t, level)), model)
    noisy = diffuse(x, level, eps)
    prediction = Prediction(x, -float(level.sigma) * model(noisy))
    misprinted = gradient(joint @ (0.5 * loss.eps_mse(prediction, eps) / level.sigma), model)
    right = gradient(joint @ score.noise_form(prediction, eps, level), model)
    scale = float(wanted.norm())
    torch.testing.assert_close(right, wanted, rtol=0, atol=1e-9 * max(scale, 1))
    ratio = float(misprinted @ wanted) / scale**2
    assert ratio == pytest.approx(float(level.sigma), rel=1e-6)
    assert float(level.sigma) == pytest.approx({0.001: 0.01, 0.1: 0.3209, 1.0: 0.99998}[t], rel=1e-4)


def test_losses_are_means_over_each_item():
    """On a linear score A x: ½‖A x‖² + tr A, and v·A v; three by two numbers an item."""
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=f64)
    x_t, v, known = torch.randn(3, 4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=f64)

    def linear(x: Tensor) -> Tensor:
        return (x.flatten(1) @ A.T).reshape(x.shape)

    s, flat = linear(x_t).flatten(1), v.flatten(1)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    close(score.explicit(linear, x_t, known), 0.5 * ((s - known.flatten(1)) ** 2).sum(1) / 6)
    close(score.implicit(linear, x_t), (0.5 * (s**2).sum(1) + A.trace()) / 6)
    bend = torch.einsum("bi,ij,bj->b", flat, A, flat)
    plain, reduced = (bend + 0.5 * (flat * s).sum(1) ** 2) / 6, (bend + 0.5 * (s**2).sum(1)) / 6
    close(score.sliced(linear, x_t, v[None]), plain)
    close(score.sliced(linear, x_t, v[None], reduced=True), reduced)
    both = score.sliced(linear, x_t, torch.stack([v, 2 * v]))
    close(both, (plain + (4 * bend + 2 * (flat * s).sum(1) ** 2) / 6) / 2)
    levels = S.Flow()(torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=f64))
    sigma = levels.sigma[:, None]
    close(score.conditional_score(v, levels).flatten(1), -flat / sigma)
    noisy = diffuse(x_t, levels, v)
    close(score.denoising(linear, x_t, v, levels), score.explicit(linear, noisy, -v / sigma[..., None]))
    close(score.noise_form(Prediction(x_t, known), v, levels), 0.5 * ((v - known) ** 2).mean((1, 2)) / sigma[:, 0] ** 2)


def test_losses_do_not_change_their_arguments():
    model, x_t = network(0), torch.ones(2, 1, dtype=f64)
    with torch.no_grad():
        for value in (score.implicit(model, x_t), score.sliced(model, x_t, x_t[None])):
            assert not value.requires_grad
    assert score.implicit(model, x_t).requires_grad
    assert not x_t.requires_grad
    constant = torch.full((2, 1), 3.0, dtype=f64)
    assert score.implicit(lambda x: constant, x_t).tolist() == [4.5, 4.5]


def test_a_score_with_attention_can_be_trained_by_its_divergence():
    """The fused kernel has no second derivative."""
    weight = torch.ones(4, 4, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        q = (x @ weight)[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0]

    score.implicit(attend, torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert weight.grad is not None
    assert bool(torch.isfinite(weight.grad).all())


def test_the_reduced_loss_varies_less_with_its_projections():
    """Over the 16 signs in four dimensions, on a score that is nearly right."""
    x_t = torch.tensor([[0.5, -1.0, 2.0, 0.3]], dtype=f64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=f64)] * 4)[:, None]
    with torch.no_grad():
        by_sign = [torch.stack([score.sliced(lambda x: -x, x_t, v[None], r) for v in signs]) for r in (False, True)]
    assert float(by_sign[0].std()) > 0.3
    assert float(by_sign[1].std()) < 1e-12
    for values in by_sign:
        torch.testing.assert_close(values.mean(0), score.implicit(lambda x: -x, x_t).detach())


# --- Stein ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (lambda y: y, lambda m, s: s**2),
        (lambda y: y**3, lambda m, s: 3 * s**2 * (m**2 + s**2)),
        (torch.sin, lambda m, s: s**2 * math.exp(-(s**2) / 2) * math.cos(m)),
        (torch.exp, lambda m, s: s**2 * math.exp(m + s**2 / 2)),
        (lambda y: torch.ones(()), lambda m, s: 0.0),
    ],
    ids=["y", "y^3", "sin", "exp", "1"],
)
def test_both_sides_of_steins_lemma(f, truth):
    """With σ in place of σ² the right side would be half the left at σ = 2."""
    for mean, std in ((0.0, 1.0), (0.7, 2.0), (-1.2, 0.3)):
        for side in score.stein(f, mean, std):
            assert float(side) == pytest.approx(truth(mean, std), rel=1e-11, abs=1e-12)
            assert not side.requires_grad
    means, stds = torch.tensor([0.7, -1.2], dtype=f64), torch.tensor([2.0, 0.3], dtype=f64)
    left, right = score.stein(f, means, stds)
    expected = torch.tensor([truth(0.7, 2.0), truth(-1.2, 0.3)], dtype=f64)
    torch.testing.assert_close(left, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(right, expected, rtol=1e-11, atol=1e-12)


def test_the_nodes_of_steins_lemma():
    """n nodes are exact up to degree 2n − 1 of (Y − mean) f, and no further."""
    left, right = score.stein(lambda y: y**5, 0.0, 1.0, nodes=4)
    assert (float(left), float(right)) == (pytest.approx(15.0), pytest.approx(15.0))
    left, _ = score.stein(lambda y: y**7, 0.0, 1.0, nodes=4)
    assert float(left) < 100  # in place of 105
    seen = []
    score.stein(lambda y: (seen.append(len(y)), y)[1], 0.0, 1.0)
    assert seen == [64]

"""The functions of benchmarks/gan and benchmarks/few_calls: losses and errors by hand, and runs that resume."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from undiffuse.evaluation.metrics import Value

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gan, few_calls = load("benchmarks/gan/gan.py"), load("benchmarks/few_calls/run.py")


def test_the_losses_are_relativistic():
    """Each depends on the difference of the pair's scores alone: log(1 + exp(±1.5))."""
    real, fake = torch.tensor([2.0, 7.0]), torch.tensor([0.5, 5.5])
    assert gan.critic_loss(real, fake).tolist() == pytest.approx([math.log1p(math.exp(-1.5))] * 2)
    assert gan.generator_loss(real, fake).tolist() == pytest.approx([math.log1p(math.exp(1.5))] * 2)


def test_the_penalty_is_the_squared_gradient_of_the_score():
    """D(x) = w·x + x₀²: the gradient is w + 2 x₀ e₀, and the penalty has a gradient to w."""
    critic = nn.Linear(3, 1, bias=False).double()
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    score, penalty = gan.gradient_penalty(lambda x: critic(x)[:, 0] + x[:, 0] ** 2, x)
    w = critic.weight[0]
    penalty.sum().backward()
    w = w.detach()
    assert float(score.detach()) == pytest.approx(float(w @ x[0] + 0.25))
    assert float(penalty.detach()) == pytest.approx(float((w[0] + 1) ** 2 + w[1] ** 2 + w[2] ** 2))
    expected = 2 * w + torch.tensor([2.0, 0.0, 0.0])
    torch.testing.assert_close(critic.weight.grad[0], expected.to(torch.float64))


@pytest.mark.parametrize(("size", "start"), [(8, 4), (28, 7)])
def test_the_networks_have_the_parameters_that_are_asked_for(size, start):
    generator, critic = gan.build(600_000, 1, size)
    assert abs(gan.count(generator) / 600_000 - 1) < 0.06
    assert generator.start == start
    images = generator(torch.randn(2, gan.LATENT)).detach()
    assert images.shape == (2, 1, size, size)
    assert float(images.abs().max()) < 1
    assert critic(images).shape == (2,)


def test_a_stopped_gan_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(gan, "BATCH", 4)
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def training(steps, path=None):
        one = gan.Training(3000, (1, 8, 8), seed=3, lr=1e-3, gamma=0.5)
        if path is not None:
            one.load(path)
        while one.step < steps:
            one.train_step(images)
        return one

    training(2).save(tmp_path / "checkpoint.pt")
    resumed, straight = training(4, tmp_path / "checkpoint.pt").sample(3)[0], training(4).sample(3)[0]
    assert torch.equal(resumed, straight)
    assert not torch.equal(resumed, training(3).sample(3)[0])


def test_the_excess_over_the_floor_and_its_ratio():
    one = few_calls.excess(Value(5.0, 0.3), Value(1.0, 0.4))
    assert one == pytest.approx((4.0, 0.5))
    assert few_calls.ratio(one, Value(2.0, 0.1)) == pytest.approx((2.0, 2 * math.hypot(0.125, 0.05)))


def test_drawing_resumes_and_extends(tmp_path, monkeypatch):
    monkeypatch.setattr(few_calls, "PART", 4)
    asked = []

    class Model:
        def sample(self, n, seed, sampler, first, batch):
            asked.append((first, n))
            return torch.arange(first, first + n)[:, None]

    first, _ = few_calls.draw(tmp_path, Model(), None, 6)
    again, _ = few_calls.draw(tmp_path, Model(), None, 6)
    assert first[:, 0].tolist() == again[:, 0].tolist() == list(range(6))
    assert asked == [(0, 4), (4, 2)]

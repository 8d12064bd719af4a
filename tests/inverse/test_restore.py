"""Restoring with a model: what damage does, what is kept, and draws that are those of the exact posterior."""

import math
from functools import partial

import pytest
import torch
from test_posterior import F64, PAIR, GaussianData, random

from undiffuse.codec import Identity, Pixels
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig
from undiffuse.denoiser import Clipped
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.inverse import DPS, MMPS, PiGDM, blur, mean_pool
from undiffuse.randomness import ItemNoise
from undiffuse.restore import METHODS, NAMES, Damage, best, degraded, misfit, restored, rounding, walked
from undiffuse.sample import trajectory
from undiffuse.solvers import Ancestral

NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
LEFT = torch.tensor([True, False])


def small(codec, shape=(1, 4, 4), **more) -> Diffusion:
    torch.manual_seed(0)
    config = ModelConfig(network=NETWORK | more, schedule={"name": "linear_log_snr", "high": 8.0}, steps=20)
    return Diffusion(config, shape, codec)


@pytest.fixture
def exact(monkeypatch):
    """A model of two numbers whose network is perfect."""
    model = small(Identity(), (1, 1, 2))
    data = GaussianData(torch.zeros(1, 1, 2), PAIR.cov)
    monkeypatch.setattr(model, "denoiser", lambda: data.denoiser(model.schedule))
    return model


def test_damage_is_blur_then_means_then_noise_then_a_mask():
    shape, x = (2, 6, 6), random(3, 2, 6, 6)
    known = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    damage = Damage(shape, blur=0.8, shrink=2, noise_std=0.1, known=known)
    image = mean_pool(2, shape)(blur(0.8, shape)(x))
    torch.testing.assert_close(damage.whole(x), image)
    torch.testing.assert_close(damage.operator(x), image[:, :, known].flatten(1))
    torch.testing.assert_close(damage.seen(image), image[:, :, known].flatten(1))
    y = random(3, 2 * int(known.sum()), seed=1)
    torch.testing.assert_close(
        (damage.operator(x) * y).sum(), (x * damage.operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12
    )
    plain = Damage(shape)
    assert torch.equal(plain.operator(x), x)
    assert torch.equal(plain.seen(x), x)
    only = [
        Damage(shape, known=known[:1, :1] | True),
        Damage(shape, known=LEFT.repeat(3), noise_std=0.1),
        damage,
        plain,
    ]
    assert [d.only_mask for d in only] == [True, False, False, False]
    assert not Damage(shape, blur=1.0, known=LEFT.repeat(3)).only_mask
    assert not Damage(shape, shrink=2, known=torch.tensor([True])).only_mask
    assert [best(d) for d in only] == ["mmps", "mmps", "pigdm", "mmps"]


def test_damage_that_cannot_be():
    for settings, said in (
        ({"noise_std": -0.1}, "noise_std = -0.1: it must not be below 0"),
        ({"noise_std": math.nan}, "it must not be below 0"),
        ({"known": torch.zeros(4, dtype=torch.bool)}, "it hides everything"),
        ({"shrink": 3}, "3 does not divide the sides of an item, 4 x 4"),
        ({"blur": -1.0}, "blur of std -1: it must be above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Damage((1, 4, 4), **settings)


def test_degraded_is_what_a_file_would_hold():
    x = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    damage = Damage((1, 64, 64), shrink=2, noise_std=0.1)
    seen = degraded(damage, x, 3, 256)
    assert seen.shape == (1, 32, 32)
    torch.testing.assert_close(seen, Pixels(256).encode(Pixels(256).decode(seen)))
    noise = ItemNoise(3, [0], (1, 32, 32), "degraded")(1)[0]
    clean = damage.whole(x[None])[0]
    torch.testing.assert_close(seen, clean + 0.1 * noise[0], rtol=0, atol=1 / 255 + 1e-6)
    rounded = degraded(Damage((1, 64, 64)), x, 3, 17) - x
    assert float(rounded.std()) == pytest.approx(rounding(17), rel=0.05)  # 4096 numbers: it is off by 1 % (1 σ)
    assert float(degraded(Damage((1, 2, 2), noise_std=5.0), torch.zeros(1, 2, 2), 0, 256).abs().max()) == 1.0


def test_answers_are_draws_of_the_posterior(exact):
    """The very samples of the exact denoiser given y, from the same noise, in any batches."""
    damage, image = Damage((1, 1, 2), known=LEFT), torch.tensor([[[1.0, -9.0]]])
    found = restored(exact, damage, image, 5, floor=0.5)
    given = GaussianData(torch.tensor([[[0.8, 0.72]]]), torch.tensor([[0.2, 0.18], [0.18, 0.352]], dtype=F64))
    noise = ItemNoise(0, range(5), (1, 1, 2))
    start = noise(1)[0]
    *_, last = trajectory(given.denoiser(exact.schedule), Ancestral(), exact.walk(20), start, noise)
    expected = last.x / last.level.alpha.float()
    torch.testing.assert_close(found[..., 1], expected[..., 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., 0], torch.ones(5, 1, 1))  # known, whatever the floor says of rounding
    noisy = Damage((1, 1, 2), known=LEFT, noise_std=0.4)
    done: list[int] = []
    found = restored(exact, noisy, image, 5, batch=2, floor=0.3, progress=done.append)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(done) == 5 * walked(exact, "mmps", 100) == 5 * 20


@pytest.mark.parametrize("method", NAMES)
def test_every_method_keeps_what_is_known(method):
    model = small(Pixels(256))
    values = torch.randint(0, 256, (1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    known = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    image, damage = Pixels(256).encode(values), Damage((1, 4, 4), known=known)
    done: list[int] = []
    answers = restored(model, damage, image, 3, method, seed=1, steps=5, progress=done.append)
    assert (answers.shape, answers.dtype) == ((3, 1, 4, 4), torch.uint8)
    assert torch.equal(answers[:, :, known], values[:, known].expand(3, 1, -1))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[:2], restored(model, damage, image, 2, method, seed=1, steps=5))
    assert not torch.equal(answers, restored(model, damage, image, 3, method, seed=2, steps=5))
    unread = torch.where(known, image, 0.5)
    assert torch.equal(answers, restored(model, damage, unread, 3, method, seed=1, steps=5))
    assert sum(done) == 3 * walked(model, method, 5)
    torch.testing.assert_close(misfit(model, damage, image, answers), torch.zeros(3))
    assert not model.training


@pytest.mark.parametrize("method", NAMES)
def test_each_answer_is_told_its_own_class(method):
    model, known = small(Pixels(256), classes=3), torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    image, damage = torch.zeros(1, 4, 4), Damage((1, 4, 4), known=known)
    walk = partial(restored, model, damage, image, method=method, steps=5)
    told = walk(n=3, batch=2, cond=Condition(label=torch.tensor([2, 1, 0])))
    assert torch.equal(told[2:], walk(n=3, cond=Condition(label=torch.tensor([1, 1, 0])))[2:])
    assert not torch.equal(told[0], walk(n=1, cond=Condition(label=torch.tensor([1])))[0])
    assert not torch.equal(told[0], walk(n=1)[0])
    with pytest.raises(ConfigError):
        restored(small(Pixels(256)), damage, image, 1, cond=Condition(label=torch.tensor([1])))


def test_misfit_is_what_is_left():
    model, damage = small(Pixels(256)), Damage((1, 4, 4), shrink=2)
    values = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255.0)]).to(torch.uint8)
    torch.testing.assert_close(misfit(model, damage, torch.full((1, 2, 2), -1.0), values), torch.tensor([0.0, 2.0]))


def test_the_settings_of_the_methods():
    made = {name: build("observed", "network") for name, build in METHODS.items()}
    assert made == {"mmps": MMPS("network", "observed", 1), "pigdm": PiGDM("network", "observed", 0.5)} | {
        "dps": DPS("network", "observed", 1.0)
    }
    model = small(Pixels(256))
    assert isinstance(model.sampler(guide=partial(METHODS["mmps"], "observed")), Clipped)
    assert (walked(model, "mmps", 100), walked(model, "repaint", 20)) == (20, 20 * 4 + 2 * 3)


def test_what_cannot_be_restored():
    model, image = small(Pixels(256)), torch.zeros(1, 4, 4)
    with pytest.raises(ConfigError, match="'magic': no such method"):
        restored(model, Damage((1, 4, 4), blur=1.0), image, 1, "magic")
    for damage in (Damage((1, 4, 4), blur=1.0), Damage((1, 4, 4), known=LEFT.repeat(2), noise_std=0.1)):
        with pytest.raises(ConfigError, match="it fills in what a mask hides"):
            restored(model, damage, image, 1, "repaint")

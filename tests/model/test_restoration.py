"""Restoration with a model: degradations, known values, and samples of the exact posterior."""

import math
from functools import partial

import pytest
import torch
from latent_models import CENTRE, VARIANCES, exact_model, linear_transform, tiny_latent_model
from oracles import GaussianData
from posterior_cases import F64, PAIR, random

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.denoising.linear_operators import DecodedOperator, LinearOperator, blur, mask, mean_pool
from undiffuse.denoising.posterior_guidance import DPS, MMPS, Observation, PiGDM
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.restoration import (
    SOLVER_METHODS,
    Degradation,
    check_image_model,
    data_residual,
    default_method,
    degrade,
    element_factor,
    num_steps_of,
    restore,
    rounding_std,
)
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.product import Product, observation_factor
from undiffuse.sampling.tables import RESTORATION_METHODS
from undiffuse.sampling.trajectory import trajectory

NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
LEFT = torch.tensor([True, False])


def small(codec, shape=(1, 4, 4), **more) -> Diffusion:
    torch.manual_seed(0)
    config = ModelConfig(network=NETWORK | more, schedule={"name": "linear_log_snr", "high": 8.0}, chain_length=20)
    return Diffusion(config, shape, codec)


@pytest.fixture
def exact(monkeypatch):
    """A model of two elements with the exact denoiser."""
    model = small(Identity(), (1, 1, 2))
    data = GaussianData(torch.zeros(1, 1, 2), PAIR.cov)
    monkeypatch.setattr(model, "denoiser", lambda: data.denoiser(model.schedule))
    return model


def test_degradation_is_blur_then_means_then_noise_then_mask():
    shape, x = (2, 6, 6), random(3, 2, 6, 6)
    known = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    degradation = Degradation(shape, blur=0.8, shrink=2, noise_std=0.1, known=known)
    image = mean_pool(2, shape)(blur(0.8, shape)(x))
    torch.testing.assert_close(degradation.full_operator(x), image)
    torch.testing.assert_close(degradation.operator(x), image[:, :, known].flatten(1))
    torch.testing.assert_close(degradation.observe(image), image[:, :, known].flatten(1))
    y = random(3, 2 * int(known.sum()), seed=1)
    torch.testing.assert_close(
        (degradation.operator(x) * y).sum(), (x * degradation.operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12
    )
    plain = Degradation(shape)
    assert torch.equal(plain.operator(x), x)
    assert torch.equal(plain.observe(x), x)
    only = [
        Degradation(shape, known=known[:1, :1] | True),
        Degradation(shape, known=LEFT.repeat(3), noise_std=0.1),
        degradation,
        plain,
    ]
    assert [d.is_inpainting for d in only] == [True, False, False, False]
    assert not Degradation(shape, blur=1.0, known=LEFT.repeat(3)).is_inpainting
    assert not Degradation(shape, shrink=2, known=torch.tensor([True])).is_inpainting
    assert [default_method(d) for d in only] == ["mmps", "mmps", "pigdm", "mmps"]


@pytest.mark.parametrize("method", ["mmps", "pigdm", "dps"])
def test_guidance_through_a_linear_decoder_is_that_of_the_composed_operator(method):
    """Of y = A (W z + b): the operator A W and y − A b, with the exact denoiser of z."""
    transform = linear_transform()
    model, network = exact_model(transform), transform.autoencoder.network
    known = mask(torch.tensor([True, False, True]), (3,))
    mean, std = (torch.tensor(n, dtype=F64) for n in (transform.mean, transform.std))
    composed = known @ LinearOperator(lambda x: (std * x) @ network.W.T, (2,))
    y, offset = random(1, 2, seed=4), known(network.decode(mean)[None])
    x_t, level = random(5, 2), model.schedule(torch.tensor(0.4))
    through = Observation(DecodedOperator(known, transform.decode, (2,)), y, 0.3)
    guided = [
        RESTORATION_METHODS[method](model.denoiser(), observation)(
            x_t, level, next_level=model.schedule(torch.tensor(0.3))
        )
        for observation in (through, Observation(composed, y - offset, 0.3))
    ]
    torch.testing.assert_close(guided[0].x, guided[1].x, rtol=0, atol=1e-8)
    torch.testing.assert_close(guided[0].eps, guided[1].eps, rtol=0, atol=1e-8)


def test_latents_are_restored_to_samples_of_the_exact_posterior():
    """One of three elements, with noise, of a linear-Gaussian model: mean and covariance of x̂ given y in closed form.

    1,000 samples by 100 steps: an error of 0.12 is five standard errors; the prior's mean is above 1 away.
    """
    model = exact_model(linear_transform())
    network, image = model.transform.autoencoder.network, torch.tensor([2.0, 0.0, 0.0], dtype=F64)
    known = torch.tensor([True, False, False])
    A, noise = network.W[known], 0.4
    precision = torch.diag(1 / VARIANCES) + A.T @ A / noise**2
    residual = (image - network.decode(CENTRE))[known]
    cov = network.W @ torch.linalg.inv(precision) @ network.W.T
    mean = network.decode(CENTRE) + network.W @ torch.linalg.solve(precision, A.T @ residual) / noise**2
    assert float((mean - network.decode(CENTRE)).norm()) > 1
    x = restore(model, Degradation((3,), noise_std=noise, known=known), image, 1000, batch=1000)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.12)
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.12)


def test_a_model_of_latents_restores_images():
    """Known pixels are those of the image, and methods that change pixels at each step are refused."""
    model, image = tiny_latent_model(), torch.rand(1, 8, 8) * 2 - 1
    known = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    inpainting = Degradation((1, 8, 8), known=known)
    x = restore(model, inpainting, image, 3, num_steps=2, batch=2)
    assert (x.shape, x.dtype) == ((3, 1, 8, 8), torch.uint8)
    assert torch.equal(x[:, 0, known], model.transform.values.to_data(image[None])[0, :, known].expand(3, -1))
    assert float(data_residual(model, inpainting, image, x).max()) <= 1 / 16
    assert torch.equal(x[2:], restore(model, inpainting, image, 3, num_steps=2)[2:])
    for method in SOLVER_METHODS:
        with pytest.raises(ConfigError, match="it changes pixels at each step, and this is a model of latents"):
            restore(model, inpainting, image, 1, method)
    assert default_method(Degradation((1, 8, 8), blur=1.0), latent=True) == "mmps"


def test_degradation_errors():
    for settings, said in (
        ({"noise_std": -0.1}, "noise_std = -0.1: it must be finite and not below 0"),
        ({"noise_std": math.nan}, "it must be finite and not below 0"),
        ({"known": torch.zeros(4, dtype=torch.bool)}, "it hides the whole image"),
        ({"shrink": 3}, "3 does not divide the sides of an item, 4 x 4"),
        ({"blur": -1.0}, "blur = -1: it must be finite and above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Degradation((1, 4, 4), **settings)


def test_degraded_image_is_rounded_as_in_a_file():
    x = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    degradation = Degradation((1, 64, 64), shrink=2, noise_std=0.1)
    image = degrade(degradation, x, 3, 256)
    assert image.shape == (1, 32, 32)
    torch.testing.assert_close(image, IntegerLevels(256).to_model(IntegerLevels(256).to_data(image)))
    noise = ItemNoise(3, [0], (1, 32, 32), "degraded")(1)[0]
    clean = degradation.full_operator(x[None])[0]
    torch.testing.assert_close(image, clean + 0.1 * noise[0], rtol=0, atol=1 / 255 + 1e-6)
    rounded = degrade(Degradation((1, 64, 64)), x, 3, 17) - x
    assert float(rounded.std()) == pytest.approx(rounding_std(17), rel=0.05)  # 4096 elements: 1 % standard error
    assert float(degrade(Degradation((1, 2, 2), noise_std=5.0), torch.zeros(1, 2, 2), 0, 256).abs().max()) == 1.0


def test_answers_are_samples_of_the_posterior(exact):
    """They equal the samples of the exact posterior denoiser from the same noise, for any batch size."""
    degradation, image = Degradation((1, 1, 2), known=LEFT), torch.tensor([[[1.0, -9.0]]])
    answers = restore(exact, degradation, image, 5, floor=0.5)
    given = GaussianData(torch.tensor([[[0.8, 0.72]]]), torch.tensor([[0.2, 0.18], [0.18, 0.352]], dtype=F64))
    noise = ItemNoise(0, range(5), (1, 1, 2))
    start = noise(1)[0]
    *_, last = trajectory(
        given.denoiser(exact.schedule), Ancestral(), exact.noise_levels(Sampler(num_steps=20)), start, noise
    )
    expected = last.x / last.level.alpha.float()
    torch.testing.assert_close(answers[..., 1], expected[..., 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(answers[..., 0], torch.ones(5, 1, 1))  # known values are exact in spite of the floor
    noisy = Degradation((1, 1, 2), known=LEFT, noise_std=0.4)
    done: list[int] = []
    answers = restore(exact, noisy, image, 5, batch=2, floor=0.3, progress=done.append)
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    assert sum(done) == 5 * num_steps_of(exact, "mmps") == 5 * 20


@pytest.mark.parametrize("method", RESTORATION_METHODS)
def test_every_method_keeps_the_known_values(method):
    model = small(IntegerLevels(256))
    values = torch.randint(0, 256, (1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    known = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    image, degradation = IntegerLevels(256).to_model(values), Degradation((1, 4, 4), known=known)
    done: list[int] = []
    answers = restore(model, degradation, image, 3, method, seed=1, num_steps=5, progress=done.append)
    assert (answers.shape, answers.dtype) == ((3, 1, 4, 4), torch.uint8)
    assert torch.equal(answers[:, :, known], values[:, known].expand(3, 1, -1))
    assert not torch.equal(answers[0], answers[1])
    assert torch.equal(answers[:2], restore(model, degradation, image, 2, method, seed=1, num_steps=5))
    assert not torch.equal(answers, restore(model, degradation, image, 3, method, seed=2, num_steps=5))
    other_hidden = torch.where(known, image, 0.5)
    assert torch.equal(answers, restore(model, degradation, other_hidden, 3, method, seed=1, num_steps=5))
    assert sum(done) == 3 * num_steps_of(model, method, 5)
    torch.testing.assert_close(data_residual(model, degradation, image, answers), torch.zeros(3))
    assert model.training


def test_the_error_names_the_item_of_any_batch(monkeypatch):
    def noise(seed, items, *more, **options):
        return lambda n: ItemNoise(seed, items, *more, **options)(n) * (math.nan if 2 in items else 1)

    monkeypatch.setattr("undiffuse.model.restoration.ItemNoise", noise)
    degradation = Degradation((1, 4, 4), known=LEFT.repeat(4, 2))
    with pytest.raises(NonFiniteError, match="item 2: 1 of 1 samples became NaN"):
        restore(small(IntegerLevels(256)), degradation, torch.zeros(1, 4, 4), 3, "repaint", num_steps=2, batch=2)


@pytest.mark.parametrize("method", RESTORATION_METHODS)
def test_differences_of_two_calls_are_in_float32(method):
    """A difference of near calls is of the size of bfloat16's rounding; methods without differences keep it."""
    model, known = small(IntegerLevels(256)), torch.arange(16).reshape(4, 4) % 2 == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    image, degradation = torch.zeros(1, 4, 4), Degradation((1, 4, 4), known=known)
    answers = partial(restore, model, degradation, image, 2, method, num_steps=5)
    plain = answers()
    model.autocast = torch.bfloat16
    assert torch.equal(answers(), plain) == (method not in SOLVER_METHODS)


@pytest.mark.parametrize("method", RESTORATION_METHODS)
def test_each_answer_has_its_own_condition(method):
    model, known = (
        small(IntegerLevels(256), classes=3),
        torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    image, degradation = torch.zeros(1, 4, 4), Degradation((1, 4, 4), known=known)
    answers = partial(restore, model, degradation, image, method=method, num_steps=5)
    three = answers(n=3, batch=2, cond=Condition(label=torch.tensor([2, 1, 0])))
    assert torch.equal(three[2:], answers(n=3, cond=Condition(label=torch.tensor([1, 1, 0])))[2:])
    assert not torch.equal(three[0], answers(n=1, cond=Condition(label=torch.tensor([1])))[0])
    assert not torch.equal(three[0], answers(n=1)[0])
    with pytest.raises(ConfigError):
        restore(small(IntegerLevels(256)), degradation, image, 1, cond=Condition(label=torch.tensor([1])))


def test_data_residual():
    model, degradation = small(IntegerLevels(256)), Degradation((1, 4, 4), shrink=2)
    values = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 255.0)]).to(torch.uint8)
    torch.testing.assert_close(
        data_residual(model, degradation, torch.full((1, 2, 2), -1.0), values), torch.tensor([0.0, 2.0])
    )


def test_settings_of_the_methods():
    built = {
        name: build("denoise", "observation")
        for name, build in RESTORATION_METHODS.items()
        if name not in SOLVER_METHODS
    }
    assert built == {
        "mmps": MMPS("denoise", "observation", iterations=1),
        "pigdm": PiGDM("denoise", "observation", data_std=0.5),
        "dps": DPS("denoise", "observation", step=1.0),
    }
    model = small(IntegerLevels(256))
    assert (num_steps_of(model, "mmps"), num_steps_of(model, "repaint", 20)) == (20, 20 * 4 + 2 * 3)


def test_restore_errors():
    model, image = small(IntegerLevels(256)), torch.zeros(1, 4, 4)
    with pytest.raises(ConfigError, match="'magic': no such method"):
        restore(model, Degradation((1, 4, 4), blur=1.0), image, 1, "magic")
    for degradation in (Degradation((1, 4, 4), blur=1.0), Degradation((1, 4, 4), known=LEFT.repeat(2), noise_std=0.1)):
        with pytest.raises(ConfigError, match="it fills in masked parts only"):
            restore(model, degradation, image, 1, "repaint")
    for degradation in (Degradation((1, 4, 4), blur=1.0), Degradation((1, 4, 4), shrink=2)):
        with pytest.raises(ConfigError, match=r"'product': it multiplies by a factor for each element, and blur and"):
            restore(model, degradation, image, 1, "product")


@pytest.mark.parametrize(
    ("item_shape", "transform"),
    [((1, 4), IntegerLevels(256)), ((2, 4, 4), IntegerLevels(256)), ((1, 4, 4), Identity())],
)
def test_only_grey_and_rgb_images_are_restored_from_files(item_shape, transform):
    assert check_image_model(small(IntegerLevels(256)), "here") == IntegerLevels(256)
    network = {"kind": "unet", "dims": len(item_shape) - 1, "widths": [8], "blocks": 1, "attention": []}
    with pytest.raises(ConfigError, match=r"error\[NOT_IMAGES\] here: its items are"):
        check_image_model(Diffusion(ModelConfig(network=network), item_shape, transform), "here")


def test_the_factor_of_product_is_the_noise_of_each_known_element():
    """r_s = N(alpha y, alpha² (noise² + floor²) + sigma²), and 1 where y is hidden; inpainting has no noise."""
    image, level = torch.tensor([[[[0.5, math.nan]]]]), small(Identity(), (1, 1, 2)).schedule(0.4)
    alpha, sigma = float(level.alpha), float(level.sigma)
    for noise_std, spread in ((0.0, 0.0), (0.4, 0.25)):
        factor = element_factor(Degradation((1, 1, 2), noise_std=noise_std, known=LEFT), image, floor=0.3)
        mean, log_var = (part.flatten().tolist() for part in factor(level))
        assert mean == pytest.approx([0.5 * alpha, 0.0])
        assert log_var == pytest.approx([math.log(alpha**2 * spread + sigma**2), math.inf])
    everywhere = element_factor(Degradation((1, 1, 2), noise_std=0.4), image.nan_to_num(0.1), floor=0.3)
    assert bool(torch.isfinite(everywhere(level).log_var).all())


def test_product_takes_the_steps_of_the_solver_with_the_factor(exact):
    """From the same noise, four steps down for each step of the grid; its distribution is that of `test_product`."""
    degradation, image = Degradation((1, 1, 2), known=LEFT, noise_std=0.4), torch.tensor([[[1.0, -9.0]]])
    answers = restore(exact, degradation, image, 5, "product", floor=0.3, batch=2)
    factor = observation_factor(torch.tensor([[[1.0, 0.0]]]), torch.log(torch.tensor([[[0.25, math.inf]]])))
    noise = ItemNoise(0, range(5), (1, 1, 2))
    start = noise(1)[0]
    solver, levels = Product(factor, exact.config.variance, 4), exact.noise_levels(Sampler(num_steps=20))
    *_, last = trajectory(exact.denoiser(), solver, levels, start, noise)
    torch.testing.assert_close(answers, last.x / last.level.alpha.float(), rtol=1e-5, atol=1e-6)

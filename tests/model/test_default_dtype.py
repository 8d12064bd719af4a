"""The numbers of a seed do not depend on torch's default dtype, which other libraries of a program may set."""

from functools import partial

import numpy as np
import pytest
import torch
from latent_models import tiny_latent_model
from tiny_run import equal_numbers, global_batch

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity
from undiffuse.evaluation.features import get_extractor
from undiffuse.model.config import ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.process import schedule as S
from undiffuse.training.augmentation import augment
from undiffuse.training.latents import latent_reader


def in_both(function):
    """The results of ``function`` with float32 and with float64 as the default."""
    results = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            results.append(function())
    finally:
        torch.set_default_dtype(torch.float32)
    return results


KINDS = [{"kind": kind} for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")]
TABLES = {"diffusers": [*KINDS, {"zero_end": True}], "tabulated": [{"beta": (0.1, 0.2, 1.0)}]}


@pytest.mark.parametrize("name", S.SCHEDULES)
def test_levels_of_schedules(name):
    times = [k / 40 for k in range(41)]
    for settings in TABLES.get(name, [{}]):

        def levels(settings=settings):
            torch.manual_seed(0)
            schedule = S.SCHEDULES[name](**settings)
            return torch.stack([schedule(t).log_snr.detach() for t in times])

        one, other = in_both(levels)
        assert one.dtype == other.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_estimates_and_samples():
    config = ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=20)
    model, values = Diffusion(config, (2,), Identity()), torch.tensor([[0.5, -1.0], [1.5, 0.2]])
    for estimate in ("discrete", "continuous", "ode"):
        nll = partial(model.nll, values, mc_samples=None if estimate == "ode" else 3, estimate=estimate)
        one, other = in_both(nll)
        assert torch.equal(one.total, other.total), estimate
    for call in (lambda: model.sample(2), lambda: model.to_noise(values)):
        assert torch.equal(*in_both(call))


def test_batches_of_training():
    values, settings = np.zeros((40, 1, 4, 4), np.uint8), TrainConfig(batch=30, conditional=True, condition_dropout=0.5)
    data = from_array(values, np.arange(40) % 3, num_values=5)
    one, other = in_both(lambda: global_batch(data, np.arange(40), settings, 3))
    assert equal_numbers(one, other) == [True] * 5
    assert torch.equal(one.cond.label, other.cond.label)
    places = np.arange(30 * 16).reshape(30, 1, 4, 4)
    flipped = in_both(lambda: augment(places, TrainConfig(batch=30, flip=True), 3))
    assert np.array_equal(*flipped)


def test_draws_of_latents_and_random_features():
    transform = tiny_latent_model().transform
    rows = np.random.default_rng(0).normal(size=(5, 1, 2, *transform.x_shape)).astype(np.float32)
    reader = latent_reader(transform, lambda items: rows[items])
    assert np.array_equal(*in_both(lambda: reader.read(np.arange(5), TrainConfig(batch=5), 2)))
    images = torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)
    assert torch.equal(*in_both(lambda: get_extractor("random_conv").build(images)(images)))

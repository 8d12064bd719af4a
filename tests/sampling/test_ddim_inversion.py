"""The noise of items under the flow: the closed form on Gaussian data, the inverse, and interpolation."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import GaussianData, MixtureData
from posterior_cases import COV, F64, MEAN, SHAPE, Net, random

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.prior import prior_scale
from undiffuse.process.schedule import finite_ends
from undiffuse.process.target import TARGETS
from undiffuse.sampling.ddim_inversion import ddim_generate, ddim_invert, finite_levels, slerp
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.time_grids import time_grid

SCHEDULES = {
    "log-SNR": S.LinearLogSNR(),
    "table": DS.cosine(200),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_noises_are_those_of_the_exact_flow_and_invert(name):
    schedule, data, x = SCHEDULES[name], GaussianData(MEAN, COV), random(3, *SHAPE)
    denoise, levels = data.denoiser(schedule), finite_levels(schedule, time_grid(schedule, 60))
    top, clean = finite_ends(schedule)
    assert [float(levels[0].t), float(levels[-1].t)] == [float(top.t), float(clean.t)]
    assert all(s.t < t.t for t, s in pairwise(levels))
    codes = ddim_invert(denoise, x, levels)
    exact = data.flow(clean.alpha * x, clean, top) / prior_scale(top)
    torch.testing.assert_close(codes, exact, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(ddim_generate(denoise, codes, levels), x, rtol=1e-4, atol=1e-4)


def test_inversion_error_falls_with_more_steps():
    schedule, x = S.LinearLogSNR(), random(4, *SHAPE)
    network = NetworkDenoiser(Net().double(), schedule, TARGETS["v"], Preconditioning(), learned_variance=True)
    mixture = MixtureData(torch.ones(2), random(2, *SHAPE, seed=1), torch.stack([COV, COV])).denoiser(schedule)
    for denoise in (network, mixture):
        errors = []
        for steps in (15, 60):
            levels = finite_levels(schedule, time_grid(schedule, steps))
            errors.append(float((ddim_generate(denoise, ddim_invert(denoise, x, levels), levels) - x).abs().max()))
        assert errors[1] < 1e-4
        assert errors[1] < errors[0] / 50  # order 4 would be 256


@pytest.mark.parametrize("transform", [IntegerLevels(256), Identity()])
def test_to_noise_and_from_noise(transform):
    torch.manual_seed(0)
    config = ModelConfig(
        network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()},
        schedule={"name": "linear_log_snr", "high": 6.0},
        chain_length=12,
    )
    model = Diffusion(config, (1, 4, 4), transform).eval()
    values = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    values = values.to(torch.uint8) if isinstance(transform, IntegerLevels) else values / 128 - 1
    noise = model.to_noise(values, num_steps=10)
    assert (noise.shape, noise.requires_grad) == ((3, 1, 4, 4), False)
    torch.testing.assert_close(model.from_noise(noise, num_steps=10), values, rtol=1e-3, atol=1e-3)
    levels = finite_levels(model.schedule, model.noise_levels(Sampler(num_steps=10)))
    torch.testing.assert_close(noise, ddim_invert(model.denoiser(), transform.to_model(values), levels))
    assert model.to_noise(values[:1]).shape == (1, 1, 4, 4)  # all 12 steps of the chain
    with pytest.raises(ConfigError, match="the model's chain has 12 steps"):
        model.to_noise(values[:1], num_steps=13)


def test_slerp():
    one, other = random(2, 3), random(2, 3, seed=1)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64)
    way = slerp(one, other, share)
    torch.testing.assert_close(way[[0, 3]], torch.stack([one, other]))
    torch.testing.assert_close(way[2] / way[2].norm(), (one + other) / (one + other).norm())
    at_right = slerp(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]), share)
    angle = share * math.pi / 2
    torch.testing.assert_close(at_right, 3 * torch.stack([torch.cos(angle), torch.sin(angle)], 1).float())
    sixty = slerp(torch.tensor([2.0, 0.0]), torch.tensor([1.0, math.sqrt(3)]), share)
    angle = share * math.pi / 3
    torch.testing.assert_close(sixty, 2 * torch.stack([torch.cos(angle), torch.sin(angle)], 1).float())
    for factor in (2.0, -1.0):
        line = one * (1 + (factor - 1) * share.reshape(-1, 1, 1))
        torch.testing.assert_close(slerp(one, factor * one, share), line)
    assert slerp(one.float(), other.float(), share).dtype == torch.float32

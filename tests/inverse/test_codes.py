"""Codes under the flow: the closed form on Gaussian data, the way back, and the arc between two."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import GaussianData, MixtureData
from test_posterior import COV, F64, MEAN, SHAPE, Net, random

from undiffuse.codec import Identity, Pixels
from undiffuse.config import ModelConfig
from undiffuse.denoiser import NetworkDenoiser, Preconditioning
from undiffuse.diffusion import Diffusion
from undiffuse.grids import grid
from undiffuse.inverse.codes import from_codes, inner, slerp, to_codes
from undiffuse.likelihood import finite_ends
from undiffuse.process import schedule as S
from undiffuse.process.target import TARGETS
from undiffuse.sample import prior_scale

SCHEDULES = {
    "log-SNR": S.LinearLogSNR(),
    "table": S.cosine(200),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_codes_are_those_of_the_exact_flow_and_lead_back(name):
    schedule, data, x = SCHEDULES[name], GaussianData(MEAN, COV), random(3, *SHAPE)
    denoise, levels = data.denoiser(schedule), inner(schedule, grid(schedule, 60))
    top, clean = finite_ends(schedule)
    assert [float(levels[0].t), float(levels[-1].t)] == [float(top.t), float(clean.t)]
    assert all(s.t < t.t for t, s in pairwise(levels))
    codes = to_codes(denoise, x, levels)
    exact = data.flow(clean.alpha * x, clean, top) / prior_scale(top)
    torch.testing.assert_close(codes, exact, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(from_codes(denoise, codes, levels), x, rtol=1e-4, atol=1e-4)


def test_networks_and_mixtures_lead_back_the_closer_the_finer():
    schedule, x = S.LinearLogSNR(), random(4, *SHAPE)
    network = NetworkDenoiser(Net().double(), schedule, TARGETS["v"], Preconditioning(), learned_variance=True)
    mixture = MixtureData(torch.ones(2), random(2, *SHAPE, seed=1), torch.stack([COV, COV])).denoiser(schedule)
    for denoise in (network, mixture):
        errors = []
        for steps in (15, 60):
            levels = inner(schedule, grid(schedule, steps))
            errors.append(float((from_codes(denoise, to_codes(denoise, x, levels), levels) - x).abs().max()))
        assert errors[1] < 1e-4
        assert errors[1] < errors[0] / 50  # order 4 would be 256


@pytest.mark.parametrize("codec", [Pixels(256), Identity()])
def test_a_model_encodes_and_decodes(codec):
    torch.manual_seed(0)
    config = ModelConfig(
        network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()},
        schedule={"name": "linear_log_snr", "high": 6.0},
        steps=12,
    )
    model = Diffusion(config, (1, 4, 4), codec).eval()
    values = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    values = values.to(torch.uint8) if isinstance(codec, Pixels) else values / 128 - 1
    code = model.encode(values, steps=10)
    assert (code.shape, code.requires_grad) == ((3, 1, 4, 4), False)
    torch.testing.assert_close(model.decode(code, steps=10), values, rtol=1e-3, atol=1e-3)
    levels = inner(model.schedule, model.walk(10))
    torch.testing.assert_close(code, to_codes(model.denoiser(), codec.encode(values), levels))
    assert model.encode(values[:1], steps=1000).shape == (1, 1, 4, 4)  # a chain of 12


def test_the_arc():
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

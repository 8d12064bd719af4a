"""The scale of samples of N(0, v): their standard deviation with the exact denoiser, over √v, without randomness."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import GaussianData
from test_affine import probe

from undiffuse.cli.sampler_options import QUALITIES
from undiffuse.evaluation.sampler_ranking import MORE_NOISE
from undiffuse.process.discrete_schedule import cosine
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import early_stop_times

SCHEDULE = cosine()


def scale(sampler: Sampler, variance: float) -> float:
    denoise = GaussianData(torch.zeros(1), torch.tensor([variance])).denoiser(SCHEDULE)
    levels = sampler.noise_levels(SCHEDULE)
    map_ = probe(sampler.build_solver(), denoise, levels, dims=1)
    start = float(levels[0].alpha ** 2 * variance + levels[0].sigma ** 2)
    return math.sqrt((float(map_.matrix[0, 0]) ** 2 * start + float((map_.noise**2).sum())) / variance)


@pytest.mark.parametrize(("quality", "most"), [("draft", 0.03), ("good", 0.02), ("best", 0.003)])
def test_the_default_samplers_keep_the_scale_of_standardized_data(quality, most):
    """A default of `MORE_NOISE` would not: see below."""
    assert abs(scale(QUALITIES[quality], 1.0) - 1) < most


@pytest.mark.parametrize(
    ("steps", "variance", "expected"),
    [(10, 1.0, 1.42), (25, 1.0, 1.10), (25, 0.1, 1.49), (100, 1.0, 1.005), (100, 0.1, 1.045), (1000, 0.1, 1.00)],
)
def test_more_noise_in_few_steps_widens_samples(steps, variance, expected):
    """The numbers of docs/choosing.md: the extrapolation of x̂ amplifies the noise of the steps before."""
    sampler = Sampler("dpm++3m_sde", steps, "uniform", {"eta": MORE_NOISE})
    assert scale(sampler, variance) == pytest.approx(expected, abs=0.006)
    assert scale(replace(sampler, settings={}), variance) < expected or steps == 1000


@pytest.mark.parametrize(
    ("steps", "eta", "log_snr", "variance", "expected"),
    [(10, MORE_NOISE, 3.0, 1.0, 1.303), (100, 2.0, 5.0, 1.0, 1.0), (100, 2.0, 5.0, 0.01, 0.777)],
)
def test_an_early_stop_removes_small_details(steps, eta, log_snr, variance, expected):
    times = early_stop_times(SCHEDULE, steps, log_snr)
    sampler = Sampler("dpm++3m_sde", steps, "early", {"eta": eta, "end": "low"}, times)
    assert scale(sampler, variance) == pytest.approx(expected, abs=0.002)

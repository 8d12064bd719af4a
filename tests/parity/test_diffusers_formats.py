"""Folders that diffusers itself writes, imported: equal outputs for every arrangement of blocks, and equal images.

It runs with `make test-release` where diffusers is installed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers_cases import CASES, GOLDEN, LABELS, SMALL, TIMES, inputs, theirs
from safetensors.torch import load_file

from undiffuse.interop.diffusers import import_diffusers
from undiffuse.interop.importing import import_model
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import last_step, trajectory

pytestmark = pytest.mark.release
SHAPE = (2, 1, 8, 8)


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import diffusers

            diffusers.UNet2DModel  # noqa: B018 (its modules are imported on use)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[parity]'")
    return diffusers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_an_arrangement_of_blocks_that_diffusers_wrote(diffusers, case, tmp_path):
    chain = {"variance_type": "learned_range"} if case == "learned variance" else {}
    diffusers.DDPMPipeline(theirs(CASES[case]), diffusers.DDPMScheduler(**chain)).save_pretrained(tmp_path)
    imported = import_model(tmp_path)
    print(case, [f"{check.what} {check.difference:.1e}" for check in imported.checks])
    assert [check.what for check in imported.checks] == ["outputs of the network", "alphas_cumprod"]
    assert all(check.difference is not None and check.holds for check in imported.checks)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_stored_outputs_are_those_of_the_installed_version(diffusers):
    for case, expected in load_file(GOLDEN).items():
        labels = torch.tensor(LABELS) if case == "classes" else None
        computed = theirs(CASES[case])(inputs(), torch.tensor(TIMES), class_labels=labels).sample
        torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def noise_of(seed: int):
    """The normal numbers that a pipeline draws from a generator with this seed: the start, then one for each step."""
    generator = torch.Generator().manual_seed(seed)

    def draw(draws: int) -> torch.Tensor:
        return torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(draws)])

    return draw


def draw_like_a_pipeline(model, solver: str, steps: int, seed: int = 3, **settings) -> torch.Tensor:
    """The images (2, 1, 8, 8) in [0, 1] that our solver draws from the numbers of `noise_of`."""
    sampler = Sampler(solver, steps, settings=settings)
    noise = noise_of(seed)
    states = trajectory(
        model.sampling_denoiser(sampler), model.build_solver(sampler), model.noise_levels(sampler), noise(1)[0], noise
    )
    return ((last_step(states).x + 1) / 2).clamp(0, 1)


CHAINS = {
    "eps, small": {},
    "eps, large": {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"},
    "x": {"prediction_type": "sample", "beta_schedule": "scaled_linear"},
    "v, zero end": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "learned variance": {"variance_type": "learned_range", "beta_schedule": "sigmoid"},
    "trained": {"trained_betas": [0.001 * (k + 1) for k in range(100)]},
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHAINS)
def test_the_images_of_ddpm_from_the_same_noise(diffusers, name, tmp_path):
    chain = {"num_train_timesteps": 100, "beta_end": 0.2, **CHAINS[name]}
    config = CASES["learned variance"] if "learned" in name else SMALL
    pipeline = diffusers.DDPMPipeline(theirs(config), diffusers.DDPMScheduler(**chain))
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=100, output_type="pt").images
    drawn = draw_like_a_pipeline(import_diffusers(tmp_path).model, "ancestral", 100)
    print(name, f"largest difference of images {float((drawn - expected).abs().max()):.1e}")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_images_of_ddim_from_the_same_noise(diffusers, tmp_path):
    chain = diffusers.DDIMScheduler(num_train_timesteps=100, beta_end=0.2)
    pipeline = diffusers.DDIMPipeline(theirs(SMALL), chain)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=100, output_type="pt").images
    drawn = draw_like_a_pipeline(import_diffusers(tmp_path).model, "ddim", 100)
    print(f"largest difference of images {float((drawn - expected).abs().max()):.1e}")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)

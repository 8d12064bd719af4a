"""Folders that diffusers itself writes, imported: equal outputs for every arrangement of blocks, and equal images.

It runs with `make test-release` where diffusers is installed.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from diffusers_cases import CASES, GOLDEN, LABELS, SMALL, TIMES, inputs, theirs
from diffusers_models import MODELS, model
from network_cases import randomized
from safetensors.torch import load_file

from undiffuse.data.transform import IntegerLevels
from undiffuse.interop.diffusers import VERSION, import_diffusers
from undiffuse.interop.diffusers_export import export_diffusers
from undiffuse.interop.importing import import_model
from undiffuse.model import presets
from undiffuse.model.diffusion import Diffusion
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
        return torch.randn((draws, *SHAPE), generator=generator) if draws else torch.empty(0, *SHAPE)

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
    assert expected.std() > 0.01


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_images_of_ddim_from_the_same_noise(diffusers, tmp_path):
    chain = diffusers.DDIMScheduler(num_train_timesteps=100, beta_end=0.2)
    pipeline = diffusers.DDIMPipeline(theirs(SMALL), chain)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 100, "use_clipped_model_output": True, "output_type": "pt"}
    expected = pipeline(2, torch.Generator().manual_seed(3), **options).images
    drawn = draw_like_a_pipeline(import_diffusers(tmp_path).model, "ddim", 100)
    print(f"largest difference of images {float((drawn - expected).abs().max()):.1e}")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_what_we_export_is_loaded_and_draws_the_same_images(diffusers, name, tmp_path):
    ours = model(name)
    checks = export_diffusers(ours, tmp_path / "ours")
    assert all(check.difference is not None and check.holds for check in checks)
    print(name, [f"{check.against} {check.difference:.1e}" for check in checks])
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (tmp_path / "ours", tmp_path / "theirs")]
    assert files[0] == files[1]
    for path in (tmp_path / "ours").rglob("*.*"):
        written = (tmp_path / "theirs" / path.relative_to(tmp_path / "ours")).read_bytes()
        version = f'"_diffusers_version": "{diffusers.__version__}"'.encode()
        mine = path.read_bytes().replace(f'"_diffusers_version": "{VERSION}"'.encode(), version)
        if path.suffix == ".json":
            written = re.sub(rb'  "_name_or_path": .*\n', b"", written)
        assert mine == written, path
    if name == "classes":  # DDPMPipeline gives no class
        return
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=20, output_type="pt").images
    drawn = draw_like_a_pipeline(ours, "ancestral", 20)
    print(name, f"largest difference of images {float((drawn - expected).abs().max()):.1e}")
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.01


CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
"""unet/config.json of google/ddpm-cifar10-32, written by diffusers 0.0.4."""


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_preset_of_cifar10_both_ways_at_full_size(diffusers, tmp_path):
    """Our preset has the fields of google/ddpm-cifar10-32, diffusers loads it, and its configuration is imported."""
    ours = Diffusion(presets.get("ddpm-cifar10").model, (3, 32, 32), IntegerLevels(256))
    randomized(ours.network)
    checks = export_diffusers(ours, tmp_path / "ours")
    print([f"{check.against} {check.difference:.1e}" for check in checks])
    assert all(check.difference is not None and check.holds for check in checks)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert {name: pipeline.unet.config[name] for name in CIFAR10} == CIFAR10
    expected = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "variance_type": "fixed_large"}
    assert {name: pipeline.scheduler.config[name] for name in expected} == expected
    theirs = diffusers.DDPMPipeline(diffusers.UNet2DModel(**CIFAR10), diffusers.DDPMScheduler(**expected))
    theirs.unet.load_state_dict(pipeline.unet.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_model(tmp_path / "theirs")
    print([f"{check.against} {check.difference:.1e}" for check in imported.checks])
    assert all(check.difference is not None and check.holds for check in imported.checks)
    x, time = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    one, two = ours.network(x, time), imported.model.network(x, time)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert sum(p.numel() for p in imported.model.network.parameters()) == 35_746_307

"""Files that the Trainer of denoising-diffusion-pytorch itself writes, imported: equal outputs and equal images.

It runs with `make test-release` where the package is installed.
"""

from __future__ import annotations

import warnings

import peer_packages
import pytest
import torch
from diffusers_cases import noise
from network_cases import randomized

from undiffuse.interop.denoising_diffusion import import_denoising_diffusion
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import trajectory

pytestmark = pytest.mark.release
SIDE, SMALL = 16, {"dim": 16, "dim_mults": (1, 2), "channels": 1, "attn_dim_head": 8}
UNETS = {
    "default": {},
    "three levels": {"dim_mults": (1, 2, 4), "full_attn": (False, True, True), "attn_heads": (1, 2, 4)},
    "first width": {"init_dim": 24},
    "wavelength": {"sinusoidal_pos_emb_theta": 500},
    "colour, self-conditioning": {"channels": 3, "self_condition": True},
}
OBJECTIVES = {
    "pred_v, sigmoid": {},
    "pred_noise, cosine": {"objective": "pred_noise", "beta_schedule": "cosine"},
    "pred_x0, linear, min-SNR": {"objective": "pred_x0", "beta_schedule": "linear", "min_snr_loss_weight": True},
    "pred_v, min-SNR": {"min_snr_loss_weight": True, "min_snr_gamma": 2},
}


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return peer_packages.import_denoising_diffusion()
        except ModuleNotFoundError as error:
            pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[peers]'")


def write(package, path, unet: dict, process: dict):
    """The model, and the file that a Trainer writes for it, without its data."""
    torch.manual_seed(0)
    network = package.Unet(**{**SMALL, **unet})
    model = package.GaussianDiffusion(network, image_size=SIDE, **{"timesteps": 1000, **process})
    randomized(model.model)
    with torch.no_grad():  # outputs of the size of images
        model.model.final_conv.weight.mul_(0.02)
    trainer = object.__new__(package.Trainer)
    trainer.accelerator = type("Accelerator", (), {"is_local_main_process": True, "scaler": None})()
    trainer.accelerator.get_state_dict = lambda model: model.state_dict()
    trainer.step, trainer.model, trainer.results_folder = 7, model, path.parent
    trainer.opt = torch.optim.Adam(model.parameters())
    from ema_pytorch import EMA  # pyright: ignore

    trainer.ema = EMA(model, beta=0.995)
    trainer.save(path.stem.removeprefix("model-"))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*UNETS, *OBJECTIVES])
def test_outputs_and_tables_are_equal(package, name, tmp_path):
    unet, process = UNETS.get(name, {}), OBJECTIVES.get(name, {})
    model = write(package, tmp_path / "model-1.pt", unet, process)
    setting = {key: value for key, value in unet.items() if key == "sinusoidal_pos_emb_theta"}
    imported = import_denoising_diffusion(tmp_path / "model-1.pt", size=SIDE, unpickle=True, setting=setting)
    print(name, [f"{check.what} {check.difference:.1e}" for check in imported.checks])
    assert all(check.difference is not None and check.holds for check in imported.checks)
    assert process.get("objective", "pred_v") in imported.notes[0]
    limit = process.get("min_snr_gamma", 5) if "min_snr_loss_weight" in process else None
    assert imported.model.config.weight == (
        {"name": "simple"} if limit is None else {"name": "min_snr", "limit": limit}
    )
    if "self_condition" in unet:
        return
    values = (noise("values", 8, model.channels, SIDE, SIDE) * 60 + 128).clamp(0, 255).to(torch.uint8)
    u, eps = (torch.arange(8) + 0.5) / 8, noise("eps", 8, model.channels, SIDE, SIDE)
    with torch.no_grad():  # the loss of the same steps and noise
        theirs = model.p_losses(values / 127.5 - 1, (u * 1000).long(), noise=eps)
        ours = imported.model.loss(values, u, eps).mean()
    print(name, f"loss {float(ours):.6g}, theirs {float(theirs):.6g}")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_images_from_the_same_noise(package, name, tmp_path):
    """Every state of p_sample_loop, in 100 steps."""
    model = write(package, tmp_path / "model-1.pt", {}, {**OBJECTIVES[name], "timesteps": 100})
    ours = import_denoising_diffusion(tmp_path / "model-1.pt", size=SIDE, unpickle=True).model
    shape = (2, 1, SIDE, SIDE)

    def draw(sampler: Sampler) -> list[torch.Tensor]:
        torch.manual_seed(3)
        start = torch.randn(shape)

        def draws(n: int) -> torch.Tensor:
            return torch.randn(shape)[None] if n else start[None][:0]

        chain = trajectory(
            ours.sampling_denoiser(sampler), ours.build_solver(sampler), ours.noise_levels(sampler), start, draws
        )
        return [(step.x + 1) / 2 for step in chain]

    torch.manual_seed(3)
    with torch.no_grad():
        theirs = model.p_sample_loop(shape, return_all_timesteps=True).unbind(1)
        mine = draw(Sampler("ancestral", 100))
    mine = mine[len(mine) - 101 :]
    differences = [float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True)]
    print(name, f"largest difference of a state {max(differences):.1e}, of images {differences[-1]:.1e}")
    assert max(differences) < 1e-4
    assert theirs[-1].std() > 0.01

"""AutoencoderKL of diffusers, written by diffusers itself, against ours: encoder and decoder to 1e-5.

It runs with `make test-release` where diffusers is installed.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch

from undiffuse.data.from_array import from_array
from undiffuse.interop.autoencoders import load_autoencoder

pytestmark = pytest.mark.release

DATA = from_array(np.random.default_rng(0).integers(256, size=(6, 3, 16, 24)), num_values=256, name="pictures")


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[parity]'")


@pytest.mark.parametrize(
    "settings",
    [
        {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "scaling_factor": 0.3, "shift_factor": 0.1},
        {"block_out_channels": (8, 16), "use_quant_conv": False, "use_post_quant_conv": False},
        {"block_out_channels": (16, 8), "mid_block_add_attention": False},
    ],
)
@torch.no_grad()
def test_a_folder_that_diffusers_wrote(theirs, settings, tmp_path):
    torch.manual_seed(0)
    stages = len(settings["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    their = theirs.AutoencoderKL(3, 3, **types, norm_num_groups=4, latent_channels=4, **settings).eval()
    their.save_pretrained(tmp_path)
    ours, x = load_autoencoder(tmp_path, DATA), torch.rand(2, 3, 16, 24) * 2 - 1
    mean, log_var = ours.encode(x)
    q = their.encode(x).latent_dist
    assert log_var is not None
    torch.testing.assert_close(mean, q.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_var, q.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(mean), their.decode(mean).sample, rtol=0, atol=1e-5)
    assert ours.info.get("scaling_factor", 0.18215) == settings.get("scaling_factor", 0.18215)

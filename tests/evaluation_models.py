"""Tiny models and data for tests of evaluation."""

import numpy as np
import torch
from torch import nn

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import DataTransform, IntegerLevels
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion

SCHEDULE = {"name": "linear_log_snr", "high": 8.0}
UNET = {"kind": "unet", "widths": [8], "blocks": 1, "attention": []}
MLP = {"kind": "mlp", "width": 8, "depth": 1}


def model_of(
    shape: tuple[int, ...], transform: DataTransform, steps=5, schedule=SCHEDULE, std=0.1, network=None, **info
) -> Diffusion:
    """A model of items of ``shape`` with random weights; ``network`` are further settings of it."""
    settings = (UNET if len(shape) > 1 else MLP) | (network or {})
    torch.manual_seed(0)
    config = ModelConfig(network=settings, chain_length=steps, schedule=schedule)
    model = Diffusion(config, shape, transform, info)
    for p in model.network.parameters():
        nn.init.normal_(p, std=std)
    return model.eval()


def integers(n=24, dims=20, num_values=256, **more):
    """Vectors of integers, of more dimensions than the exact divergence is used for."""
    values = np.random.default_rng(0).integers(num_values, size=(n, dims))
    return from_array(values, num_values=num_values, name="integers", **more)


def model_for(data, **more) -> Diffusion:
    """A model described as trained on ``data``, of which 0.4 were held out for testing and 0.4 for validation."""
    info = {"num_values": data.num_values, "fingerprint": data.fingerprint, "held_out": 0.4, "name": data.name}
    return model_of(data.item_shape, IntegerLevels(data.num_values), **(info | more))

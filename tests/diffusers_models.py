"""Models of ours that diffusers can express, with random weights; for the tests of the export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from network_cases import randomized

from undiffuse.data.transform import IntegerLevels
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion

HO = ModelConfig(
    network={"kind": "unet", "widths": (128, 128), "blocks": 1, "attention": (1,)},
    schedule={"name": "linear", "T": 20, "first": 0.001, "last": 0.5},
    target={"name": "eps"},
    weight={"name": "simple"},
    times={"name": "steps"},
    preconditioning={"scale": "none", "time": "step"},
    chain_length=20,
)
ADM = {"widths": (128, 128), "attention": (0,), "head_width": 64, "scale_shift": True, "residual_resampling": True}
MODELS: dict[str, dict[str, Any]] = {
    "ho": {},
    "heads": {"network": {**HO.network, "heads": 4}, "schedule": {"name": "cosine", "T": 20}},
    "adm": {
        "network": {"kind": "unet", "blocks": 1, **ADM},
        "loss": "hybrid",
        "variance": "learned",
        "schedule": {"name": "linear_rescaled", "T": 20, "limit": 0.5},
    },
    "classes": {
        "network": {"kind": "unet", "widths": (128,), "blocks": 1, "attention": (), "classes": 3},
        "target": {"name": "v"},
        "schedule": {"name": "quadratic", "T": 20, "first": 0.01, "last": 0.3},
        "variance": "large",
    },
    "own kind": {
        "network": {"kind": "diffusers-unet", "block_out_channels": (8, 16), "norm_num_groups": 4},
        "target": {"name": "x"},
        "schedule": {"name": "diffusers", "T": 20, "last": 0.4, "kind": "sigmoid"},
    },
}


def model(name: str = "own kind", **changes: Any) -> Diffusion:
    """A model of grey 8×8 images, of the row ``name`` of `MODELS`, with ``changes`` of its configuration."""
    diffusion = Diffusion(replace(HO, **{**MODELS[name], **changes}), (1, 8, 8), IntegerLevels(256))
    randomized(diffusion.network)
    return diffusion

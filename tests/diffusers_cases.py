"""Block arrangements of diffusers' UNet2DModel, their weights by name, and folders as diffusers writes them.

`python tests/diffusers_cases.py` writes the outputs of diffusers itself, with which `tests/interop/test_diffusers.py`
compares ours where it is missing; tests/parity does so with the installed version.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from undiffuse.interop.diffusers_names import to_diffusers
from undiffuse.networks.diffusers_unet import DiffusersUNet

GOLDEN = Path(__file__).parent / "data" / "golden" / "diffusers-outputs.safetensors"
SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
HO = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "attention_head_dim": None}
"""What google/ddpm-cifar10-32 and its like have; the case ``ddpm-cifar10`` has its levels, at 1/16 of the width."""
CHANGES = {
    "default": {},
    "ho": HO,
    "ddpm-cifar10": {
        **HO,
        "block_out_channels": [8, 16, 16, 16],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "levels": {
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 2,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
        "time_embedding_dim": 20,
    },
    "attention at the finest level": {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    },
    "residual resampling with attention": {
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
    },
    "residual resampling": {
        "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"],
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "norm of the middle's attention": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "scaled middle": {"mid_block_scale_factor": 1.4142},
    "middle without attention": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "classes": {"num_class_embeds": 3},
    "learned variance": {"out_channels": 2},
}
CASES = {name: {**SMALL, **changes} for name, changes in CHANGES.items()}
TIMES = [0, 37, 999]
LABELS = [2, 0, 1]


def noise(name: str, *shape: int) -> Tensor:
    """Normal numbers (shape) that are a function of ``name``."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(name: str, shape: torch.Size) -> Tensor:
    """The weight called ``name`` by diffusers."""
    tensor = noise(name, *shape)
    return tensor * 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else tensor / 2 + 0.5


def inputs() -> Tensor:
    return noise("x", len(TIMES), 1, 8, 8)


def settings(config: dict) -> dict:
    """The settings of `DiffusersUNet` for a configuration of a row of `CASES`."""
    kept = {name: value for name, value in config.items() if name not in ("sample_size", "in_channels")}
    classes = kept.pop("num_class_embeds", None)
    return {"channels": 1, **kept, **({"classes": classes} if classes else {})}


def write_folder(
    folder: Path, case: str = "default", chain: dict | None = None, rename=lambda name: name, **unet
) -> dict[str, Tensor]:
    """A pipeline's folder with weights by `weight`, which are returned; ``chain`` and ``unet`` change fields."""
    config = CASES[case]
    names = to_diffusers(network := DiffusersUNet(**settings(config)), network.state_dict())
    tensors = {name: weight(name, tensor.shape) for name, tensor in names.items()}
    kind = (chain or {}).pop("_class_name", "DDPMScheduler")
    for place, content in (
        ("model_index.json", {"_class_name": "DDPMPipeline"}),
        ("unet/config.json", {"_class_name": "UNet2DModel", "_diffusers_version": "0.42.1", **config, **unet}),
        ("scheduler/scheduler_config.json", {"_class_name": kind, "num_train_timesteps": 20, **(chain or {})}),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(json.dumps(content))
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return tensors


def theirs(config: dict):
    """diffusers' network of a configuration, with weights by `weight`."""
    from diffusers import UNet2DModel

    network = UNet2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weight(name, parameter.shape))
    return network


@torch.no_grad()
def main() -> None:
    outputs = {}
    for case, config in CASES.items():
        labels = torch.tensor(LABELS) if "num_class_embeds" in config else None
        outputs[case] = theirs(config)(inputs(), torch.tensor(TIMES), class_labels=labels).sample.contiguous()
    save_file(outputs, GOLDEN)


if __name__ == "__main__":
    main()

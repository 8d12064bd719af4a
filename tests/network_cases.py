"""Networks with random weights, and their inputs, for the tests of networks."""

from __future__ import annotations

import math

import torch
from torch import nn

from undiffuse.networks.condition import Condition
from undiffuse.networks.denoising_diffusion_unet import DenoisingDiffusionUNet
from undiffuse.networks.diffusers_unet import DiffusersUNet
from undiffuse.networks.dit import DiT
from undiffuse.networks.edm_unet import EDMUNet
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet

SMALL = {"widths": (8, 16), "blocks": 1, "attention": (1,), "heads": 2, "patch": 2}
DIFFUSERS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TRANSFORMER = {"patch": 2, "width": 12, "depth": 2, "heads": 2}
SONG = {"widths": (8, 16), "blocks": 1, "attention": (1,)}
PACKAGE = {"dim": 16, "dim_mults": (1, 2), "attn_heads": (2, 2), "attn_dim_head": (4, 4)}
SIZES = {"classes": 3, "vector": 4, "tokens": 5}
CASES = {
    "unet": lambda **more: UNet(2, classes=3, **{**SMALL, **more}),
    "shifted": lambda **more: UNet(2, classes=3, scale_shift=True, learned_resampling=False, **{**SMALL, **more}),
    "layered": lambda **more: UNet(2, classes=3, norm="layer", **{**SMALL, **more}),
    "text": lambda **more: UNet(2, classes=3, text=8, **{**SMALL, **more}),
    "diffusers": lambda **more: DiffusersUNet(2, classes=3, **{**DIFFUSERS, **more}),
    "dit": lambda **more: DiT(2, classes=3, **{**TRANSFORMER, **more}),
    "denoising-diffusion": lambda **more: DenoisingDiffusionUNet(2, classes=3, **{**PACKAGE, **more}),
    "edm": lambda **more: EDMUNet(2, classes=3, **{**SONG, **more}),
    "ncsn": lambda **more: EDMUNet(2, classes=3, architecture="ncsn++", **{**SONG, **more}),
    "mlp": lambda **more: MLP(2, width=16, depth=2, classes=3, **more),
    "all-conditions": lambda **more: UNet(2, **{**SMALL, **SIZES, **more}),
    "all-conditions-dit": lambda **more: DiT(2, bottleneck=5, **{**TRANSFORMER, **SIZES, **more}),
    "all-conditions-mlp": lambda **more: MLP(2, width=16, depth=2, **{**SIZES, **more}),
}


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with random weights, none of which are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (1.5 / math.sqrt(p[0].numel())))
    return network.eval()


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(case: str, n: int = 4) -> torch.Tensor:
    """x of ``n`` items for a row of `CASES`."""
    return noise(n, 2) if "mlp" in case else noise(n, 2, 5, 6)


def condition() -> Condition:
    """Of four items: labels and vectors, one of them null, sequences of 0 to 3 tokens, and texts of 0 to 3 bytes."""
    vector = noise(4, 4, seed=2)
    vector[1, 2] = math.nan
    mask = torch.arange(3) < torch.arange(4)[:, None]
    tokens, text = noise(4, 3, 5, seed=3), mask * torch.tensor([98, 1, 256])
    return Condition(label=torch.tensor([-1, 0, 1, 2]), vector=vector, tokens=tokens, mask=mask, text=text)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    return weights / weights.sum(-1, keepdim=True) @ v

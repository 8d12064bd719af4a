"""State dicts of improved-diffusion and guided-diffusion, whose flags are in no file: shapes tell some, --set the rest.

The network is that of `DiffusersUNet`. An average of weights (``ema_0.9999_*.pt``) is a file like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop.building import build_model, load_weights
from undiffuse.interop.flags import check_flags
from undiffuse.interop.foreign_files import read_weights
from undiffuse.interop.parity import LIMIT, Check, Imported
from undiffuse.networks.attention import Attention
from undiffuse.networks.diffusers_unet import DiffusersUNet
from undiffuse.networks.unet import Down, Residual, Up
from undiffuse.runtime.atomic_file import file_digest

FLAGS: dict[str, Any] = {
    "num_heads": 4,
    "num_head_channels": -1,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": None,
    "predict_xstart": False,
    "sigma_small": False,
    "use_new_attention_order": False,
    "dropout": 0.0,
}
"""The flags of a model that its shapes do not determine, with the defaults of guided-diffusion. That of
rescale_timesteps differs between the two packages, and matters unless there are 1000 steps."""
SCHEDULES = {"linear": "linear_rescaled", "cosine": "cosine"}
PARTS = {
    Residual: {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "cond": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    Attention: {"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    Down: {"layer": "op"},
    Up: {"layer": "conv"},
}
"""Modules of a layer with weights, and what these packages call them."""
OUTER = {
    "embed.fc1": "time_embed.0",
    "embed.fc2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "norm": "out.0",
    "conv_out": "out.2",
}
LABEL, LABEL_EMBEDDING = "embed.label.weight", "label_emb.weight"


def import_openai(
    source: str | Path,
    size: int | None = None,
    values: int = 256,
    unpickle: bool = False,
    setting: Mapping[str, Any] | None = None,
) -> Imported:
    """The model of the state dict in the file ``source``, of square images of ``size``.

    ``setting`` has the flags of `FLAGS` that the model was trained with and that are not the default. Raises
    `CheckpointError` and `ConfigError`.
    """
    path, flags = Path(source), check_openai_flags(setting or {})
    if size is None:
        raise ConfigError("SIZE", path, "its image_size is in no file", "Give size=64, or the size it was trained on")
    tensors = read_weights(path, unpickle).tensors
    try:
        shape, network = infer_network(tensors)
    except (LookupError, ValueError, IndexError) as error:
        cause = f"not a state dict of improved- or guided-diffusion ({error})"[:300]
        fix = "Give the file of weights, such as ema_0.9999_250000.pt, not that of the optimizer"
        raise CheckpointError("DESCRIPTION", path, cause, fix) from None
    info = {"name": path.stem, "num_values": values}
    info["imported"] = {"from": "openai", "weights": file_digest(path), "flags": flags}
    learned, T = shape["out"] == 2 * shape["in"], flags["diffusion_steps"]
    heads = {"attention_head_dim": flags["num_head_channels"]}
    if flags["num_head_channels"] == -1:
        heads = {"num_heads": flags["num_heads"]}
    model_settings = {
        "network": {"kind": "diffusers-unet", **network, **heads, "dropout": flags["dropout"]},
        "schedule": {"name": SCHEDULES[flags["noise_schedule"]], "T": T},
        "target": {"name": "x" if flags["predict_xstart"] else "eps"},
        "weight": {"name": "simple"},
        "times": {"name": "steps"},
        "preconditioning": {"scale": "none", "time": "rescaled_step" if flags["rescale_timesteps"] else "step"},
        "chain_length": T,
        "loss": "hybrid" if learned else "weighted_mse",
        "variance": "learned" if learned else "small" if flags["sigma_small"] else "large",
    }
    model = build_model(path, model_settings, (shape["in"], size, size), values, info, "Check the flags of --set")
    assert isinstance(model.network, DiffusersUNet)
    named = to_own_names(model.network, tensors, flags["use_new_attention_order"])
    load_weights(path, model, named)
    against = "nothing: the packages are not on the package index. tests/interop/test_openai.py has their forward pass"
    notes = ["flags: " + ", ".join(f"{name} {value}" for name, value in flags.items())]
    checks = [Check("outputs of the network", against, None, LIMIT)]
    return Imported(model, checks, notes, f"--solver ancestral --steps {T}")


def check_openai_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """`FLAGS` with those ``given``. Raises `ConfigError` for an unknown flag or value."""
    flags = check_flags(FLAGS, given)
    if flags["noise_schedule"] not in SCHEDULES:
        cause = f"{flags['noise_schedule']!r} is unknown"
        raise ConfigError("FLAG", "--set noise_schedule", cause, f"Use {' or '.join(SCHEDULES)}")
    if flags["rescale_timesteps"] is None:
        if flags["diffusion_steps"] != 1000:
            cause = "it is needed unless there are 1000 steps, and the two packages have different defaults"
            raise ConfigError("FLAG", "rescale_timesteps", cause, "Give --set rescale_timesteps=true or false")
        flags["rescale_timesteps"] = False
    return flags


def infer_network(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Any]]:
    """Numbers of channels ``in`` and ``out``, and settings of the network, from the names and shapes of its weights.

    The way up tells where a level ends: its last block has an upsampling, or a residual block in its place.
    """
    if "output_blocks.0.0.in_layers.2.weight" not in tensors:
        raise ValueError("it has no output_blocks")
    levels, block, width, attends, resampling, blocks = [], 0, 0, False, "conv", []
    for number in itertools.count():
        stage = f"output_blocks.{number}."
        if f"{stage}0.in_layers.2.weight" not in tensors:
            break
        width = len(tensors[f"{stage}0.out_layers.3.weight"])
        attends = f"{stage}1.qkv.weight" in tensors
        last = f"{stage}{1 + attends}."
        is_residual = f"{last}in_layers.2.weight" in tensors
        resampling = "resnet" if is_residual else resampling
        block += 1
        if is_residual or f"{last}conv.weight" in tensors:
            levels.append((width, attends))
            blocks.append(block)
            block = 0
    levels.append((width, attends))
    blocks.append(block)
    if len(set(blocks)) > 1 or blocks[0] < 2:
        raise ValueError(f"its levels have {blocks} blocks")
    levels = levels[::-1]
    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    types = [("AttnDownBlock2D", "AttnUpBlock2D") if attends else plain[resampling] for _, attends in levels]
    embedding = tensors["input_blocks.1.0.emb_layers.1.weight"]
    is_scaled = len(embedding) == 2 * len(tensors["input_blocks.1.0.out_layers.3.weight"])
    settings = {
        "block_out_channels": [width for width, _ in levels],
        "layers_per_block": blocks[0] - 1,
        "down_block_types": [down for down, _ in types],
        "up_block_types": [up for _, up in types[::-1]],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if is_scaled else "default",
        "time_embedding_dim": embedding.shape[1],
    }
    if LABEL_EMBEDDING in tensors:
        settings["classes"] = len(tensors[LABEL_EMBEDDING])
    return {"in": tensors["input_blocks.0.0.weight"].shape[1], "out": len(tensors["out.2.weight"])}, settings


def to_own_names(network: DiffusersUNet, tensors: Mapping[str, Tensor], is_new_order: bool) -> dict[str, Tensor]:
    """``tensors`` under the names of ``network``; those that it has no name for keep theirs.

    In the old order each head has its q, k and v in turn; ours has q, k and v of all heads, as the new order.
    """
    rest, named = dict(tensors), {}
    for own, theirs, heads in _names(network):
        if theirs not in rest:
            continue
        tensor = rest.pop(theirs)
        if heads:
            tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
            if heads > 1 and not is_new_order and own.split(".")[-2] == "qkv" and len(tensor) % (3 * heads) == 0:
                tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        named[own] = tensor
    if LABEL_EMBEDDING in rest:
        rows = rest.pop(LABEL_EMBEDDING)
        named[LABEL] = torch.cat([torch.zeros_like(rows[:1]), rows])
    return rest | named


def _names(network: DiffusersUNet) -> Iterator[tuple[str, str, int]]:
    """(our name, their name, heads of a layer with attention, else 0) of every tensor but the labels' rows."""
    modules = [(own, theirs, 0) for own, theirs in OUTER.items()]
    stages = [(f"down.{i}", f"input_blocks.{i + 1}") for i in range(len(network.down))]
    stages += [("middle", "middle_block"), *((f"up.{i}", f"output_blocks.{i}") for i in range(len(network.up)))]
    for own, theirs in stages:
        for position, layer in enumerate(network.get_submodule(own).children()):
            parts, heads = PARTS[type(layer)], layer.heads if isinstance(layer, Attention) else 0
            modules += [(f"{own}.{position}.{a}", f"{theirs}.{position}.{b}", heads) for a, b in parts.items()]
    for own, theirs, heads in modules:
        for name, _ in network.get_submodule(own).named_parameters(recurse=False):
            yield f"{own}.{name}", f"{theirs}.{name}", heads

"""Names of the weights of a U-Net in diffusers' UNet2DModel, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from undiffuse.networks.attention import Attention
from undiffuse.networks.unet import Down, Residual, UNet, Up

PARTS = {
    Residual: {
        "norm1": "norm1",
        "conv1": "conv1",
        "cond": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    Attention: {"norm": "group_norm", "proj": "to_out.0"},
    Down: {"layer": "conv"},
    Up: {"layer": "conv"},
}
"""Modules of a layer with weights, and what diffusers calls them; `QKV` come in addition."""
QKV = ("to_q", "to_k", "to_v")
"""What diffusers has in place of ``qkv`` of `Attention`, which is the three in this order."""
OUTER = {
    "embed.fc1": "time_embedding.linear_1",
    "embed.fc2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm": "conv_norm_out",
    "conv_out": "conv_out",
}
LABEL, CLASS_EMBEDDING = "embed.label.weight", "class_embedding.weight"
"""Our rows are one more: the first is that of the null label."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention layers in older files of diffusers."""


def renamed_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with today's names and shapes of attention layers; in old files these can be 1×1 convolutions."""
    pattern = re.compile(r"(attentions\.\d+\.)(query|key|value|proj_attn)\b")
    renamed = {pattern.sub(lambda m: m[1] + OLD_ATTENTION[m[2]], name): t for name, t in tensors.items()}
    for name, tensor in renamed.items():
        if re.search(r"attentions\.\d+\.to_.*weight$", name) and tensor.ndim == 4:
            renamed[name] = tensor[:, :, 0, 0]
    return renamed


def to_diffusers(network: UNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights ``tensors`` of ``network`` under diffusers' names, without the row of the null label."""
    named = {}
    for own, theirs in tensor_names(network):
        parts = tensors[own].chunk(len(theirs)) if len(theirs) > 1 else [tensors[own]]
        named |= dict(zip(theirs, parts, strict=True))
    if LABEL in tensors:
        named[CLASS_EMBEDDING] = tensors[LABEL][1:]
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


def from_diffusers(network: UNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights ``tensors`` under the names of ``network``; those that it has no name for keep theirs.

    A part of `QKV` that is missing leaves all three out. The row of the null label is zero.
    """
    rest = dict(tensors)
    named = {}
    for own, theirs in tensor_names(network):
        if all(name in rest for name in theirs):
            parts = [rest.pop(name) for name in theirs]
            named[own] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if network.embed.label is not None and CLASS_EMBEDDING in rest:
        rows = rest.pop(CLASS_EMBEDDING)
        named[LABEL] = torch.cat([torch.zeros_like(rows[:1]), rows])
    return rest | named


def tensor_names(network: UNet) -> Iterator[tuple[str, list[str]]]:
    """(our name, diffusers' names) of every tensor but the label's rows."""
    modules = list(OUTER.items())
    for own, theirs, layer in _layers(network):
        modules += [(f"{own}.{name}", f"{theirs}.{other}") for name, other in PARTS[type(layer)].items()]
        if isinstance(layer, Attention):
            modules.append((f"{own}.qkv", f"{theirs}.{QKV[0]} {theirs}.{QKV[1]} {theirs}.{QKV[2]}"))
    for own, theirs in modules:
        for name, _ in network.get_submodule(own).named_parameters(recurse=False):
            yield f"{own}.{name}", [f"{other}.{name}" for other in theirs.split()]


def _layers(network: UNet) -> Iterator[tuple[str, str, nn.Module]]:
    """(our prefix, diffusers' prefix, layer) of every layer with weights in the stages of ``network``."""
    for stages, blocks, resampler in (("down", "down_blocks", "downsamplers"), ("up", "up_blocks", "upsamplers")):
        level = block = 0
        for number, stage in enumerate(network.get_submodule(stages).children()):
            resampled = False
            for position, layer in enumerate(stage.children()):
                resampling = layer.resampling if isinstance(layer, Residual) else layer
                is_resampler = isinstance(resampling, Down | Up)
                kind = "attentions" if isinstance(layer, Attention) else "resnets"
                place = f"{resampler}.0" if is_resampler else f"{kind}.{block}"
                yield f"{stages}.{number}.{position}", f"{blocks}.{level}.{place}", layer
                resampled |= is_resampler
            level, block = (level + 1, 0) if resampled else (level, block + 1)
    counts = {"resnets": 0, "attentions": 0}
    for position, layer in enumerate(network.middle):
        if type(layer) in PARTS:
            kind = "attentions" if isinstance(layer, Attention) else "resnets"
            yield f"middle.{position}", f"mid_block.{kind}.{counts[kind]}", layer
            counts[kind] += 1

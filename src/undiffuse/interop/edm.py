"""State dicts of EDM's networks (SongUNet as DDPM++ and NCSN++, DhariwalUNet), with its preconditioning.

EDM's own files are pickles of code and are not read: ``torch.save(net.state_dict(), FILE)`` where EDM is installed
writes one that is. Names and shapes tell the network and the size of the images; `FLAGS` are the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop.building import build_model, load_weights
from undiffuse.interop.flags import check_flags
from undiffuse.interop.foreign_files import read_weights
from undiffuse.interop.parity import LIMIT, Check, Imported
from undiffuse.networks.attention import Attention
from undiffuse.networks.edm_unet import FILTER, EDMUNet
from undiffuse.networks.unet import Residual
from undiffuse.runtime.atomic_file import file_digest

FLAGS: dict[str, Any] = {
    "precond": "edm",
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "P_mean": -1.2,
    "P_std": 1.2,
    "dropout": 0.0,
}
"""What no tensor tells: the preconditioning, the range of noise levels in sampling, and that of training."""
MARK = "map_layer0.weight"
RESIDUAL = {"norm1": "norm0", "conv1": "conv0", "cond": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"}
ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}
"""Modules of a layer with weights, and what a block of EDM's code calls them."""
LABEL, MAP_LABEL, AUGMENT = "embed.label.weight", "map_label.weight", "map_augment.weight"
NOT_SUPPORTED = {
    "aux_skip": "its way down has input skips",
    "aux_up": "its way up has output skips",
}
"""Parts of names, and what they say of a network that `EDMUNet` is not."""
FREQS, INPUT = "map_noise.freqs", "aux_residual"
"""What NCSN++ has, and the others do not."""
FILTERS = {False: (0.5, 0.5), True: FILTER}
"""The filter of resampling along an axis, of NCSN++ (True) and of the others."""
SUPPORTED = "Give net.state_dict() of an EDMPrecond with a SongUNet (DDPM++ or NCSN++) or a DhariwalUNet"


def import_edm(
    source: str | Path,
    size: int | None = None,
    values: int = 256,
    unpickle: bool = False,
    setting: Mapping[str, Any] | None = None,
) -> Imported:
    """The model of the state dict in the file ``source``; ``setting`` has flags of `FLAGS` that are not the default.

    ``size`` is that of the names, and need not be given. Raises `CheckpointError` and `ConfigError`.
    """
    path, flags = Path(source), check_flags(FLAGS, setting or {})
    if flags["precond"] != "edm":
        cause = f"{flags['precond']!r} is not supported"
        raise ConfigError("FLAG", "--set precond", cause, "Only models with EDMPrecond can be imported")
    tensors = select(read_weights(path, unpickle).tensors)
    try:
        shape, network = infer_network(tensors)
    except (LookupError, ValueError) as error:
        cause = f"not a state dict of EDM's networks ({error})"[:300]
        raise CheckpointError("DESCRIPTION", path, cause, SUPPORTED) from None
    if size is not None and size != shape["size"]:
        raise ConfigError("SIZE", path, f"its images have the size {shape['size']}, not {size}", "Leave size out")
    sigma_data = float(flags["sigma_data"])
    info = {"name": path.stem, "num_values": values}
    info["imported"] = {"from": "edm", "weights": file_digest(path), "flags": flags}
    model_settings = {
        "network": {"kind": "edm-unet", **network, "dropout": flags["dropout"]},
        "schedule": {"name": "variance_exploding", **{name: flags[name] for name in ("sigma_min", "sigma_max")}},
        "target": {"name": "edm", "sigma_data": sigma_data},
        "weight": {"name": "edm", "sigma_data": sigma_data},
        "times": {"name": "log_normal_sigma", "mean": flags["P_mean"], "std": flags["P_std"]},
        "preconditioning": {"scale": "unit", "time": "log_sigma", "sigma_data": sigma_data},
    }
    model = build_model(
        path, model_settings, (shape["in"], shape["size"], shape["size"]), values, info, "Check the flags of --set"
    )
    assert isinstance(model.network, EDMUNet)
    named = to_own_names(model.network, tensors, shape["size"])
    load_weights(path, model, named)
    against = "nothing: EDM is not on the package index. tests/interop/test_edm.py has its forward pass"
    notes = ["flags: " + ", ".join(f"{name} {value}" for name, value in flags.items())]
    notes.append("EDM's sampler does not clip predicted images; undiffuse sample clips them to the range of the values")
    if AUGMENT in tensors:
        notes.append("the weights of augmentation labels are left out: the network gets none, as in EDM's sampling")
    checks = [Check("outputs of the network", against, None, LIMIT)]
    return Imported(model, checks, notes, "--solver heun --set variable=ratio --spacing karras --steps 18")


def select(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one network, of the averaged one if there are several, without what precedes their names."""
    found = sorted((name for name in tensors if name.endswith(MARK)), key=lambda name: ("ema" not in name, name))
    prefix = found[0].removesuffix(MARK) if found else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def infer_network(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, Any]]:
    """Numbers of channels ``in`` and the ``size``, and settings of the network. Raises LookupError, ValueError."""
    for part, cause in NOT_SUPPORTED.items():
        if any(part in name for name in tensors):
            raise ValueError(cause)
    sizes = [int(match[1]) for name in tensors if (match := re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", name))]
    if len(sizes) != 1:
        raise ValueError("it has no first convolution enc.32x32_conv")
    size, widths, attention, blocks = sizes[0], [], [], set()
    for level in range(size.bit_length()):
        stage = f"enc.{size >> level}x{size >> level}_block"
        number = 0
        while f"{stage}{number}.conv0.weight" in tensors:
            number += 1
        if not number:
            break
        blocks.add(number)
        widths.append(len(tensors[f"{stage}0.conv0.weight"]))
        attention += [level] if f"{stage}0.qkv.weight" in tensors else []
    if len(blocks) != 1:
        raise ValueError(f"its levels have {sorted(blocks)} blocks")
    is_ncsn = FREQS in tensors
    if is_ncsn != any(INPUT in name for name in tensors) and len(widths) > 1:
        raise ValueError("it is neither DDPM++ nor NCSN++: it has one of random frequencies and residual inputs")
    kernel = torch.tensor(FILTERS[is_ncsn])
    for name, tensor in tensors.items():
        if name.endswith("resample_filter") and not torch.equal(tensor, (kernel[:, None] * kernel)[None, None]):
            raise ValueError(f"{name} is not that of {'NCSN++' if is_ncsn else 'DDPM++ and ADM'}")
    first = tensors[f"enc.{size}x{size}_conv.weight"]
    is_adm = "out_conv.weight" in tensors
    out = tensors["out_conv.weight" if is_adm else f"dec.{size}x{size}_aux_conv.weight"]
    if len(out) != first.shape[1]:
        raise ValueError(f"it has {first.shape[1]} channels of input and {len(out)} of output")
    settings = {
        "architecture": "adm" if is_adm else "ncsn++" if is_ncsn else "ddpm++",
        "widths": widths,
        "blocks": blocks.pop(),
        "attention": attention,
        "start_width": len(first),
        "features": tensors[MARK].shape[1],
        "time_width": len(tensors[MARK]),
    }
    if MAP_LABEL in tensors:
        settings["classes"] = tensors[MAP_LABEL].shape[1]
    return {"in": first.shape[1], "size": size}, settings


def to_own_names(network: EDMUNet, tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """``tensors`` under the names of ``network``; those that it has no name for keep theirs.

    Their q, k and v of a channel of a head follow each other; ours are q of all heads, then k, then v. The rows of
    labels are what the layer map_label adds for each, and for none.
    """
    rest = {name: t for name, t in tensors.items() if not name.endswith("resample_filter") and name != AUGMENT}
    named = {}
    for own, theirs, heads in tensor_names(network, size):
        if theirs not in rest:
            continue
        tensor = rest.pop(theirs)
        if heads:
            tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
            if own.split(".")[-2] == "qkv" and len(tensor) % (3 * heads) == 0:
                tensor = tensor.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
        named[own] = tensor
    if MAP_LABEL in rest:
        rows = rest.pop(MAP_LABEL).T
        rows = torch.cat([torch.zeros_like(rows[:1]), rows * (len(rows) ** 0.5 if network.embed.label_first else 1)])
        named[LABEL] = rows + rest.pop("map_label.bias", torch.zeros(()))
    return rest | named


def tensor_names(network: EDMUNet, size: int) -> Iterator[tuple[str, str, int]]:
    """(our name, their name, heads of a layer with attention, else 0) of every tensor but the labels' rows."""
    is_adm = not network.embed.label_first
    end, sides = ("out_" if is_adm else f"dec.{size}x{size}_aux_"), f"{size}x{size}"
    modules = [
        ("embed.fc1", "map_layer0", 0),
        ("embed.fc2", "map_layer1", 0),
        ("conv_in", f"enc.{sides}_conv", 0),
        ("norm", f"{end}norm", 0),
        ("conv_out", f"{end}conv", 0),
    ]
    if network.inputs is not None:
        yield "embed.waves.freqs", FREQS, 0
        sides = [f"{size >> level}x{size >> level}" for level in range(1, len(network.inputs) + 1)]
        modules += [(f"inputs.{i}.conv", f"enc.{side}_{INPUT}", 0) for i, side in enumerate(sides)]
    for own, theirs, layer in _blocks(network, size):
        is_attention = isinstance(layer, Attention)
        names, heads = (ATTENTION, layer.heads) if is_attention else (RESIDUAL, 0)
        modules += [(f"{own}.{a}", f"{theirs}.{b}", heads if a != "norm" else 0) for a, b in names.items()]
    for own, theirs, heads in modules:
        for name, _ in network.get_submodule(own).named_parameters(recurse=False):
            yield f"{own}.{name}", f"{theirs}.{name}", heads


def _blocks(network: EDMUNet, size: int) -> Iterator[tuple[str, str, Residual | Attention]]:
    """(our prefix, name of the block in EDM's code, layer) of every residual layer and every attention."""
    for own, side, resampled in (("down", "enc", "down"), ("middle", "dec", ""), ("up", "dec", "up")):
        coarsest = size >> (network.multiple.bit_length() - 1)
        at, number = (size if side == "enc" else coarsest), -1
        stages = [network.middle] if own == "middle" else list(network.get_submodule(own).children())
        place = ""
        for index, stage in enumerate(stages):
            for position, layer in enumerate(stage.children()):
                if not isinstance(layer, Residual | Attention):
                    continue
                if isinstance(layer, Residual):
                    if not isinstance(layer.resampling, nn.Identity):
                        at = at // 2 if side == "enc" else at * 2
                        number, name = -1, resampled
                    else:
                        number += 1
                        name = f"{'in' if own == 'middle' else 'block'}{number}"
                    place = f"{side}.{at}x{at}_{name}"
                yield (f"middle.{position}" if own == "middle" else f"{own}.{index}.{position}"), place, layer

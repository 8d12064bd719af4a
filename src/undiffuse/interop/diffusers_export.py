"""A model as a folder that diffusers' DDPMPipeline loads, of exactly the files that diffusers writes."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from undiffuse.data.transform import BOUNDED
from undiffuse.errors import ConfigError
from undiffuse.interop.diffusers import (
    CHAIN,
    CHAIN_CONFIGS,
    TARGETS,
    UNET,
    UNET_CONFIGS,
    VERSION,
    WEIGHTS,
    check_unet,
)
from undiffuse.interop.diffusers_names import from_diffusers, to_diffusers
from undiffuse.interop.parity import LIMIT, Check, network_difference, steps_of
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.networks.diffusers_unet import DiffusersUNet
from undiffuse.networks.norm import GroupNorm
from undiffuse.networks.unet import UNet
from undiffuse.process.discrete_schedule import Tabulated, diffusers
from undiffuse.runtime.atomic_file import write_atomic

VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
TABLES = {"linear": "linear", "quadratic": "scaled_linear"}
"""Rows of `SCHEDULES` with the same arguments as a beta_schedule of diffusers."""
COMPONENTS = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
TABLE_LIMIT = 1e-6
"""The largest accepted difference of the signal's variance: that of float32, in which diffusers computes its table."""


def export_diffusers(model: Diffusion, folder: Path) -> list[Check]:
    """Write the pipeline of ``model`` into ``folder``, and return how far its outputs are from the model's.

    Raises `ConfigError` for what diffusers cannot express, before anything is written.
    """
    check_expressible(model)
    network = model.network
    assert isinstance(network, UNet)
    unet, chain = unet_fields(model, network), chain_fields(model)
    tensors = {name: tensor.cpu() for name, tensor in to_diffusers(network, network.state_dict()).items()}
    checks = [check_network(model, unet, tensors), check_table(model, chain)]
    for place, kind, fields in (
        (CHAIN_CONFIGS[0], "DDPMScheduler", chain),
        (UNET_CONFIGS[0], "UNet2DModel", unet),
        ("model_index.json", "DDPMPipeline", COMPONENTS),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        content = {"_class_name": kind, "_diffusers_version": VERSION, **fields}
        write_atomic(folder / place, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        if place == UNET_CONFIGS[0]:
            write_atomic(folder / "unet" / WEIGHTS[0], save(tensors, {"format": "pt"}))
    return [*checks, *check_with_diffusers(model, folder)]


def check_expressible(model: Diffusion) -> None:
    """Raises `ConfigError` for the first part of ``model`` that a DDPMPipeline does not have."""
    config, network = model.config, model.config.network
    needed = [
        ("output", config.output, config.output == "values", "values"),
        ("network.kind", network.get("kind"), isinstance(model.network, UNet), "unet or diffusers-unet"),
        ("items", model.item_shape, len(model.item_shape) == 3, "images"),
        ("transform", type(model.transform).__name__, isinstance(model.transform, BOUNDED), "values with a range"),
        ("calls", config.calls, not config.calls, "a model that is not distilled"),
        ("target", config.target["name"], config.target["name"] in TARGETS.values(), ", ".join(TARGETS.values())),
        ("schedule", config.schedule["name"], isinstance(model.schedule, Tabulated), "a table, such as linear"),
    ]
    inputs = {name: config.preconditioning.get(name) for name in ("scale", "time")}
    needed.append(("preconditioning", inputs, inputs == {"scale": "none", "time": "step"}, "scale none, time step"))
    unused: dict[str, Any] = {"num_heads": 0, "patch": 1, "norm": "group", "fourier": (), "two_times": False}
    unused |= {"vector": 0, "tokens": 0, "image": 0, "text": 0}
    for name, value in unused.items():
        own = network.get(name, value)
        own = tuple(own) if isinstance(own, list) else own
        needed.append((f"network.{name}", own, own == value, repr(value)))
    for name, own, holds, fix in needed:
        if not holds:
            raise _not_expressible(name, own, fix)


def _not_expressible(name: str, value: object, supported: str) -> ConfigError:
    cause = "diffusers' UNet2DModel and DDPMPipeline do not support it"
    return ConfigError("EXPORT", f"model.{name} = {value!r}", cause, f"Supported: {supported}")


def unet_fields(model: Diffusion, network: UNet) -> dict[str, Any]:
    """The fields of ``unet/config.json``. Raises `ConfigError`."""
    own = dict(model.config.network)
    if isinstance(network, DiffusersUNet):
        parameters = inspect.signature(DiffusersUNet).parameters
        fields = {name: own.get(name, parameters[name].default) for name in UNET if name in parameters}
    else:
        fields = _fields_of_unet(own, network)
    height, width = model.item_shape[1:]
    if height % network.multiple or width % network.multiple:
        raise _not_expressible("item_shape", model.item_shape, f"sides that are multiples of {network.multiple}")
    fields["sample_size"] = height if height == width else [height, width]
    fields["in_channels"] = model.item_shape[0]
    fields["out_channels"] = model.item_shape[0] * (2 if model.learned_variance else 1)
    fields["num_class_embeds"] = own.get("classes") or None
    return {**UNET, **{name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}}


def _fields_of_unet(own: dict[str, Any], network: UNet) -> dict[str, Any]:
    """Those of the settings ``own`` of a `UNet`, of Ho's or of Dhariwal's arrangement."""
    settings = {name: p.default for name, p in inspect.signature(UNet).parameters.items()} | own
    widths, attention = list(settings["widths"]), set(settings["attention"])
    residual = settings["residual_resampling"]
    if not residual and not settings["learned_resampling"]:
        raise _not_expressible("network.learned_resampling", False, "True")
    if network.embed.features != widths[0]:
        raise _not_expressible("network.widths", widths, "an even number from 4 as the first")
    heads, head = settings["heads"], settings["head_width"] or None
    if heads > 1:
        head, *others = {widths[level] // heads for level in {*attention, len(widths) - 1}}
        if others:
            raise _not_expressible("network.heads", heads, "one head, or heads of one width, head_width")
    groups = {layer.num_groups for layer in network.modules() if isinstance(layer, nn.GroupNorm)}
    if len(groups) > 1:
        fix = "multiples of 32 from 128 on, with 32 groups each; the kind diffusers-unet also has norm_num_groups"
        raise _not_expressible("network.widths", f"{widths} with {sorted(groups)} groups", fix)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    attending = ("AttnDownBlock2D", "AttnUpBlock2D")
    blocks = [attending if level in attention else plain for level in range(len(widths))]
    return {
        "block_out_channels": widths,
        "layers_per_block": settings["blocks"],
        "down_block_types": [down for down, _ in blocks],
        "up_block_types": [up for _, up in blocks[::-1]],
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "downsample_padding": 0,
        "attention_head_dim": head,
        "norm_num_groups": next(iter(groups)),
        "attn_norm_num_groups": next(iter(groups)) if settings["scale_shift"] else None,
        "norm_eps": GroupNorm(4).eps,
        "resnet_time_scale_shift": "scale_shift" if settings["scale_shift"] else "default",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "dropout": settings["dropout"],
        "time_embedding_dim": settings["time_width"],
    }


def chain_fields(model: Diffusion) -> dict[str, Any]:
    """The fields of ``scheduler/scheduler_config.json``; those of sampling are the imported ones, or the defaults."""
    imported = model.info.get("imported")
    of_sampling = imported.get("scheduler", {}) if isinstance(imported, dict) else {}
    fields = {**CHAIN, **{name: value for name, value in of_sampling.items() if name in CHAIN}}
    settings = {key: value for key, value in model.config.schedule.items() if key not in ("name", "T")}
    name = model.config.schedule["name"]
    if name in TABLES or (name == "cosine" and not settings):
        kind = TABLES.get(name, "squaredcos_cap_v2")
        settings = {"kind": kind, **settings}
    elif name != "diffusers":
        settings = {"trained": _steps_of_table(model)}
    names = {"first": "beta_start", "last": "beta_end", "kind": "beta_schedule", "trained": "trained_betas"}
    names |= {"zero_end": "rescale_betas_zero_snr"}
    process = {theirs: settings.get(own, CHAIN[theirs]) for own, theirs in names.items()}
    targets = {own: theirs for theirs, own in TARGETS.items()}
    return {
        **fields,
        **process,
        "num_train_timesteps": model.chain_length,
        "prediction_type": targets[model.config.target["name"]],
        "variance_type": VARIANCES[model.config.variance],
    }


def _steps_of_table(model: Diffusion) -> list[float]:
    """The noise of each step, 1 − (alpha_t/alpha_s)², from the cleanest on."""
    squares = torch.stack([level.alpha**2 for level in model.chain[::-1]])
    return (1 - squares[1:] / squares[:-1]).tolist()


def check_network(model: Diffusion, unet: dict[str, Any], tensors: dict[str, Tensor]) -> Check:
    """The difference of the network of the exported fields and weights, as imported, from that of ``model``."""
    settings = {name: value for name, value in unet.items() if name in inspect.signature(DiffusersUNet).parameters}
    classes = unet["num_class_embeds"] or 0
    again = DiffusersUNet(unet["in_channels"], **settings, classes=classes).eval()
    again.load_state_dict(from_diffusers(again, tensors))

    def other(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return again(x, time.float(), None if label is None else Condition(label=label))

    difference = network_difference(model.network, other, model.x_shape, steps_of(model.chain_length), classes)
    return Check("outputs of the network", "the exported network", difference, LIMIT)


def check_table(model: Diffusion, chain: dict[str, Any]) -> Check:
    """The difference of the table of the exported fields from that of ``model``."""
    table = diffusers(
        chain["num_train_timesteps"],
        chain["beta_start"],
        chain["beta_end"],
        chain["beta_schedule"],
        chain["trained_betas"],
        chain["rescale_betas_zero_snr"],
    )
    pairs = [(level.alpha, table(level.t).alpha) for level in model.chain]
    difference = max(abs(float(one**2 - two**2)) for one, two in pairs)
    return Check("alphas_cumprod", "the exported table", difference, TABLE_LIMIT)


def check_with_diffusers(model: Diffusion, folder: Path) -> list[Check]:
    """The difference of what diffusers computes from the ``folder``; empty where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers import UNet2DModel, __version__  # pyright: ignore

            theirs = UNet2DModel.from_pretrained(folder / "unet").eval()
    except (ImportError, RuntimeError):
        return [Check("outputs of the network", "diffusers itself, which is not installed", None, LIMIT)]
    return [check_unet(model, theirs, __version__)]

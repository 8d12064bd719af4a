"""diffusers' folders of a DDPM or DDIM model: UNet2DModel with its noise schedule, as an undiffuse model.

Formats and meanings are those of diffusers 0.42.1. A field that is missing has diffusers' default, as when diffusers
loads it; a field, or a value, that the model here cannot express is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop.building import load_weights
from undiffuse.interop.diffusers_names import from_diffusers, renamed_attention
from undiffuse.interop.foreign_files import read_config, read_weights
from undiffuse.interop.parity import LIMIT, Check, Imported, network_difference, steps_of
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.diffusers_unet import DiffusersUNet
from undiffuse.runtime.atomic_file import file_digest
from undiffuse.runtime.device import float32_by_default, kept_random_state

VERSION = "0.42.1"
"""The version of diffusers whose formats these are."""
UNET_CONFIGS = ("unet/config.json", "config.json")
CHAIN_CONFIGS = ("scheduler/scheduler_config.json", "scheduler_config.json", "../scheduler/scheduler_config.json")
"""Where the configurations are, below the folder of a pipeline or of its unet; the oldest pipelines have no folders."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SUPPORTED = "Give a folder that DDPMPipeline or DDIMPipeline wrote, or its unet folder with --scheduler"

UNET: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""Fields of ``unet/config.json`` with their defaults."""
UNET_NEEDED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}
"""Values of fields that have no setting here."""
NOT_SETTINGS = {*UNET_NEEDED, "sample_size", "in_channels", "out_channels", "num_class_embeds", "num_train_timesteps"}

CHAIN: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
"""Fields of DDPMScheduler's configuration with their defaults, in its order."""
OTHER_CHAIN_FIELDS = {"set_alpha_to_one", "predict_epsilon", "tensor_format", "timestep_values"}
"""Those of DDIMScheduler, and of versions before 0.10."""
CHAIN_CLASSES = ("DDPMScheduler", "DDIMScheduler")
TARGETS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}


def find_configs(source: Path, chain: Path | None = None) -> tuple[Path, Path]:
    """The files of the configurations of the network and of its noise schedule. Raises `CheckpointError`."""
    unet = next((source / name for name in UNET_CONFIGS if (source / name).is_file()), None)
    if unet is None:
        raise CheckpointError("NO_MODEL", source, "no unet/config.json in this folder", SUPPORTED)
    places = [source / name for name in CHAIN_CONFIGS] if chain is None else [chain / CHAIN_CONFIGS[1], chain]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        cause = "no configuration of a noise schedule, scheduler/scheduler_config.json"
        raise CheckpointError("NO_MODEL", chain or source, cause, SUPPORTED)
    return unet, found


def import_diffusers(
    source: str | Path, size: int | None = None, values: int = 256, chain: Path | None = None, unpickle: bool = False
) -> Imported:
    """The model in the folder ``source``, compared with diffusers' own if that is installed.

    ``size`` of the images where the configuration has none; their ``values`` are the integers 0 … values − 1, −1 to 1
    for the network. ``chain`` is the configuration of the noise schedule, or its folder, where it is not in
    ``source``; ``unpickle`` allows weights in a pickle. Raises `CheckpointError` and `ConfigError`.
    """
    source = Path(source)
    unet_file, chain_file = find_configs(source, chain)
    unet, noise = unet_fields(unet_file), chain_fields(chain_file)
    weights_file = next((unet_file.with_name(name) for name in WEIGHTS if unet_file.with_name(name).is_file()), None)
    if weights_file is None:
        cause = f"no {WEIGHTS[0]} in this folder"
        raise CheckpointError("NO_MODEL", unet_file.parent, cause, "Copy it there in one piece, not in shards")
    tensors = renamed_attention(read_weights(weights_file, unpickle).tensors)
    digest = file_digest(weights_file)
    kind = noise.pop("_class_name")
    imported = {"from": f"diffusers {kind}", "weights": digest, "scheduler": noise}
    info = {"name": source.resolve().name, "num_values": values, "imported": imported}
    item_shape = (unet["in_channels"], *_size(unet_file, unet["sample_size"], size))
    try:
        with kept_random_state(), float32_by_default():
            model = Diffusion(model_config(unet, noise), item_shape, IntegerLevels(values), info)
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        reason = f"{error.where}: {error.cause}" if isinstance(error, ConfigError) else str(error)
        fix = "docs/formats.md lists what can be imported"
        raise CheckpointError("DESCRIPTION", source, f"not a model that is supported ({reason})"[:400], fix) from None
    network = model.network
    assert isinstance(network, DiffusersUNet)
    load_weights(weights_file, model, from_diffusers(network, tensors))
    checks, notes = compare_with_diffusers(model, unet, noise, tensors), sampling_notes(kind, noise)
    if checks[0].difference is None:
        notes.insert(0, f"the weights are those of {weights_file.name}, sha256 {digest}")
    return Imported(model, checks, notes, sampling_options(kind, noise))


def unet_fields(path: Path) -> dict[str, Any]:
    """All fields of the configuration of a UNet2DModel. Raises `CheckpointError` for what is not supported."""
    config = _known_fields(path, ("UNet2DModel",), UNET)
    for name, allowed in UNET_NEEDED.items():
        if config[name] not in allowed:
            _refuse(path, name, config[name])
    for side in ("down_block_types", "up_block_types"):  # names of versions before 0.2
        if isinstance(config[side], list):
            config[side] = [str(block).removeprefix("UNetRes") for block in config[side]]
    return config


def chain_fields(path: Path) -> dict[str, Any]:
    """All fields of the configuration of a DDPM or DDIM scheduler, with ``_class_name``. Raises `CheckpointError`."""
    config = _known_fields(path, CHAIN_CLASSES, CHAIN, OTHER_CHAIN_FIELDS)
    if config.pop("predict_epsilon", True) is False:
        config["prediction_type"] = "sample"
    for name, allowed in (("prediction_type", TARGETS), ("variance_type", VARIANCES)):
        if not isinstance(config[name], str) or config[name] not in allowed:
            _refuse(path, name, config[name])
    return config


def model_config(unet: Mapping[str, Any], noise: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the model, trained further with Ho's loss. Raises `ConfigError`."""
    variance = VARIANCES[noise["variance_type"]]
    outputs = unet["in_channels"] * (2 if variance == "learned" else 1)
    if unet["out_channels"] != outputs:
        cause = f"{unet['out_channels']} with in_channels {unet['in_channels']}, variance_type {noise['variance_type']}"
        raise ConfigError("NETWORK", "out_channels", cause, f"It must be {outputs}")
    settings = {name: value for name, value in unet.items() if name not in NOT_SETTINGS}
    classes = {"classes": unet["num_class_embeds"]} if unet["num_class_embeds"] is not None else {}
    return ModelConfig(
        network={"kind": "diffusers-unet", **settings, **classes},
        schedule=schedule_settings(noise),
        target={"name": TARGETS[noise["prediction_type"]]},
        weight={"name": "simple"},
        times={"name": "steps"},
        preconditioning={"scale": "none", "time": "step"},
        chain_length=noise["num_train_timesteps"],
        loss="hybrid" if variance == "learned" else "weighted_mse",
        variance=variance,
    )


def schedule_settings(noise: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the row ``diffusers`` of `SCHEDULES` for the fields of a configuration."""
    trained = noise["trained_betas"]
    named = {"first": noise["beta_start"], "last": noise["beta_end"], "kind": noise["beta_schedule"]}
    table_of = named if trained is None else {"trained": trained}
    zero = {"zero_end": True} if noise["rescale_betas_zero_snr"] else {}
    return {"name": "diffusers", "T": noise["num_train_timesteps"], **table_of, **zero}


def compare_with_diffusers(
    model: Diffusion, unet: Mapping[str, Any], noise: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Check]:
    """Differences from the outputs and the table of diffusers itself; not measured where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from diffusers import DDPMScheduler, UNet2DModel, __version__  # pyright: ignore

            theirs = UNet2DModel(**unet).eval()
    except ImportError:
        against = "nothing: diffusers is not installed (pip install 'undiffuse[parity]')"
        return [Check("outputs of the network", against, None, LIMIT)]
    except RuntimeError as error:  # what diffusers raises where a package that it imports does not work
        against = f"nothing: diffusers does not work here ({' '.join(str(error).split())})"
        return [Check("outputs of the network", against[:200], None, LIMIT)]
    theirs.load_state_dict(dict(tensors))
    theirs_chain = DDPMScheduler(**{name: noise[name] for name in CHAIN})
    levels = model.schedule((torch.arange(model.chain_length, dtype=torch.float64) + 1) / model.chain_length)
    of_table = float((levels.alpha**2 - theirs_chain.alphas_cumprod.double()).abs().max())
    table = Check("alphas_cumprod", f"diffusers {__version__}", of_table, 1e-12)
    return [check_unet(model, theirs, __version__), table]


def check_unet(model: Diffusion, theirs: nn.Module, version: str) -> Check:
    """The difference of the network of ``model`` from ``theirs``, a UNet2DModel of this ``version`` of diffusers."""

    def outputs(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return theirs(x, time, class_labels=label).sample

    classes, steps = model.condition_sizes.get("classes", 0), steps_of(model.chain_length)
    difference = network_difference(model.network, outputs, model.x_shape, steps, classes)
    return Check("outputs of the network", f"diffusers {version}", difference, LIMIT)


def sampling_options(kind: str, noise: Mapping[str, Any]) -> str:
    """The options of ``undiffuse sample`` that draw as the pipeline does by default."""
    steps = noise["num_train_timesteps"]
    return f"--solver ddim --steps {min(steps, 50)}" if "DDIM" in kind else f"--solver ancestral --steps {steps}"


def sampling_notes(kind: str, noise: Mapping[str, Any]) -> list[str]:
    """What the pipeline of the class ``kind`` of noise schedules does in sampling and ``undiffuse sample`` does not."""
    notes = []
    if kind == "DDIMScheduler" and noise["clip_sample"]:
        notes.append("the pipeline clips as undiffuse sample does where it is given use_clipped_model_output=True")
    if kind == "DDIMScheduler" and noise.get("set_alpha_to_one") is False:
        notes.append("the pipeline ends at the chain's least noise, not without noise: set_alpha_to_one is False")
    if noise["thresholding"]:
        notes.append("the pipeline thresholds dynamically: give sample --threshold dynamic")
    elif not noise["clip_sample"] or noise["clip_sample_range"] != 1:
        how = f"to ±{noise['clip_sample_range']}" if noise["clip_sample"] else "not at all"
        notes.append(f"the pipeline clips predicted images {how}, undiffuse sample to the range of the values")
    if noise["timestep_spacing"] != "leading" or noise["steps_offset"]:
        spacing = f"timestep_spacing {noise['timestep_spacing']}, steps_offset {noise['steps_offset']}"
        notes.append(f"with fewer steps than the chain the pipeline takes others: {spacing}")
    return notes


def _known_fields(
    path: Path, classes: tuple[str, ...], defaults: Mapping[str, Any], others: frozenset[str] | set[str] = frozenset()
) -> dict[str, Any]:
    """The fields of a configuration, with ``defaults``. Raises `CheckpointError` for another class or field."""
    config = read_config(path)
    if config.get("_class_name") not in classes:
        cause = f"it is of the class {config.get('_class_name')!r}, not {' or '.join(classes)}"[:300]
        raise CheckpointError("DESCRIPTION", path, cause, SUPPORTED)
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name, value in given.items():
        if name not in defaults and name not in others and value is not None:
            _refuse(path, name, value)
    kept = {name: value for name, value in given.items() if name in defaults or name in others}
    return {**defaults, **kept, **({"_class_name": config["_class_name"]} if defaults is CHAIN else {})}


def _refuse(path: Path, name: str, value: object) -> None:
    cause = f"{name} = {value!r} is not supported"[:300]
    raise CheckpointError("DESCRIPTION", path, cause, "docs/formats.md lists what can be imported")


def _size(path: Path, own: Any, given: int | None) -> tuple[int, int]:
    """Height and width of the images: those of the configuration, else ``given``."""
    size = given if given is not None else own
    if size is None:
        raise ConfigError("SIZE", path, "its sample_size is not given", "Give size=32, or the size it was trained on")
    pair = [size, size] if isinstance(size, int) else size
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n >= 1 for n in pair):
        _refuse(path, "sample_size", own)
    return pair[0], pair[1]

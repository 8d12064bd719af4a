"""Autoencoders of other libraries, from files of the user's: diffusers' AutoencoderKL, and pairs like TAESD's.

Nothing is downloaded, and nothing in a file is executed. An imported autoencoder has no distribution of x given z and
does not standardize continuous data: training a diffusion model fits both (`undiffuse.training.latents.fitted`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from undiffuse.data.dataset import Dataset
from undiffuse.data.transform import transform_for
from undiffuse.errors import CheckpointError
from undiffuse.interop.diffusers_names import renamed_attention
from undiffuse.interop.foreign_files import read_weights
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.runtime.device import float32_by_default, kept_random_state
from undiffuse.runtime.own_output import is_own_tensor_file
from undiffuse.runtime.tensor_file import check_tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
"""The files of a folder that diffusers writes."""
EXPECTED: dict[str, Any] = {
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
"""What an AutoencoderKL must be made of to have the layers of `KLAutoencoder`."""
SUPPORTED = (
    "Give a run of train-autoencoder, a folder of diffusers' AutoencoderKL, or the encoder's file of a TAESD pair"
)


def load_autoencoder(path: str | Path, data: Dataset) -> Autoencoder:
    """The autoencoder at ``path``, of items of ``data``, in evaluation mode.

    ``path`` is a run of `train-autoencoder` or its file; a folder of diffusers with ``config.json`` and
    ``diffusion_pytorch_model.safetensors``, or one with these in ``vae/``; or the encoder's file of a pair such as
    ``taesd_encoder.safetensors`` and ``taesd_decoder.safetensors``, or a folder with one such pair. Raises
    `CheckpointError`, and `ConfigError` for data that do not fit.
    """
    path = Path(path)
    for folder in (path, path / "vae"):
        if (folder / CONFIG).is_file() and not (folder / "run.json").is_file():
            return _from_diffusers(folder, data)
    if path.is_dir() and not (path / "model.safetensors").is_file() and not (path / "checkpoints").is_dir():
        pairs = [file for file in sorted(path.glob("*encoder*.safetensors")) if _decoder_of(file).is_file()]
        if len(pairs) != 1:
            cause = f"this folder has {len(pairs)} pairs of an encoder's and a decoder's file, and is no run"
            raise CheckpointError("NO_MODEL", path, cause, SUPPORTED)
        return _from_pair(pairs[0], data)
    if path.is_file() and "encoder" in path.name and not is_own_tensor_file(path):
        return _from_pair(path, data)
    return autoencoders.load(path)


def _decoder_of(encoder: Path) -> Path:
    start, _, end = encoder.name.rpartition("encoder")
    return encoder.with_name(f"{start}decoder{end}")


def _build(
    path: Path, settings: dict[str, Any], tensors: Mapping[str, Tensor], data: Dataset, info: dict[str, Any]
) -> Autoencoder:
    """The autoencoder of network ``settings`` for items of ``data`` with the weights ``tensors``."""
    channels = data.item_shape[0]
    transform = transform_for(data, ((0.0,) * channels, (1.0,) * channels))
    with kept_random_state(), float32_by_default():
        config = AutoencoderConfig(settings, distribution="none")
        autoencoder = Autoencoder(config, data.item_shape, transform, info)
    fix = "The file is damaged, or its layers are not those of its configuration"
    check_tensors(path, autoencoder.network.state_dict(), tensors, fix)
    autoencoder.network.load_state_dict(tensors)
    return autoencoder.eval()


def _from_diffusers(folder: Path, data: Dataset) -> Autoencoder:
    """diffusers' AutoencoderKL: the same layers under the same names, with group norms of its groups.

    ``scaling_factor`` and ``shift_factor`` are kept in ``info``: latents are standardized by their own moments.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"it is a {config.get('_class_name')!r}, not an AutoencoderKL")
        for name, value in EXPECTED.items():
            own = config.get(name, value)
            if not set([own] if isinstance(own, str) else own) <= {value}:
                raise ValueError(f"{name} is {own}, not {value}")
        widths, attention = list(config["block_out_channels"]), config.get("mid_block_add_attention", True)
        settings = {
            "kind": "kl",
            "latent_channels": config["latent_channels"],
            "widths": widths,
            "blocks": config["layers_per_block"],
            "attention": attention,
            "groups": config["norm_num_groups"],
            "quant": [config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)],
        }
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        cause = f"not the configuration of an AutoencoderKL that is supported ({error})"[:300]
        raise CheckpointError("DESCRIPTION", path, cause, SUPPORTED) from None
    tensors = renamed_attention(read_weights(folder / WEIGHTS).tensors)
    factors = {name: config[name] for name in ("scaling_factor", "shift_factor") if config.get(name) is not None}
    return _build(folder / WEIGHTS, settings, tensors, data, {"imported": "diffusers AutoencoderKL", **factors})


def _from_pair(encoder: Path, data: Dataset) -> Autoencoder:
    """Encoder and decoder like TAESD's, whose shapes say what they are: plain stacks without a configuration."""
    decoder = _decoder_of(encoder)
    parts = {"encoder": (encoder, read_weights(encoder).tensors), "decoder": (decoder, read_weights(decoder).tensors)}
    try:
        settings = {"kind": "taesd", **_stack_settings({name: tensors for name, (_, tensors) in parts.items()})}
    except (LookupError, ValueError) as error:
        cause = f"not a stack of convolutions like TAESD's ({error})"[:300]
        raise CheckpointError("DESCRIPTION", encoder, cause, SUPPORTED) from None
    tensors = {f"{part}.{name}": tensor for part, (_, stack) in parts.items() for name, tensor in stack.items()}
    return _build(encoder, settings, tensors, data, {"imported": "TAESD"})


def _stack_settings(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Settings of `TinyAutoencoder` from the tensors of both stacks: a convolution without bias joins two stages."""
    stages = {}
    for part, tensors in parts.items():
        counts, names = [0], set(tensors)
        for index in range(max(int(name.split(".")[0]) for name in names) + 1):
            if f"{index}.conv.0.weight" in names:
                counts[-1] += 1
            elif f"{index}.weight" in names and f"{index}.bias" not in names:
                counts.append(0)
        stages[part] = counts
    last = max(int(name.split(".")[0]) for name in parts["encoder"])
    pooled = {len(tensor) for name, tensor in parts["encoder"].items() if name.endswith("pool.0.weight")}
    return {
        "latent_channels": len(parts["encoder"][f"{last}.weight"]),
        "width": len(parts["encoder"]["0.weight"]),
        "blocks": stages["encoder"],
        "decoder_blocks": stages["decoder"],
        "pooled": pooled.pop() if pooled else 0,
    }

"""A checkpoint: one safetensors file with weights and their description. Nothing in it is ever executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data import transform as transforms
from undiffuse.data.transform import DataTransform
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model import latent
from undiffuse.model.config import ModelConfig, from_dict
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.networks.norm import to_fast_layout
from undiffuse.networks.registry import NETWORKS, kind_of, names_of
from undiffuse.networks.tables import INSTALLED_NETWORKS
from undiffuse.runtime.device import float32_by_default, kept_random_state, resolve_device
from undiffuse.runtime.precision import autocast_dtype, resolve_precision
from undiffuse.runtime.side_files import check_info
from undiffuse.runtime.tensor_file import (
    FORMAT,
    NAME_MODEL,
    check_tensors,
    digest,
    model_path,
    read_metadata,
    read_tensors,
    write_tensors,
)

MAX_DESCRIPTION = 4 << 20
"""The longest description in characters: half of the longest header of a file that is read."""


def save(diffusion: Diffusion, path: str | Path) -> None:
    """Writes weights and description of the model to ``path``, atomically.

    Raises `CheckpointError`, and writes nothing, for what `load` would refuse: weights that are not finite, were cast
    to another type or replaced, and an ``info`` or settings that are not plain data. Raises `ResourceError`.
    """
    path, tensors = Path(path), weights(diffusion)
    metadata = _metadata(path, diffusion)
    _read_description(path, metadata)
    fix = "Save a model with finite float32 weights, as it was built: float() undoes double() and bfloat16()"
    expected = by_own_names(diffusion.initial_tensors) | _autoencoder(diffusion.transform, initial=True)
    check_tensors(path, expected, tensors, fix)
    write_tensors(path, tensors, metadata)


@torch.inference_mode(False)
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    network: nn.Module | type[nn.Module] | None = None,
    precision: str = "float32",
) -> Diffusion:
    """The model of a checkpoint file or of a run folder, ready to use on ``device``, a name of `resolve_device`.

    ``precision`` is that of the network's matrix products: float32, bfloat16, or auto, which is bfloat16 where the
    device multiplies in it. The likelihood of the probability flow is computed in float32 all the same.

    The global generator stays as it is. Raises `CheckpointError`, and `ConfigError` for a device that is not here.
    A model with a network of your own needs its class, or an instance that the weights are written into, as
    ``network`` (or `undiffuse.register`): a checkpoint holds the name of the class and its settings, never its code.
    """
    path, device = _model_file(Path(path)), resolve_device(device)
    tensors, metadata = read_tensors(path)
    # a program whose default type is float64 writes such files; a learned schedule is always float64
    wide = any(t.dtype == torch.float64 for name, t in tensors.items() if not name.startswith("schedule."))
    with kept_random_state(), nullcontext() if wide else float32_by_default():
        diffusion = _from_description(path, metadata, network)
    own = weights(diffusion)
    check_tensors(path, own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    to_fast_layout(diffusion.to(device).network)
    diffusion.autocast = autocast_dtype(resolve_precision(precision, device, len(diffusion.x_shape) - 1))
    diffusion.read_from = path
    return diffusion.eval()


def read_info(path: str | Path) -> dict[str, Any]:
    """The `Diffusion.info` of a checkpoint file or of a run folder, without its weights. Raises `CheckpointError`."""
    path = _model_file(Path(path))
    plain = _read_description(path, read_metadata(path))[2]
    try:
        return check_info(plain.get("info"))
    except ConfigError as error:
        raise _not_understood(path, error) from None


def describe(diffusion: Diffusion) -> dict[str, Any]:
    """All that is needed to build the model again except its weights, as plain data."""
    return {
        "config": asdict(diffusion.config),
        "item_shape": list(diffusion.item_shape),
        "transform": _transform_to_dict(diffusion.transform),
        "info": diffusion.info,
    }


def fingerprint(diffusion: Diffusion) -> str:
    """sha256 of weights and description of the model, the same as in its file."""
    tensors = {name: tensor.detach().cpu() for name, tensor in weights(diffusion).items()}
    return digest(tensors, {"undiffuse": str(FORMAT), "model": json.dumps(describe(diffusion), sort_keys=True)})


def weights(diffusion: Diffusion) -> dict[str, Tensor]:
    """All trained tensors, not copied: those of the network by name, those of a learned schedule as ``schedule.*``.

    The names are those of the bare network, also where it is compiled or wrapped for several processes. Those of the
    autoencoder of a latent model, which do not learn, are ``autoencoder.*``.
    """
    return by_own_names(diffusion.state_dict()) | _autoencoder(diffusion.transform)


def _autoencoder(transform: DataTransform, initial: bool = False) -> dict[str, Tensor]:
    """The tensors of a latent model's autoencoder, or those that it was built with; empty for other models."""
    if not isinstance(transform, LatentTransform):
        return {}
    tensors = transform.autoencoder.initial_tensors if initial else transform.autoencoder.state_dict()
    return {f"autoencoder.{name}": tensor for name, tensor in tensors.items()}


def _transform_to_dict(transform: DataTransform) -> dict[str, Any]:
    return latent.to_dict(transform) if isinstance(transform, LatentTransform) else transforms.to_dict(transform)


def _transform_from_dict(plain: Mapping[str, Any]) -> DataTransform:
    return latent.from_dict(plain) if plain.get("kind") == "latent" else transforms.from_dict(plain)


def by_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's ``state`` under the names that a file gives them."""
    return {unwrapped_name(name).removeprefix("network."): tensor for name, tensor in state.items()}


def unwrapped_name(name: str) -> str:
    """The name of a tensor without the prefixes of torch.compile and DistributedDataParallel."""
    return re.sub(r"(?<![^.])(_orig_mod|module)\.", "", name)


def _model_file(path: Path) -> Path:
    """``path``, or the model of the run folder ``path``. Raises `CheckpointError` if there is none."""
    file = model_path(path)
    if path.is_dir() and not file.is_file():
        fix = "Its training has not finished: resume it" if (path / "checkpoints").is_dir() else NAME_MODEL
        raise CheckpointError("NO_MODEL", path, "no model.safetensors in this folder", fix)
    return file


def _metadata(path: Path, diffusion: Diffusion) -> dict[str, str]:
    """The metadata of the file ``path`` of a model. Raises `CheckpointError` where they are not plain data."""
    try:
        text = json.dumps(describe(diffusion), sort_keys=True)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        fix = "Keep numbers, strings and lists in info and settings, and a transform of undiffuse"
        raise CheckpointError("DESCRIPTION", path, f"its description is not plain data ({error})"[:300], fix) from None
    if len(text) > MAX_DESCRIPTION:
        cause = f"its description has {len(text):,} characters, more than {MAX_DESCRIPTION:,}"
        raise CheckpointError("DESCRIPTION", path, cause, "Keep less in info")
    return {"undiffuse": str(FORMAT), "model": text}


def _read_description(path: Path, metadata: Mapping[str, str]) -> tuple[ModelConfig, DataTransform, dict[str, Any]]:
    """(config, transform, all of the description) in the ``metadata`` of a file. Raises `CheckpointError`."""
    try:
        plain = _parse_description(path, metadata)
        return from_dict(ModelConfig, plain["config"], "model"), _transform_from_dict(plain["transform"]), plain
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _not_understood(path, error) from None


def _not_understood(path: Path, error: Exception) -> CheckpointError:
    cause = f"its description is not one that this version understands ({error})"
    return CheckpointError("DESCRIPTION", path, cause[:300], "Use the version that wrote it")


def _from_description(
    path: Path, metadata: Mapping[str, str], network: nn.Module | type[nn.Module] | None
) -> Diffusion:
    """The model that the ``metadata`` of a file describe, with weights as at initialization."""
    config, transform, plain = _read_description(path, metadata)
    try:
        kind = config.network.get("kind")
        if network is None and isinstance(kind, str) and kind not in {*NETWORKS, *INSTALLED_NETWORKS}:
            name = kind[:80]
            cause = f"its network is of the class {name!r}, which is not part of undiffuse"
            fix = f"Give the class: load(path, network={name}), or --network FILE.py:{name} on the command line"
            raise CheckpointError("NETWORK", path, cause, fix)
        if network is not None and kind not in names_of(network):
            cause = f"its network is of the kind {kind!r}, not {kind_of(network)!r}"
            raise CheckpointError("NETWORK", path, cause[:300], "Give the network that it was trained with")
        if network is not None:  # under the name of the file
            config = replace(config, network={**config.network, "kind": kind_of(network)})
        return Diffusion(config, tuple(plain["item_shape"]), transform, check_info(plain.get("info")), network)
    except (ConfigError, LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        if network is not None and isinstance(error, ConfigError) and error.code == "NETWORK":
            fix = "Give an instance that has its settings: load(path, network=Net(...))"
            raise CheckpointError("NETWORK", path, f"its network cannot be built ({error})"[:400], fix) from None
        raise _not_understood(path, error) from None


def _parse_description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "autoencoder" in metadata:
        fix = "Give it to train as --autoencoder, and a diffusion model as RUN"
        raise CheckpointError("KIND", path, "this is an autoencoder, not a diffusion model", fix)
    if "classifier" in metadata:
        fix = "Give it to sample as --classifier, and a diffusion model as RUN"
        raise CheckpointError("KIND", path, "this is a classifier, not a diffusion model", fix)
    if not metadata.get("undiffuse", "").isdigit() or "model" not in metadata:
        fix = "Name a run folder or its model.safetensors"
        raise CheckpointError("NOT_OURS", path, "these weights were not written by undiffuse", fix)
    return json.loads(metadata["model"])

"""A checkpoint: one safetensors file that describes itself. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from undiffuse import codec as codecs
from undiffuse.config import ModelConfig, from_dict
from undiffuse.data import headers
from undiffuse.data.problems import Refused
from undiffuse.diffusion import Diffusion, describe
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.networks.norm import in_fast_layout

FORMAT = 2
"""Raised when a file of this version can no longer be read by older releases. In 1 the sha256 left out the metadata."""


def save(diffusion: Diffusion, path: str | Path) -> None:
    """Writes the model's weights and its whole description to ``path``, whole or not at all."""
    text = json.dumps(describe(diffusion), sort_keys=True)
    write_tensors(Path(path), weights(diffusion), {"undiffuse": str(FORMAT), "model": text})


def load(path: str | Path, device: torch.device | str = "cpu") -> Diffusion:
    """The model of a checkpoint file or of a run folder, ready to use. Raises `CheckpointError`."""
    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            unfinished = (path / "checkpoints").is_dir()
            fix = (
                "Its training has not come so far: train on"
                if unfinished
                else "Name a run folder or a .safetensors file"
            )
            raise CheckpointError("NO_MODEL", path, "no model.safetensors in this folder", fix)
        path = path / "model.safetensors"
    tensors, metadata = read_tensors(path)
    try:
        described = _described(path, metadata)
        config = from_dict(ModelConfig, described["config"], "model")
        diffusion = Diffusion(
            config, tuple(described["item_shape"]), codecs.from_dict(described["codec"]), described["info"]
        )
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        cause = f"its description is not one that this version understands ({error})"
        raise CheckpointError("DESCRIPTION", path, cause[:300], "Use the version that wrote it") from None
    own = weights(diffusion)
    fit_tensors(path, own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    in_fast_layout(diffusion.to(device).network)
    return diffusion.eval()


def fingerprint(diffusion: Diffusion) -> str:
    """sha256 of the model's weights and of all that its file says of them: the file's own."""
    held = {name: tensor.detach().cpu() for name, tensor in weights(diffusion).items()}
    return digest(held, {"undiffuse": str(FORMAT), "model": json.dumps(describe(diffusion), sort_keys=True)})


def weights(diffusion: Diffusion) -> dict[str, Tensor]:
    """All that is trained, in place: the network's tensors by their names, a learned schedule's as ``schedule.*``.

    The names are those of the bare network, also where it was compiled or wrapped for several processes.
    """
    return {plain(name).removeprefix("network."): tensor for name, tensor in diffusion.state_dict().items()}


def plain(name: str) -> str:
    """The name of a tensor without those of the wrappers of torch.compile and DistributedDataParallel."""
    return re.sub(r"(?<![^.])(_orig_mod|module)\.", "", name)


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "classifier" in metadata:
        fix = "Give it to sample as --classifier, and a diffusion model as RUN"
        raise CheckpointError("KIND", path, "this is a classifier, and no diffusion model", fix)
    if not metadata.get("undiffuse", "").isdigit() or "model" not in metadata:
        raise CheckpointError(
            "NOT_OURS",
            path,
            "these weights were not written by undiffuse",
            "Name a run folder or its model.safetensors",
        )
    return json.loads(metadata["model"])


def fit_tensors(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` naming the first tensor that is missing, unknown, not finite or of another form."""
    again = "The file is damaged or belongs to another model: use an older checkpoint"
    for name in sorted(set(wanted) | set(found)):
        if name not in found:
            raise CheckpointError("TENSOR", path, f"the tensor {name!r} is missing", again)
        if name not in wanted:
            raise CheckpointError("TENSOR", path, f"the tensor {name!r} does not belong to this model", again)
        if wanted[name].shape != found[name].shape:
            cause = f"the tensor {name!r} has the shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            raise CheckpointError("TENSOR", path, cause, again)
        if wanted[name].dtype != found[name].dtype:
            cause = f"the tensor {name!r} holds {found[name].dtype}, not {wanted[name].dtype}"
            raise CheckpointError("TENSOR", path, cause, again)
        if not torch.isfinite(found[name]).all():
            raise CheckpointError("NON_FINITE", path, f"the tensor {name!r} holds numbers that are not finite", again)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 of the safetensors file that it writes, which holds that of its tensors too; whole or not at all."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = serialised(held, {**metadata, "sha256": digest(held, metadata)})
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path``, and moves it there when it is durable.

    Raises `ResourceError`, which says how many bytes there have to be room for; what stood there before still does.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise unwritten(path, len(content), error) from None


def unwritten(path: Path, size: int, error: OSError) -> ResourceError:
    """The error that says that the ``size`` bytes of ``path`` are not on the disk."""
    cause = f"its {size:,} bytes could not be written ({error.strerror or error})"
    return ResourceError("DISK", path, cause, "Make room for them or mend the disk; what was there before is whole")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file that `write_tensors` wrote. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError("NOT_FOUND", path, "no such file", "Name a run folder or a .safetensors file")
    try:
        with path.open("rb") as stream:
            headers.read_safetensors(stream, os.fstat(stream.fileno()).st_size)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (Refused, SafetensorError, OSError, ValueError) as error:
        cause = f"not a whole safetensors file ({error})"
        raise CheckpointError("DAMAGED", path, cause[:300], "Use an older checkpoint, or copy the file again") from None
    version = metadata.get("undiffuse", "")
    if re.fullmatch("[0-9]{1,9}", version) and int(version) > FORMAT:
        cause = f"it has format {version}, and this version reads up to {FORMAT}"
        raise CheckpointError("FORMAT", path, cause, "Update undiffuse")
    if "undiffuse" in metadata and metadata.get("sha256") != digest(tensors, metadata):
        raise CheckpointError(
            "DAMAGED",
            path,
            "its contents do not match its own sha256",
            "Use an older checkpoint, or copy the file again",
        )
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names, and over the rest of the metadata."""
    rest = sorted((key, text) for key, text in metadata.items() if key != "sha256")
    state = hashlib.sha256(b"" if metadata["undiffuse"] in ("1", "state") else json.dumps(rest).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in ``folder`` durable, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

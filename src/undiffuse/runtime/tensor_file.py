"""Safetensors files with a sha256 over their tensors and metadata: written atomically, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from undiffuse.errors import CheckpointError
from undiffuse.runtime import file_headers as headers
from undiffuse.runtime.atomic_file import remedy, write_atomic
from undiffuse.runtime.file_errors import FileError

FORMAT = 3
"""The version of files, the only one that is read. Format 1 hashed no metadata; format 2 had other tensor names."""
OLDER = "Use an older checkpoint, or copy the file again"
NAME_MODEL = "Name a run folder or a .safetensors file"


def model_path(path: Path) -> Path:
    """``path``, or model.safetensors in the folder ``path``."""
    return path / "model.safetensors" if path.is_dir() else path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 of the safetensors file that it writes, whose metadata also hold the `digest`. See `write_atomic`."""
    stored, seen = {}, set()
    for name, tensor in tensors.items():
        stored[name] = tensor.detach().cpu().contiguous()
        if (place := stored[name].untyped_storage().data_ptr()) in seen:  # tied weights; safetensors stores none
            stored[name] = stored[name].clone()
        seen.add(place)
    content = save(stored, {**metadata, "sha256": digest(stored, metadata)})
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file that `write_tensors` wrote. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError("NOT_FOUND", path, "no such file", NAME_MODEL)
    try:
        with path.open("rb") as stream:
            headers.read_safetensors_header(stream, os.fstat(stream.fileno()).st_size)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileError, SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    version = metadata.get("undiffuse", "")
    if re.fullmatch("[0-9]{1,9}", version) and int(version) != FORMAT:
        cause = f"it has format {version}, and this version reads format {FORMAT}"
        fix = "Update undiffuse" if int(version) > FORMAT else "Use the version that wrote it, or train again"
        raise CheckpointError("FORMAT", path, cause, fix)
    if "undiffuse" in metadata and metadata.get("sha256") != digest(tensors, metadata):
        raise CheckpointError("DAMAGED", path, "its contents do not match its own sha256", OLDER)
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a file; its contents are not checked. Raises `CheckpointError`."""
    try:
        with path.open("rb") as stream:
            headers.read_safetensors_header(stream, os.fstat(stream.fileno()).st_size)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (FileError, SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that the system does not read, or that is no or no whole safetensors file."""
    if isinstance(error, OSError):
        return CheckpointError("UNREADABLE", path, f"cannot be read ({error.strerror or error})", remedy(error))
    if path.suffix != ".safetensors":
        return CheckpointError("NOT_OURS", path, "it is not a safetensors file", NAME_MODEL)
    return CheckpointError("DAMAGED", path, f"not a whole safetensors file ({error})"[:300], OLDER)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over the names, types, shapes and bytes of the tensors in order of names, and over the other metadata."""
    rest = sorted((key, text) for key, text in metadata.items() if key != "sha256")
    state = hashlib.sha256(b"" if metadata["undiffuse"] == "state" else json.dumps(rest).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


BELONGS = "The file is damaged or belongs to another model: use an older checkpoint"


def check_tensors(
    path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], fix: str = BELONGS
) -> None:
    """Raise `CheckpointError` for the first tensor that is missing, unexpected, not finite, or of another form."""
    for name in sorted(set(expected) | set(tensors)):
        code, cause = "TENSOR", None
        if name not in tensors:
            cause = "is missing"
        elif name not in expected:
            cause = "does not belong to this model"
        elif expected[name].shape != tensors[name].shape:
            cause = f"has the shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        elif expected[name].dtype != tensors[name].dtype:
            cause = f"holds {tensors[name].dtype}, not {expected[name].dtype}"
        elif tensors[name].is_meta:
            cause = "holds no data"
        elif not torch.isfinite(tensors[name]).all():
            code, cause = "NON_FINITE", "holds values that are NaN or infinite"
        if cause:
            raise CheckpointError(code, path, f"the tensor {name!r} {cause}", fix)

"""Export of a model to other formats by name, into a new folder, with the difference of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.interop.diffusers_export import export_diffusers
from undiffuse.interop.graph_export import export_onnx, export_torch
from undiffuse.interop.parity import Check, check_all
from undiffuse.model import checkpoint
from undiffuse.runtime.atomic_file import atomic_folder

FORMATS: Mapping[str, Callable[..., list[Check]]] = {
    "diffusers": export_diffusers,
    "onnx": export_onnx,
    "torch": export_torch,
}
"""Functions of a model and a folder that write it there and return how far its outputs are from the model's."""


def export(run: str | Path, out: str | Path, kind: str) -> list[Check]:
    """Write the model of ``run`` as ``kind`` into the new or empty folder ``out``; returns the checks of its outputs.

    Raises `ConfigError` for a model that the format cannot express, and `CheckpointError` where outputs differ. After
    an error ``out`` is as it was.
    """
    folder = Path(out)
    if kind not in FORMATS:
        raise unknown_name("FORMAT", kind, "format", FORMATS)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("OUT", folder, "it exists and is not an empty folder", "Give a new folder")
    model = checkpoint.load(run)
    with atomic_folder(folder) as partial:
        checks = FORMATS[kind](model, partial)
        check_all(checks, folder)
    return checks

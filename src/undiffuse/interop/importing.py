"""Import of other libraries' models by the name of their format, into a folder like a run's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.errors import CheckpointError, ConfigError, unknown_name
from undiffuse.interop import denoising_diffusion, diffusers, edm, openai
from undiffuse.interop.foreign_files import mentions
from undiffuse.interop.parity import Imported, check_all
from undiffuse.model import checkpoint
from undiffuse.runtime.output_folder import check_output_folder, listed_files
from undiffuse.runtime.side_files import read_record, write_record

RECORD, MODEL = "import.json", "model.safetensors"
"""The files of the folder."""


class Format(NamedTuple):
    """A format: whether a path looks like it, the import, and the names of its options."""

    title: str
    sniff: Callable[[Path], bool]
    load: Callable[..., Imported]
    options: tuple[str, ...]


FORMATS: Mapping[str, Format] = {
    "diffusers": Format(
        "a folder of diffusers' DDPMPipeline or DDIMPipeline",
        lambda path: any((path / name).is_file() for name in ("model_index.json", *diffusers.UNET_CONFIGS)),
        diffusers.import_diffusers,
        ("size", "values", "chain", "unpickle"),
    ),
    "denoising-diffusion-pytorch": Format(
        "a file of the Trainer of denoising-diffusion-pytorch",
        lambda path: mentions(path, denoising_diffusion.MARK.encode()),
        denoising_diffusion.import_denoising_diffusion,
        ("size", "values", "unpickle", "setting"),
    ),
    "edm": Format(
        "a state dict of EDM's networks",
        lambda path: mentions(path, edm.MARK.encode()),
        edm.import_edm,
        ("size", "values", "unpickle", "setting"),
    ),
    "openai": Format(
        "a file of weights of improved- or guided-diffusion",
        lambda path: path.is_file() and path.suffix in (".pt", ".pth", ".safetensors"),
        openai.import_openai,
        ("size", "values", "unpickle", "setting"),
    ),
}


def import_model(source: str | Path, kind: str | None = None, **options: Any) -> Imported:
    """The model in ``source``, of the format ``kind``, by default the first of `FORMATS` that it looks like.

    ``options`` are those of the format; one that is None is not given. Raises `CheckpointError` and `ConfigError`,
    also where the outputs differ from those of the other library.
    """
    path = Path(source)
    if kind is not None and kind not in FORMATS:
        raise unknown_name("FORMAT", kind, "format", FORMATS)
    if not path.exists():
        raise CheckpointError("NOT_FOUND", path, "no such file or folder", "Name a file or folder of another library")
    kind = kind or next((name for name, row in FORMATS.items() if row.sniff(path)), None)
    if kind is None:
        known = ", ".join(f"{row.title} ({name})" for name, row in FORMATS.items())
        raise CheckpointError("FORMAT", path, "not recognized as a model of another library", f"Give {known}")
    given = {name: value for name, value in options.items() if value is not None}
    wrong = next((name for name in given if name not in FORMATS[kind].options), None)
    if wrong is not None:
        raise ConfigError("USAGE", wrong, f"the format {kind} has no such option", "Leave it out")
    imported = FORMATS[kind].load(path, **given)
    check_all(imported.checks, path)
    return imported


def write(imported: Imported, source: str | Path, out: str | Path) -> None:
    """Write the model and the record of its import into the folder ``out``. Raises `ConfigError`, `ResourceError`."""
    folder = Path(out)
    record = folder / RECORD
    check_output_folder(folder, record, listed_files(read_record(record)), [MODEL])
    folder.mkdir(parents=True, exist_ok=True)
    checks = [check._asdict() for check in imported.checks]
    content = {"source": str(source), **imported.model.info["imported"], "checks": checks}
    write_record(record, {**content, "notes": list(imported.notes), "files": [MODEL]})
    checkpoint.save(imported.model, folder / MODEL)

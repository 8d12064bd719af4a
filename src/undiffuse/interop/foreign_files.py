"""Files that other libraries wrote: safetensors, JSON, and on request pickles, which a child process reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from undiffuse.errors import CheckpointError
from undiffuse.runtime import file_headers as headers
from undiffuse.runtime.atomic_file import remedy
from undiffuse.runtime.file_errors import FileError

MAX_CONFIG_BYTES = 1 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NAMES_BYTES = 1 << 24
"""The most bytes in which names are searched."""
ZIP_START = b"PK"
PICKLE_SECONDS = 600
"""The longest time in which a pickle is read."""


class ForeignFile(NamedTuple):
    """Tensors by name, and the numbers and strings beside them by name; names of nested tables are joined by ``/``."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def read_weights(path: Path, unpickle: bool = False) -> ForeignFile:
    """The content of a file of weights, floating-point tensors as float32.

    A pickle is read only with ``unpickle``: by torch's weights-only unpickler, which refuses every object but tensors
    and plain data, in a child process with a limit of memory. Raises `CheckpointError`.
    """
    if not path.is_file():
        raise CheckpointError("NOT_FOUND", path, "no such file", "Name the file of weights")
    if path.suffix in PICKLE_SUFFIXES:
        if not unpickle:
            cause = "it is a pickle, a format that can hold code"
            fix = "Give unpickle=True to read it weights-only in a child process, or convert it to safetensors"
            raise CheckpointError("PICKLE_REFUSED", path, cause, fix)
        tensors, facts = _unpickle(path)
    else:
        tensors, facts = _read_safetensors(path), {}
    return ForeignFile({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, facts)


def mentions(path: Path, name: bytes) -> bool:
    """Whether ``path`` is a file of weights, or a pickle of any kind, in which ``name`` occurs among the names.

    Nothing is unpickled: the bytes of the pickle are searched, or the header of a safetensors file.
    """
    if not path.is_file() or path.suffix not in (*PICKLE_SUFFIXES, ".safetensors"):
        return False
    try:
        if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next((entry for entry in archive.namelist() if entry.endswith("data.pkl")), None)
                if member is None:
                    return False
                with archive.open(member) as file:
                    return name in file.read(MAX_NAMES_BYTES)
        with path.open("rb") as file:
            return name in file.read(MAX_NAMES_BYTES)
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError):
        return False  # reading it says what is wrong


def read_config(path: Path) -> dict[str, Any]:
    """The table in a JSON file of another library. Raises `CheckpointError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ValueError(f"it is longer than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(content)
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, not a table")
        return config
    except OSError as error:
        raise CheckpointError("UNREADABLE", path, f"cannot be read ({error.strerror})", remedy(error)) from None
    except (ValueError, RecursionError) as error:
        cause = f"not a configuration in JSON ({error})"[:300]
        raise CheckpointError("DESCRIPTION", path, cause, "Copy the file again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as stream:
            headers.read_safetensors_header(stream, os.fstat(stream.fileno()).st_size)
        return load_file(path)
    except OSError as error:
        raise CheckpointError("UNREADABLE", path, f"cannot be read ({error.strerror})", remedy(error)) from None
    except (FileError, SafetensorError, ValueError) as error:
        cause = f"not a whole safetensors file ({error})"[:300]
        raise CheckpointError("DAMAGED", path, cause, "Copy the file again") from None


def _unpickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a pickle, from the child process `undiffuse.interop.unpickle`."""
    with path.open("rb") as file:
        is_cut = file.read(2) == ZIP_START and not zipfile.is_zipfile(path)
    if is_cut:
        raise CheckpointError("DAMAGED", path, "not a whole file of torch.save: its end is missing", "Copy it again")
    with tempfile.TemporaryDirectory(prefix="undiffuse-") as folder:
        out = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-P", "-m", "undiffuse.interop.unpickle", str(path), str(out)]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=PICKLE_SECONDS, check=False)
            cause = (
                child.stderr.strip().rpartition("\n")[2] or f"the process that read it ended with {child.returncode}"
            )
        except subprocess.TimeoutExpired:
            child, cause = None, f"it was not read within {PICKLE_SECONDS} s"
        if child is None or child.returncode or not out.is_file():
            fix = "Only tensors and plain data are read: export a state dict, preferably as safetensors"
            raise CheckpointError("PICKLE_REFUSED", path, f"not a pickle of weights alone ({cause})"[:400], fix)
        tensors = {name: tensor.clone() for name, tensor in load_file(out).items()}
        with safe_open(out, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    return tensors, facts

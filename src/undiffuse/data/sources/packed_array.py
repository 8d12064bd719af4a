"""Packed data: one array file that is read from disk in parts, and a second file with everything else."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from undiffuse.data.caption_embeddings import CaptionEmbeddings, distinct
from undiffuse.data.dataset import Dataset, chunks
from undiffuse.data.from_array import CHANNELS_FIRST
from undiffuse.data.sources import array_files
from undiffuse.data.text_encoders import EMBEDDING_ARRAYS, arrays_of
from undiffuse.errors import ConfigError, ResourceError
from undiffuse.runtime.atomic_file import fsync_folder, write_atomic, write_error
from undiffuse.runtime.file_errors import FileError, file_errors_at
from undiffuse.runtime.file_headers import npy_header

METADATA_FIELDS = (
    "name",
    "shape",
    "num_values",
    "classes",
    "notes",
    "test_from",
    "validation_from",
    "value_range",
    "columns",
)
METADATA_KEY = "data"
ARRAY_FIELDS = ("labels", "cond", "mask")


def sidecar_path(path: Path) -> Path:
    """The file next to an array file that holds everything else about the data set."""
    return path.with_name(path.stem + ".meta.safetensors")


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is an array file with a second file that `PackWriter` has written."""
    path = Path(source)
    return path.suffix.lower() == ".npy" and array_files.sniff(source) and sidecar_path(path).is_file()


def _reserve(file: BinaryIO, size: int) -> None:
    """Zeros up to ``size`` bytes: a full disk fails here, not later with a signal. Raises `OSError`."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # macOS
        while (start := file.tell()) < size:
            file.write(bytes(min(1 << 20, size - start)))
        file.flush()


class PackWriter:
    """Arrays in files of a ``folder``, for data sets that do not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counter = folder.resolve(), itertools.count()

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of zeros in a file, with its disk space reserved. Raises `ResourceError`."""
        path, header = self.folder / f"{next(self.counter)}.npy", npy_header(shape, dtype)
        size = len(header) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            with path.open("wb") as file:
                file.write(header)
                file.flush()
                _reserve(file, size)
        except OSError as error:
            cause = f"{size:,} bytes are not available ({error.strerror})"
            raise ResourceError("DISK", self.folder.parent, cause, "Free some space, or pack somewhere else") from None
        return np.memmap(path, dtype, "r+", len(header), shape)

    def write(self, data: Dataset, out: Path) -> None:
        """Write the values of ``data`` to ``out`` and everything else to its `sidecar_path`, atomically."""
        values = data.values
        if not isinstance(values, np.memmap) or Path(str(values.filename)).parent != self.folder:
            values, start = self.allocate(values.shape, values.dtype), 0
            for chunk in chunks(data.values):
                values[start : start + len(chunk)] = chunk
                start += len(chunk)
        assert isinstance(values, np.memmap)
        values.flush()
        path, header = Path(str(values.filename)), npy_header(values.shape, values.dtype)
        size = len(header) + values.nbytes
        try:
            with path.open("r+b") as file:
                file.write(header)  # as long as for any other number of items
                file.truncate(size)
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(out, size, error) from None
        metadata = {name: getattr(data, name) for name in METADATA_FIELDS if name != "shape"} | {"shape": values.shape}
        arrays = {name: array for name in ARRAY_FIELDS if (array := getattr(data, name)) is not None}
        if data.names:
            arrays["names"] = np.frombuffer(os.fsencode("\0".join(data.names)), np.uint8)
        if data.captions:
            arrays["captions"] = np.frombuffer(json.dumps(data.captions).encode(), np.uint8)
        if data.embeddings is not None:
            metadata["text_encoder"] = data.embeddings.encoder
            arrays |= {f"caption_{name}": array for name, array in arrays_of(data.embeddings).items()}
        write_atomic(sidecar_path(out), save(arrays, {METADATA_KEY: json.dumps(metadata)}))
        os.replace(path, out)
        fsync_folder(out.parent)


@contextmanager
def pack_writer(out: Path) -> Iterator[PackWriter]:
    """A `PackWriter` in a temporary folder next to ``out``. Raises `ConfigError` or `ResourceError` if that fails."""
    if out.suffix != ".npy":
        raise ConfigError("OPTION", out, "packed data are .npy files", "Give a name that ends in .npy")
    for path in (out, sidecar_path(out)):
        if os.path.lexists(path):
            raise ConfigError("OPTION", path, "exists already", "Give another name, or delete it")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent)
    except OSError as error:
        raise ResourceError("FOLDER", out.parent, f"cannot be written ({error.strerror})", "Pack elsewhere") from None
    with folder as name:
        yield PackWriter(Path(name))


def load(source: str | Path, *, captions: bool = False) -> Dataset:
    """The data set that was packed, with its labels, conditions, captions, names and notes.

    Raises `DataError`, also for data without ``captions`` where these are asked for.
    """
    path = Path(source)
    sidecar = sidecar_path(path)
    with file_errors_at(sidecar):
        try:
            data = _load(path, sidecar)
            if captions and not data.captions:
                raise FileError("CAPTIONS", "was packed without captions", "Pack the data again with captions=True")
            return data
        except (SafetensorError, ConfigError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            cause = f"does not describe packed data ({error})"[:200]
            raise FileError("BAD_HEADER", cause, "Pack the data again") from error


def _load(path: Path, sidecar: Path) -> Dataset:
    with safe_open(sidecar, framework="np") as file:
        metadata: dict[str, Any] = json.loads((file.metadata() or {})[METADATA_KEY])
        stored = (*ARRAY_FIELDS, "names", "captions", *(f"caption_{name}" for name in EMBEDDING_ARRAYS))
        arrays = {name: file.get_tensor(name) for name in stored if name in file.keys()}  # noqa: SIM118
    fields = {name: tuple(metadata[name]) for name in ("classes", "notes", "columns")}
    if (names := arrays.pop("names", None)) is not None:
        fields["names"] = tuple(os.fsdecode(names.tobytes()).split("\0"))
    embedded = {name: arrays.pop(f"caption_{name}") for name in EMBEDDING_ARRAYS if f"caption_{name}" in arrays}
    if (texts := arrays.pop("captions", None)) is not None:
        captions = tuple(map(tuple, json.loads(texts.tobytes())))
        if not all(isinstance(text, str) for each in captions for text in each):
            raise ValueError("captions that are no texts")
        fields["captions"] = captions
        if embedded:
            encoder = {name: str(metadata["text_encoder"][name]) for name in ("name", "digest")}
            arrays["embeddings"] = CaptionEmbeddings(encoder, tuple(distinct(captions)), **embedded)
    value_range = metadata["value_range"]
    data = array_files.load(
        path,
        layout=CHANNELS_FIRST[len(metadata["shape"])],
        num_values=metadata["num_values"],
        value_range=value_range and (value_range[0], value_range[1]),
    )
    if list(data.values.shape) != metadata["shape"]:
        cause = f"it describes an array of shape {metadata['shape']}"
        raise FileError("SIZE_MISMATCH", cause, "Pack the data again")
    parts = {name: metadata.get(name) for name in ("test_from", "validation_from")}
    if (labels := arrays.get("labels")) is not None and not 0 <= labels.min() <= labels.max() < len(fields["classes"]):
        raise ValueError("labels without a class")
    return replace(data, name=metadata["name"], **parts, **fields, **arrays)

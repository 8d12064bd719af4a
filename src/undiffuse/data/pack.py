"""Any data as one array file that is read from disk as it is needed, so that it may be larger than memory."""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from undiffuse.data.array_files import load_array
from undiffuse.data.dataset import Dataset, chunks
from undiffuse.data.problems import Refused
from undiffuse.errors import ConfigError, ResourceError

LAYOUTS = {2: "ND", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
ABOUT = ("name", "shape", "levels", "classes", "notes", "test_from", "value_range", "columns")
BESIDE = ("labels", "cond", "mask")


def told(path: Path) -> Path:
    """The file beside an array file that says what the array alone does not."""
    return path.with_name(path.stem + ".told.safetensors")


class Packing:
    """Arrays in files of a ``folder``, where a data set can be put together that memory would not hold."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder.resolve(), itertools.count()

    def place(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of zeros in a file, whose room on the disk is taken at once. Raises `ResourceError`."""
        path, head = self.folder / f"{next(self.numbers)}.npy", _header(shape, dtype)
        size = len(head) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            with path.open("wb") as file:
                file.write(head)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, not by a signal later
        except OSError as error:
            cause = f"{size:,} bytes cannot be had ({error.strerror})"
            raise ResourceError("DISK", self.folder.parent, cause, "Free some space, or pack somewhere else") from None
        return np.memmap(path, dtype, "r+", len(head), shape)

    def write(self, data: Dataset, out: Path) -> None:
        """Makes the values of ``data`` the file ``out``, whole or not at all, with what else is known beside it."""
        values = data.values
        if not isinstance(values, np.memmap) or Path(str(values.filename)).parent != self.folder:
            values, start = self.place(values.shape, values.dtype), 0
            for chunk in chunks(data.values):
                values[start : start + len(chunk)] = chunk
                start += len(chunk)
        assert isinstance(values, np.memmap)
        values.flush()
        path, head = Path(str(values.filename)), _header(values.shape, values.dtype)
        with path.open("r+b") as file:
            file.write(head)  # of as many bytes as for any other number of items
            file.truncate(len(head) + values.nbytes)
            os.fsync(file.fileno())
        about = {name: getattr(data, name) for name in ABOUT if name != "shape"} | {"shape": values.shape}
        beside = {name: array for name in BESIDE if (array := getattr(data, name)) is not None}
        if data.names:
            beside["names"] = np.frombuffer(os.fsencode("\0".join(data.names)), np.uint8)
        save_file(beside, self.folder / "told", {"about": json.dumps(about)})
        os.replace(self.folder / "told", told(out))
        os.replace(path, out)


@contextmanager
def packing(out: Path) -> Iterator[Packing]:
    """A `Packing` beside ``out``, of which nothing else is left. Raises `ConfigError` where it cannot be written."""
    if out.suffix != ".npy":
        raise ConfigError("OPTION", out, "packed data are a .npy file", "Give a name that ends in .npy")
    if os.path.lexists(out):
        raise ConfigError("OPTION", out, "is there already", "Give another name, or delete it")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.stem}-", dir=out.parent)
    except OSError as error:
        raise ResourceError("FOLDER", out.parent, f"cannot be written ({error.strerror})", "Pack elsewhere") from None
    with folder as name:
        yield Packing(Path(name))


def load_packed(path: Path) -> Dataset:
    """The data set that was packed as ``path``, with all that was known of it. Raises `DataError`."""
    try:
        with safe_open(told(path), framework="np") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["about"])
            beside = {name: file.get_tensor(name) for name in (*BESIDE, "names") if name in file.keys()}  # noqa: SIM118
        ends = about["value_range"]
        kinds = {name: tuple(about[name]) for name in ("classes", "notes", "columns")}
        if (names := beside.pop("names", None)) is not None:
            kinds["names"] = tuple(os.fsdecode(names.tobytes()).split("\0"))
        data = load_array(
            path, layout=LAYOUTS[len(about["shape"])], levels=about["levels"], value_range=ends and (ends[0], ends[1])
        )
        if list(data.values.shape) != about["shape"]:
            raise Refused("SIZE_MISMATCH", f"it is of an array of shape {about['shape']}", "Pack the data again")
        return replace(data, name=about["name"], test_from=about["test_from"], **kinds, **beside)
    except (SafetensorError, ConfigError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Refused("BAD_HEADER", f"does not say what was packed ({error})"[:200], "Pack the data again").at(
            told(path)
        ) from error
    except Refused as refused:
        raise refused.at(told(path)) from None


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file of an array begins with; equally long for any number of items."""
    buffer = io.BytesIO()
    head = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(buffer, head)
    return buffer.getvalue()

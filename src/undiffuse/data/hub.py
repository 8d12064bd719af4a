"""Folders that the library ``datasets`` has written: Arrow tables with a column of images, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from undiffuse.data.dataset import Dataset
from undiffuse.data.decoded import decoded
from undiffuse.data.image import Prepare
from undiffuse.data.problems import Refused
from undiffuse.data.seen import Stamp
from undiffuse.errors import DataError

FIX = "Save it again with save_to_disk, one Dataset with a column of images"


def is_saved(source: Path) -> bool:
    """Whether ``source`` is a folder that ``save_to_disk`` has written."""
    return (source / "state.json").is_file() or (source / "dataset_dict.json").is_file()


def load_saved(source: str | Path, prepare: Prepare = Prepare(), on_bad: str = "stop") -> Dataset:  # noqa: B008 (frozen)
    """The images of a folder that ``Dataset.save_to_disk`` has written, in its order, with its ClassLabel column.

    Only what lies in the folder is read: no file that a row names, and no network. Options and errors as
    `load_folder`; DataError (MISSING_PACKAGE) without the library, (BAD_HEADER) for a folder that it cannot read.
    """
    source = Path(source)
    try:
        import datasets
    except ImportError:
        cause = "it was written by the library datasets, which is not here"
        raise DataError("MISSING_PACKAGE", source, cause, "pip install 'undiffuse[hub]'") from None
    if (source / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(path.name for path in source.iterdir() if path.is_dir()))
        raise Refused("BAD_HEADER", f"holds several data sets ({parts})", "Name the folder of one of them").at(source)
    try:
        table: Any = datasets.load_from_disk(str(source), keep_in_memory=False)
        columns = {
            name: [c for c, f in table.features.items() if isinstance(f, kind)]
            for name, kind in (("images", datasets.Image), ("labels", datasets.ClassLabel))
        }
    except Exception as error:  # it raises whatever its parts do
        raise Refused("BAD_HEADER", f"cannot be read ({type(error).__name__}: {error})"[:200], FIX).at(source) from None
    if len(columns["images"]) != 1 or len(columns["labels"]) > 1:
        raise Refused("NO_IMAGES", f"has the columns {', '.join(table.features)}", FIX).at(source)
    image = columns["images"][0]
    rows = table.cast_column(image, datasets.Image(decode=False)).select_columns([image])

    def encoded(number: int) -> bytes:
        held = rows[number][image]
        if held is None or held["bytes"] is None:
            raise Refused("NOT_AN_IMAGE", "the row holds no bytes of an image", FIX)
        return held["bytes"]

    words: list[str | None] = [None] * len(rows)
    for label in columns["labels"]:
        names = table.features[label].names
        words = [names[k] if k is not None and k >= 0 else None for k in table[label]]
    paths = [Path(file["filename"]) for file in table.cache_files]
    files = {path: Stamp.of(path.stat()) for path in paths}
    places = [f"row {number}" for number in range(len(rows))]
    return decoded(source.name, source, places, encoded, words, prepare, on_bad, files)

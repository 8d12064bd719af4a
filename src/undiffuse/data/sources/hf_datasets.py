"""Folders written by the library ``datasets``: memory-mapped Arrow tables with a column of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from undiffuse.data.dataset import Dataset
from undiffuse.data.encoded_images import Origin, encoded_dataset
from undiffuse.data.image_decoding import ImageOptions
from undiffuse.data.source_report import FileStamp
from undiffuse.data.sources.captions import LABELS_LEFT_OUT, Captions, check_captions, column_of
from undiffuse.errors import DataError
from undiffuse.runtime.file_errors import FileError

FIX = "Save it again with save_to_disk, one Dataset with one column of images"


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is a folder that ``save_to_disk`` has written."""
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        return True
    return (folder / "state.json").is_file() and (
        (folder / "dataset_info.json").is_file() or any(folder.glob("*.arrow"))
    )


def load(
    source: str | Path, *, on_bad: str = "stop", captions: bool = False, with_labels: bool = False, **image_options: Any
) -> Dataset:
    """The images of a folder that ``Dataset.save_to_disk`` has written, in its order, with its ClassLabel column.

    Classes keep the order of that column; one without an image is left out.

    With ``captions`` a column called text or caption, of texts or lists of texts, takes the place of labels, unless
    ``with_labels`` keeps both.

    Reads only files in the folder: none that a row refers to, and nothing from the network. Options and errors as
    `image_folder.load`; also `DataError` (MISSING_PACKAGE) without the library, (BAD_HEADER) for an unreadable folder.
    """
    source, options = Path(source), ImageOptions(**image_options)
    try:
        import datasets
    except ImportError:
        cause = "the library datasets, which wrote this folder, is not installed"
        raise DataError("MISSING_PACKAGE", source, cause, "pip install 'undiffuse[hub]'") from None
    if (source / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(path.name for path in source.iterdir() if path.is_dir()))
        cause = f"contains several data sets ({parts})"
        raise FileError("BAD_HEADER", cause, "Name the folder of one of them").at(source)
    try:
        table: Any = datasets.load_from_disk(str(source), keep_in_memory=False)
        images, labels = (
            [column for column, feature in table.features.items() if isinstance(feature, kind)]
            for kind in (datasets.Image, datasets.ClassLabel)
        )
    except Exception as error:  # the library raises exceptions of many types
        cause = f"cannot be read ({type(error).__name__}: {error})"[:200]
        raise FileError("BAD_HEADER", cause, FIX).at(source) from None
    if len(images) != 1 or len(labels) > 1:
        raise FileError("NO_IMAGES", f"has the columns {', '.join(table.features)}", FIX).at(source)
    column = images[0]
    rows = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def read_bytes(index: int) -> bytes:
        cell = rows[index][column]
        if cell is None or cell["bytes"] is None:
            raise FileError("NOT_AN_IMAGE", "the row contains no image bytes", FIX)
        return cell["bytes"]

    label_texts: list[str | None] = [None] * len(rows)
    texts: list[Captions | FileError] = []
    origin = Origin()
    if captions:
        if (text := column_of(table.features)) is None:
            cause = f"no column is called text or caption: it has {', '.join(table.features)}"
            raise FileError("CAPTIONS", cause, "Rename the column of captions to text").at(source)
        texts = [_captions_of(cell) for cell in table[text]]
        origin = origin._replace(captions=f"the column {text}")
    for label in labels if with_labels or not captions else ():
        names = table.features[label].names
        origin = origin._replace(labels=f"the column {label}", classes=tuple(names))
        label_texts = [names[k] if k is not None and k >= 0 else None for k in table[label]]
    paths = [Path(file["filename"]) for file in table.cache_files]
    files = {path: FileStamp.of(path.stat()) for path in paths}
    image_names = [f"row {index}" for index in range(len(rows))]
    name = source.name
    data = encoded_dataset(name, source, image_names, read_bytes, label_texts, options, on_bad, files, origin, texts)
    return data.with_notes(*[f"labels {LABELS_LEFT_OUT}"] * bool(labels and captions and not with_labels))


def _captions_of(cell: Any) -> Captions | FileError:
    try:
        return check_captions(cell)
    except FileError as error:
        return error

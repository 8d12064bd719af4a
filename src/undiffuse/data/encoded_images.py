"""Encoded images in a larger file, each of which is decoded at each access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.decoding_threads import map_in_order
from undiffuse.data.image_decoding import DecodedImage, ImageOptions, decode_image
from undiffuse.data.lazy_array import LazyArray, cast_to_array
from undiffuse.data.source_report import FileStamp, SourceReport, changed_error
from undiffuse.data.sources.captions import Captions, captions_note
from undiffuse.data.sources.csv_table import label_classes
from undiffuse.data.sources.folder_labels import Labels, indexed_labels
from undiffuse.data.sources.image_folder import ImageKind, check_on_bad, image_notes, mixed_kinds_error
from undiffuse.errors import ConfigError, DataError
from undiffuse.runtime.file_errors import BadFilesError, FileError, FileProblem, file_errors_at, os_error

ReadBytes = Callable[[int], bytes]
"""The bytes of the encoded image at an index."""


class Origin(NamedTuple):
    """Where ``labels`` and ``captions`` are from, in words, and the order of ``classes``, if the source has one."""

    labels: str = ""
    captions: str = ""
    classes: tuple[str, ...] = ()


def encoded_dataset(
    name: str,
    source: Path,
    image_names: Sequence[str],
    read_bytes: ReadBytes,
    label_texts: Sequence[str | None],
    options: ImageOptions,
    on_bad: str,
    files: Mapping[Path, FileStamp],
    origin: Origin,
    captions: Sequence[Captions | FileError] = (),
) -> Dataset:
    """The images ``image_names`` in ``source``: each is decoded once now, and again at each access.

    ``label_texts`` are their classes, or all None, ``captions`` those of each image, or its problem; ``files``
    contain the images and must not change; ``origin`` is for notes and for the order of the classes. Raises
    `BadFilesError` with every image that cannot be used, unless ``on_bad="skip"`` skips these; `DataError` (LABELS);
    `ConfigError` (OPTION).
    """
    check_on_bad(on_bad)
    if options.frames == "all":
        raise ConfigError("OPTION", "frames", "only one frame per image is read here", "Give first, or image files")
    paths = [source / image_name for image_name in image_names]
    by_kind: dict[ImageKind, list[int]] = {}
    problems: list[FileProblem] = []
    decoded: dict[int, DecodedImage] = {}
    reading = Lock()  # a source need not be safe to read in several threads

    def decode(i: int) -> DecodedImage | FileError:
        try:
            with reading:
                data = read_bytes(i)
            return decode_image(data, paths[i].suffix, options)
        except (FileError, OSError) as error:
            return os_error(error) if isinstance(error, OSError) else error

    with closing(map_in_order(decode, range(len(paths)))) as results:
        for i, (path, image) in enumerate(zip(paths, results, strict=True)):
            if captions and isinstance(problem := captions[i], FileError) and isinstance(image, DecodedImage):
                image = problem
            if isinstance(image, FileError):
                problems.append(FileProblem(path, image.code, image.reason))
                continue
            by_kind.setdefault((image.pixels.shape, image.num_values), []).append(i)
            decoded[i] = image._replace(pixels=np.empty(0))
    mixed = None
    if len(by_kind) > 1:
        mixed = mixed_kinds_error({kind: [paths[i] for i in indices] for kind, indices in by_kind.items()}, source)
    if mixed and (mixed.of_whole if on_bad == "skip" else not problems):
        raise mixed
    if not by_kind or (problems and on_bad == "stop"):
        raise BadFilesError(problems, skippable=bool(by_kind))
    shape, num_values = most_frequent = max(by_kind, key=lambda kind: len(by_kind[kind]))
    kept = np.array(by_kind.pop(most_frequent), np.int64)
    if mixed:
        others = [i for indices in by_kind.values() for i in indices]
        problems += [FileProblem(paths[i], mixed.code, "differs from most images") for i in others]

    def read(indices: np.ndarray) -> np.ndarray:
        report.check_unchanged()
        chosen = kept[indices].tolist()
        with closing(map_in_order(decode, chosen)) as results:
            items = np.stack([unchanged(i, image) for i, image in zip(chosen, results, strict=True)])
        report.check_unchanged()
        return items

    def unchanged(i: int, image: DecodedImage | FileError) -> np.ndarray:
        if isinstance(image, FileError) or image.pixels.shape != shape:
            raise changed_error().at(paths[i])
        return image.pixels

    classes, labels, label_notes = _labels(name, [label_texts[i] for i in kept], origin)
    changes = Counter(change for i in kept for change in decoded[i].changes)
    notes = label_notes + image_notes(changes, len(kept), problems, len(paths), "images")
    texts = tuple(texts for i in kept if captions and not isinstance(texts := captions[i], FileError))
    notes += [captions_note(texts, origin.captions)] if texts else []
    formats = Counter(decoded[i].format for i in kept)
    sizes = Counter("{} x {}".format(*decoded[i].size_on_disk) for i in kept)
    report = SourceReport(formats, sizes, skipped=tuple(problems), files=files)
    values = cast_to_array(LazyArray((len(kept), *shape), np.uint8 if num_values <= 256 else np.uint16, read))
    names = tuple(image_names[int(i)] for i in kept)
    parts = {"names": names, "report": report, "captions": texts}
    return Dataset(name, values, num_values, labels, classes, tuple(notes), **parts)


def _labels(name: str, texts: list[str | None], origin: Origin) -> Labels:
    labelled = [text for text in texts if text is not None]
    if not labelled:
        return (), None, []
    if missing := len(texts) - len(labelled):
        fix = "Give every image a label, or none"
        raise DataError("LABELS", name, f"{missing} of {len(texts)} images have no label", fix)
    with file_errors_at(name):
        present = set(labelled)
        classes = [name for name in origin.classes if name in present] or label_classes(labelled)[0]
    return indexed_labels(labelled, classes, origin.labels)

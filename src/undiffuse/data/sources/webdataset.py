"""WebDataset shards: tar files in which the members of an item are adjacent and share a key."""

from __future__ import annotations

import json
import os
import re
import stat
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.data.dataset import Dataset
from undiffuse.data.encoded_images import Origin, encoded_dataset
from undiffuse.data.image_decoding import ImageOptions
from undiffuse.data.image_formats import SUFFIXES
from undiffuse.data.source_report import FileStamp
from undiffuse.data.sources.captions import LABELS_LEFT_OUT, MAX_TEXT_FILE_BYTES, Captions, parse_text
from undiffuse.data.sources.folder_labels import part_called
from undiffuse.data.sources.image_folder import MAX_FILE_BYTES
from undiffuse.errors import counted
from undiffuse.runtime.file_errors import FileError, file_errors_at

FIX = "Write the shards again, uncompressed, with the members of each item adjacent and under one key"
MAX_LABEL_BYTES = 1 << 20


class ShardImage(NamedTuple):
    shard: Path
    member: str
    start: int
    size: int
    label: str | None
    captions: Captions | FileError


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is a tar file, or a folder with at least one."""
    return bool(find_shards(Path(source)))


def find_shards(source: Path) -> list[Path]:
    """The tar file ``source``, or the tar files in the folder ``source`` in the order of their names."""
    if source.is_dir() and os.access(source, os.R_OK):  # else the folder of images reports it
        paths = (path for path in source.iterdir() if path.suffix.lower() == ".tar" and not path.is_dir())
        return sorted(paths, key=os.fsencode)
    return [source] if source.suffix.lower() == ".tar" and source.is_file() else []


def load(
    source: str | Path, *, on_bad: str = "stop", captions: bool = False, with_labels: bool = False, **image_options: Any
) -> Dataset:
    """The images of tar files, in their order: ``key.png`` (or another format), with labels.

    ``key.cls`` is a label as text, ``key.json`` may contain a ``label``; other members are ignored. With
    ``captions`` the lines of ``key.txt`` are captions, which take the place of labels unless ``with_labels`` keeps
    both. Shards are indexed once and never unpacked: images are read at their offsets. Options and errors as
    `image_folder.load`.
    """
    source, options = Path(source), ImageOptions(**image_options)
    images: list[ShardImage] = []
    files = {}
    for shard in find_shards(source):
        with file_errors_at(shard):
            status = shard.stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileError("NOT_A_REGULAR_FILE", "is a pipe, a socket or a device")
            files[shard] = FileStamp.of(status)
            try:
                images += _index(shard, captions, with_labels or not captions)
            except tarfile.TarError as error:
                raise FileError("BAD_ARCHIVE", f"is not an uncompressed tar file ({error})", FIX) from None
    if not images:
        raise FileError("NO_IMAGES", f"its {len(files)} tar files contain no image", FIX).at(source)

    def read_bytes(index: int) -> bytes:
        image = images[index]
        if image.size > MAX_FILE_BYTES:
            raise FileError("TOO_LARGE", f"{image.size:,} bytes are more than {MAX_FILE_BYTES:,}")
        with image.shard.open("rb") as file:
            file.seek(image.start)
            return file.read(image.size)

    image_names = [f"{image.shard.name}/{image.member}" if source.is_dir() else image.member for image in images]
    labels = [image.label if with_labels or not captions else None for image in images]
    unused = captions and not with_labels and any(image.label is not None for image in images)
    texts = [image.captions for image in images] if captions else ()
    origin = Origin("members of the shards", "members called .txt")
    data = encoded_dataset(source.stem, source, image_names, read_bytes, labels, options, on_bad, files, origin, texts)
    ignored = sum(path not in files for path in source.iterdir()) if source.is_dir() else 0
    words = {word for path in files for word in re.split(r"[^A-Za-z]+", path.stem) if part_called(word)}
    listed = " and ".join(sorted(words))
    mixed = [f"shards called {listed} are read as one data set, not as its parts"] * (
        len(set(map(part_called, words))) > 1
    )
    others = [f"{counted(ignored, 'file')} ignored (not shards)"] * (ignored > 0)
    unused_note = [f"labels {LABELS_LEFT_OUT}"] * unused
    return data.with_notes(counted(len(files), "shard"), *unused_note, *mixed, *others)


def _index(shard: Path, with_captions: bool, with_labels: bool) -> list[ShardImage]:
    """The images of a shard with their offsets, labels and captions; only ``with_labels`` a bad label is an error."""
    images: dict[str, ShardImage] = {}
    labels: dict[str, str] = {}
    captions: dict[str, Captions | FileError] = {}
    missing = FileError("CAPTIONS", "there is no caption: no member of its key ends in .txt", FIX)
    last_key = None
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not member.isreg() or not stem or not dot:
                continue
            key, suffix = f"{folder}/{stem}", f".{extension.lower()}"
            if key != last_key and (key in images or key in labels or key in captions):
                raise FileError("BAD_ARCHIVE", f"the members of {key.lstrip('/')} are not adjacent", FIX)
            last_key = key
            if suffix in SUFFIXES:
                if key in images:
                    raise FileError("BAD_ARCHIVE", f"{key.lstrip('/')} has two images", FIX)
                images[key] = ShardImage(shard, member.name, member.offset_data, member.size, None, missing)
            elif suffix == ".txt" and with_captions:
                file = archive.extractfile(member)
                assert file is not None
                try:
                    captions[key] = parse_text(file.read(MAX_TEXT_FILE_BYTES))
                except FileError as error:
                    captions[key] = error
            elif suffix in (".cls", ".json"):
                try:
                    label = _read_label(archive, member, suffix)
                except FileError:
                    if with_labels:
                        raise
                    continue
                if label is not None:
                    labels.setdefault(key, label)
    return [image._replace(label=labels.get(key), captions=captions.get(key, missing)) for key, image in images.items()]


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> str | None:
    """The label in a member; None for JSON without a label. Raises `FileError` (LABELS)."""
    if member.size > MAX_LABEL_BYTES:
        raise FileError("LABELS", f"{member.name} is larger than {MAX_LABEL_BYTES:,} bytes", FIX)
    file = archive.extractfile(member)
    assert file is not None
    text = file.read()
    try:
        if suffix == ".cls":
            return text.decode().strip()
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise FileError("LABELS", f"{member.name} cannot be read", FIX) from None
    label = content.get("label") if isinstance(content, dict) else None
    if isinstance(label, bool | list | dict) or (isinstance(label, float) and not label.is_integer()):
        fix = "Write a text or a whole number"
        raise FileError("LABELS", f"the label in {member.name} is neither a text nor a whole number", fix)
    return str(int(label) if isinstance(label, float) else label) if label is not None else None

"""Shards as WebDataset writes them: tar files in which the members of an item follow one another and share a key."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from undiffuse.data.dataset import Dataset
from undiffuse.data.decoded import decoded
from undiffuse.data.folder import MAX_BYTES
from undiffuse.data.image import SUFFIXES, Prepare
from undiffuse.data.problems import Refused, refusal
from undiffuse.data.seen import Stamp

FIX = "Write the shards again, uncompressed, each item's members one after another under one key"
LONGEST = 1 << 16
"""Bytes of a label."""


class Image(NamedTuple):
    shard: Path
    member: str
    start: int
    size: int
    word: str | None


def shards_of(source: Path) -> list[Path]:
    """The tar file that ``source`` is, or those of a folder in the order of their names; none if it has none."""
    if source.is_dir():
        return sorted((path for path in source.iterdir() if path.suffix.lower() == ".tar"), key=os.fsencode)
    return [source] if source.suffix.lower() == ".tar" and source.is_file() else []


def load_shards(source: str | Path, prepare: Prepare = Prepare(), on_bad: str = "stop") -> Dataset:  # noqa: B008 (frozen)
    """The images of tar files, in their order: ``key.png`` (or another image), ``key.cls`` or ``key.json`` its class.

    ``key.cls`` is a class as text, ``key.json`` a table whose ``label`` is one; other members are left aside. The
    shards are indexed once and read where an image lies: they are never unpacked. Options and errors as `load_folder`.
    """
    source = Path(source)
    images: list[Image] = []
    files = {}
    for shard in shards_of(source):
        try:
            files[shard] = Stamp.of(shard.stat())
            images += _index(shard)
        except tarfile.TarError as error:
            raise Refused("BAD_ARCHIVE", f"is no plain tar file ({error})", FIX).at(shard) from None
        except OSError as error:
            raise refusal(error).at(shard) from error
        except Refused as refused:
            raise refused.at(shard) from None
    if not images:
        raise Refused("NO_IMAGES", f"its {len(files)} tar files hold no image", FIX).at(source)

    def encoded(number: int) -> bytes:
        image = images[number]
        if image.size > MAX_BYTES:
            raise Refused("TOO_LARGE", f"{image.size:,} bytes are more than {MAX_BYTES:,}")
        with image.shard.open("rb") as file:
            return os.pread(file.fileno(), image.size, image.start)

    places = [f"{image.shard.name}/{image.member}" if source.is_dir() else image.member for image in images]
    words = [image.word for image in images]
    made = decoded(source.stem, source, places, encoded, words, prepare, on_bad, files)
    others = sum(path not in files for path in source.iterdir()) if source.is_dir() else 0
    return made.noted(f"{len(files)} shards", *[f"{others} files ignored that are no shards"] * (others > 0))


def _index(shard: Path) -> list[Image]:
    """The images of a shard with their places in it."""
    found: dict[str, Image] = {}
    words: dict[str, str] = {}
    last = None
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if not member.isreg() or not stem or not dot:
                continue
            key, suffix = f"{folder}/{stem}", f".{ending.lower()}"
            if key != last and (key in found or key in words):
                raise Refused("BAD_ARCHIVE", f"the members of {key.lstrip('/')} do not follow one another", FIX)
            last = key
            if suffix in SUFFIXES:
                if key in found:
                    raise Refused("BAD_ARCHIVE", f"{key.lstrip('/')} has two images", FIX)
                found[key] = Image(shard, member.name, member.offset_data, member.size, None)
            elif suffix in (".cls", ".json"):
                file = archive.extractfile(member)
                assert file is not None
                if (word := _word(file.read(LONGEST), suffix, member.name)) is not None:
                    words.setdefault(key, word)
    return [image._replace(word=words.get(key)) for key, image in found.items()]


def _word(text: bytes, suffix: str, name: str) -> str | None:
    """The class that a member names; None if it is JSON of something else."""
    try:
        if suffix == ".cls":
            return text.decode().strip()
        told = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("LABELS", f"{name} cannot be read", FIX) from None
    word = told.get("label") if isinstance(told, dict) else None
    return str(word) if isinstance(word, str | int) else None

"""Images that stay encoded where they lie, any one of which is decoded when it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.folder import Kind, mixed
from undiffuse.data.image import Picture, Prepare, decode
from undiffuse.data.problems import BadFiles, Problem, Refused, refusal
from undiffuse.data.rows import Rows, as_array
from undiffuse.data.seen import Seen, Stamp, changed
from undiffuse.data.table import named
from undiffuse.errors import ConfigError, DataError

Encoded = Callable[[int], bytes]
"""The bytes of an image file, by its number."""


def decoded(
    name: str,
    source: Path,
    places: Sequence[str],
    encoded: Encoded,
    words: Sequence[str | None],
    prepare: Prepare,
    on_bad: str,
    files: Mapping[Path, Stamp],
) -> Dataset:
    """The images at ``places`` in ``source``, each looked at once and then decoded anew whenever it is needed.

    ``words`` are their classes, or all None; ``files`` hold them and must stay as they are. Raises BadFiles with every
    image that cannot be taken, unless ``on_bad="skip"`` leaves it out; DataError (LABELS), ConfigError (OPTION).
    """
    if on_bad not in ("stop", "skip"):
        raise ConfigError("OPTION", "on_bad", f"{on_bad!r} is unknown", "Give stop or skip")
    if prepare.frames == "all":
        raise ConfigError("OPTION", "frames", "one image an item is taken here", "Give first, or a folder of files")
    where = [source / place for place in places]
    kinds: dict[Kind, list[int]] = {}
    problems: list[Problem] = []
    did: dict[int, Picture] = {}
    for i, place in enumerate(where):
        try:
            picture = decode(encoded(i), place.suffix, prepare)
        except (Refused, OSError) as error:
            refused = refusal(error) if isinstance(error, OSError) else error
            problems.append(Problem(place, refused.code, refused.reason))
            continue
        kinds.setdefault((picture.pixels.shape, picture.levels), []).append(i)
        did[i] = picture._replace(pixels=np.empty(0))
    odd = mixed({kind: [where[i] for i in items] for kind, items in kinds.items()}) if len(kinds) > 1 else None
    if odd and on_bad == "stop" and not problems:
        raise odd
    if not kinds or (problems and on_bad == "stop"):
        raise BadFiles(problems)
    shape, levels = most = max(kinds, key=lambda kind: len(kinds[kind]))
    kept = np.array(kinds.pop(most), np.int64)
    if odd:
        problems += [Problem(where[i], odd.code, "differs from most") for items in kinds.values() for i in items]

    def read(numbers: np.ndarray) -> np.ndarray:
        seen.check()
        found = np.stack([again(int(i)) for i in kept[numbers]])
        seen.check()
        return found

    def again(i: int) -> np.ndarray:
        try:
            pixels = decode(encoded(i), where[i].suffix, prepare).pixels
        except (Refused, OSError):
            raise changed().at(where[i]) from None
        if pixels.shape != shape:
            raise changed().at(where[i])
        return pixels

    classes, labels = _labels(name, [words[i] for i in kept])
    phrases = Counter(phrase for i in kept for phrase in did[i].did)
    notes = [f"{n} of {len(kept)} images: {phrase}" for phrase, n in sorted(phrases.items())]
    if problems:
        codes = ", ".join(f"{n} {code}" for code, n in Counter(p.code for p in problems).most_common())
        notes.append(f"{len(problems)} of {len(where)} images skipped: {codes}")
    formats = Counter(did[i].kind for i in kept)
    sizes = Counter("{} x {}".format(*did[i].stored) for i in kept)
    seen = Seen(formats, sizes, skipped=tuple(problems), mapped=files)
    values = as_array(Rows((len(kept), *shape), np.uint8 if levels <= 256 else np.uint16, read))
    names = tuple(places[i] for i in map(int, kept))
    return Dataset(name, values, levels, labels, classes, tuple(notes), names=names, seen=seen)


def _labels(name: str, words: list[str | None]) -> tuple[tuple[str, ...], np.ndarray | None]:
    known = [word for word in words if word is not None]
    if not known:
        return (), None
    if len(known) < len(words):
        fix = "Give every image a label, or none"
        raise DataError("LABELS", name, f"{len(words) - len(known)} of {len(words)} images have no label", fix)
    return named(known)

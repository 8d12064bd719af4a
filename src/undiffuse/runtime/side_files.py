"""Side files: JSON beside a model or in its file, without which the model works. A damaged one harms no run.

A record is a JSON file with the sha256 of its own content. Lines of metrics have none, since they are appended, and the
facts in a model's file are data of anybody; both are checked field by field.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from undiffuse.runtime.atomic_file import json_digest, write_atomic

MAX_NUMBER = 1e100
"""Finite numbers in metrics are smaller than this, so that means and squares of them are finite."""
MAX_SECONDS = 1e10


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, plain data, as a record. Raises `ResourceError`."""
    plain = json.loads(json.dumps(content))
    write_atomic(path, json.dumps({**plain, "sha256": json_digest(plain)}, indent=1).encode())


def set_aside(path: Path, word: str = "damaged") -> Path:
    """The new path of the file ``path``, which is renamed: `free_name` with ``word``. Raises `OSError`."""
    return path.rename(free_name(path, word))


def free_name(path: Path, word: str) -> Path:
    """The first of PATH.WORD, PATH.WORD-2 ... that does not exist."""
    names = (path.with_name(f"{path.name}.{name}") for name in numbered(word))
    return next(other for other in names if not os.path.lexists(other))


def numbered(name: str) -> Iterator[str]:
    """NAME, NAME-2, NAME-3 ..."""
    yield name
    yield from (f"{name}-{i}" for i in itertools.count(2))


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of a record, as it was written; None if the file is missing, damaged, edited or no record.

    Raises `OSError` if there is a file that cannot be read.
    """
    try:
        record = json.loads(path.read_bytes())
        return record if record.pop("sha256") == json_digest(record) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, for ``object_pairs_hook``. Raises ValueError where a key occurs twice."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
    return dict(pairs)


def parse_metrics(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records in the lines of a file of metrics, and the number of lines that are no numbers at a step."""
    records, damaged = [], 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_metric(record):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _is_metric(record: Any) -> bool:
    if not isinstance(record, dict) or not all(map(_is_number, record.values())):
        return False
    step, seconds = record.get("step"), record.get("seconds", 0)
    return type(step) is int and step >= 0 and 0 <= seconds <= MAX_SECONDS


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and (abs(value) < MAX_NUMBER or not math.isfinite(value))


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(each) is kind for each in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return rows and all(row.keys() >= ACCURACY and all(map(_is_number, row.values())) for row in value)


ACCURACY = {"log_snr", "items", "accuracy", "stderr"}
FACTS: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "items": _is_count,
    "item_shape": _is_list_of(int),
    "num_values": lambda value: value is None or (_is_count(value) and value >= 2),
    "classes": _is_list_of(str),
    "columns": _is_list_of(str),
    "notes": _is_list_of(str),
    "fingerprint": _is_text,
    "held_out": _is_fraction,
    "steps": _is_count,
    "seconds": _is_number,
    "seed": _is_count,
    "batch": _is_count,
    "precision": _is_text,
    "torch": _is_text,
    "ema": _is_fraction,
    "ema_error": _is_number,
    "accuracy": _is_table,
    "conditional": lambda value: isinstance(value, bool),
    "distilled": lambda value: isinstance(value, dict) and _is_number(value.get("guidance", 1)),
    "imported": lambda value: (
        isinstance(value.get("scheduler", {}), dict) if isinstance(value, dict) else _is_text(value)
    ),
    "init": lambda value: isinstance(value, dict) and check_info(value) == value and _is_text(value.get("weights")),
    "text_encoder": lambda value: isinstance(value, dict) and all(map(_is_text, (value.get("name"), *value.values()))),
}
"""What the facts in a model's file have to be; others are the user's and may be anything."""


def check_info(info: Any) -> dict[str, Any]:
    """The facts about data and training in a model's file, without those of `FACTS` that are of another form."""
    if not isinstance(info, dict):
        return {}
    return {name: value for name, value in info.items() if name not in FACTS or FACTS[name](value)}

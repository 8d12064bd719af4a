"""A run folder: configuration, weights, training state, measurements and pictures of one model."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from undiffuse.checkpoint import unwritten, write_file
from undiffuse.config import from_dict, to_dict
from undiffuse.data import Dataset
from undiffuse.errors import CheckpointError, ConfigError, ResourceError

BEFORE_RECORD = {"checkpoints", "pictures", "lock", "run.json.partial"}
"""What a run that was killed at its very beginning may leave."""

FREE = {"on_nonfinite", "save_minutes"}
"""Settings that change nothing of a run that has come so far."""

OLDEST_RECORD = {"config", "data", "finished"}


class ChangedError(ConfigError):
    """A run was begun with another recipe, other data or another torch: ``rows`` of (what, as begun, now)."""

    def __init__(self, folder: Path, rows: Sequence[tuple[str, str, str]]) -> None:
        self.rows = rows
        first = "; ".join(f"{what} was {old}, now {new}" for what, old, new in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        fix = "Give --out a new folder, the flags and data it was begun with, or --force to go on with these"
        super().__init__("RUN", folder, f"this run was begun with other settings: {first}{more}", fix)


class Run:
    """The paths of a run and what stands in its ``run.json``. Nothing is created before `open`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.pictures = self.folder / "pictures"
        self.snapshots = self.folder / "snapshots"
        self.model = self.folder / "model.safetensors"
        self.metrics = self.folder / "metrics.jsonl"

    @property
    def record(self) -> dict[str, Any] | None:
        """What ``run.json`` says: ``config``, ``data``, ``torch`` and ``finished``; None if there is none."""
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_bytes())
            _ = record["config"], record["data"]["fingerprint"], record["finished"]
            known = set(record) <= OLDEST_RECORD  # which had no sha256
            whole = known or record.pop("sha256") == _digest(record)
        except (ValueError, KeyError, TypeError):
            whole, record = False, None
        if not whole:
            fix = "Restore it, or train into another folder"
            raise CheckpointError("RUN", path, "not the record of a run, or damaged", fix)
        return record

    @property
    def finished(self) -> bool:
        record = self.record
        return bool(record and record["finished"])

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it this process is the only one that writes into the run, whose folder it makes.

        Raises `ResourceError` that names the process which is there already. One that was killed holds nothing.
        """
        self._claim()
        lock, pid = self.folder / "lock", f"{os.getpid()}\n".encode()
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritten(lock, len(pid), error) from None
        try:
            _take(handle)
            os.ftruncate(handle, 0)
            os.pwrite(handle, pid, 0)
        except BlockingIOError:
            cause = f"process {_holder(lock)} is training into this folder"
            raise ResourceError("BUSY", self.folder, cause, "Wait for it, stop it, or give another --out") from None
        except OSError as error:
            raise unwritten(lock, len(pid), error) from None
        else:
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)

    @property
    def trainer(self) -> str | None:
        """The number of the process that trains into the run, None if none does: by its lock, and not by its number."""
        lock = self.folder / "lock"
        with suppress(OSError), open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(lock)
        return None

    def open(self, config: Any, data: Dataset, force: bool = False) -> bool:
        """Begins the record of this recipe, or makes sure that the run there is of it, of the data and of this torch.

        Raises `ChangedError` where it is not; with ``force`` the record is changed, which True says.
        """
        self._claim()
        for left in self.folder.glob("*.partial"):
            left.unlink()
        if data.seen.skipped:
            data.seen.write(self.folder / "skipped.json")
        fresh = {"config": to_dict(config), "data": describe(data), "torch": torch.__version__, "finished": False}
        record = self.record
        if record is None:
            self._write(fresh)
            return False
        with suppress(ConfigError):  # settings that came later have their defaults
            record["config"] = to_dict(from_dict(type(config), record["config"]))
        changed = [*_differences(_told(record), _told(fresh))]
        if not changed:
            if record["config"] != fresh["config"]:
                self._write({**record, "config": fresh["config"]})
            return False
        if not force:
            raise ChangedError(self.folder, changed)
        self._write({**record, **fresh, "changed": [*record.get("changed", []), [list(row) for row in changed]]})
        return True

    def finish(self) -> None:
        """Marks the run as finished."""
        record = self.record
        assert record is not None
        self._write({**record, "finished": True})

    def lengthen(self, config: Any, step: int) -> None:
        """Makes the run an unfinished one of a longer recipe that goes on from ``step``, and notes that it did."""
        record = self.record
        assert record is not None
        longer = to_dict(config)
        was, now = ({key: c["train"][key] for key in ("steps", "minutes")} for c in (record["config"], longer))
        note = {"from_step": step, "was": was, "now": now}
        extended = [*record.get("extended", []), note]
        self._write({**record, "config": longer, "finished": False, "extended": extended})

    def _claim(self) -> None:
        """Makes the folders, unless something else than a run is there."""
        try:
            here = {f.name for f in self.folder.iterdir()} if self.folder.is_dir() else set()
            if "run.json" not in here and here - BEFORE_RECORD:
                cause = "this folder is not empty and is no run"
                raise ConfigError("RUN", self.folder, cause, "Give --out a new folder")
            for folder in (self.folder, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"cannot be created ({error.strerror})"
            raise ResourceError("FOLDER", self.folder, cause, "Give --out another folder") from None

    def _write(self, record: dict[str, Any]) -> None:
        text = json.dumps({**record, "sha256": _digest(record)}, indent=1)
        write_file(self.folder / "run.json", text.encode())

    def read_metrics(self, up_to: int | None = None) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``, without those after step ``up_to`` and without a torn last line."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if up_to is None or record["step"] <= up_to:
                records.append(record)
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One more record at the end of ``metrics.jsonl``, for who watches; `write_metrics` writes it durably."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """All ``records`` as JSONL and as CSV with every column that one of them has."""
        write_file(self.metrics, "".join(json.dumps(r) + "\n" for r in records).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for r in records for key in r)))
        writer.writeheader()
        writer.writerows(records)
        write_file(self.folder / "metrics.csv", table.getvalue().encode())


def describe(data: Dataset) -> dict[str, Any]:
    """What a run says of its data, plain."""
    return {
        "name": data.name,
        "items": len(data),
        "item_shape": list(data.item_shape),
        "levels": data.levels,
        "classes": list(data.classes),
        "columns": list(data.columns),
        "notes": list(data.notes),
        "fingerprint": data.fingerprint,
    }


def _told(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record must be the same when a run goes on."""
    data = {key: record["data"][key] for key in ("fingerprint", "items", "item_shape", "levels")}
    major = {"torch": record["torch"].split(".")[0]} if "torch" in record else {}
    recipe = {
        part: {key: value for key, value in settings.items() if key not in FREE}
        for part, settings in record["config"].items()
    }
    return {**recipe, "data": data, **major}


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if where or key in old:  # a whole part that an older record did not hold
                yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, repr(old), repr(new)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _take(handle: int) -> None:
    """Locks the file, which who only looks, by `Run.trainer`, may hold for a moment. Raises BlockingIOError."""
    for _ in range(10):
        with suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.01)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(lock: Path) -> str:
    """The number that the process which holds the lock writes there just after it has it."""
    for _ in range(100):
        if number := lock.read_text().strip():
            return number
        time.sleep(0.01)
    return "unknown"

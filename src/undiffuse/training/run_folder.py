"""A run folder: configuration, weights, training state, records and pictures of one model."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from undiffuse.data.dataset import Dataset
from undiffuse.data.sources.registry import load, path_of
from undiffuse.data.stage_data import StageData
from undiffuse.errors import CheckpointError, ConfigError, DataError, ResourceError, counted
from undiffuse.model.config import from_dict, to_dict
from undiffuse.runtime.atomic_file import json_digest, remedy, write_atomic
from undiffuse.runtime.folder_lock import lock_folder, lock_holder
from undiffuse.runtime.own_output import UNRECORDED_RUN
from undiffuse.runtime.part_store import Log
from undiffuse.runtime.side_files import parse_metrics, read_record, write_record

ATOMIC_FILES = ("run.json", "skipped.json", "metrics.jsonl", "metrics.csv", "report.html")
ATOMIC_FILES += ("model.safetensors", "init.safetensors")
"""What is written under the name with .partial and renamed."""
CHANGEABLE_SETTINGS = {"on_nonfinite", "save_minutes"}
"""Settings that may change when a run is resumed, because they do not change what is trained."""

Change = tuple[str, str, str]
"""What has changed, its value at the beginning, and now."""


class InitialWeights(NamedTuple):
    """The file of a model and its ``fingerprint``, the sha256 in it; None in a file that is not one of a model."""

    path: Path
    fingerprint: str | None


class ChangedError(ConfigError):
    """A run began with another recipe, other data or another torch: ``rows`` of (what, at the beginning, now).

    A ``finished`` run cannot be resumed with others.
    """

    def __init__(self, folder: Path, rows: Sequence[Change], finished: bool = False) -> None:
        self.rows = rows
        changes = "; ".join(f"{what} was {old}, now {new}" for what, old, new in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        cause = f"this {'folder holds a finished run' if finished else 'run began'} with other settings"
        fix = "Give a new folder as --out, the options and data that the run began with, no options of training (train "
        fix += "then keeps its recipe), or --force to use the new ones"
        if finished:
            fix = "Give a new folder as --out, or the options and data that the run began with"
            if {what for what, _, _ in rows} <= {"train.max_steps", "train.minutes"}:
                fix = "Give --out a new folder, or (not for distill) --extend with the --steps or --minutes to add"
        super().__init__("RUN", folder, f"{cause}: {changes}{more}", fix)


class Run:
    """The paths of a run, its ``run.json`` and `loggers`. Nothing is created before `open` or `exclusive`."""

    def __init__(self, folder: str | Path, loggers: Sequence[str] = ()) -> None:
        self.folder, self.loggers = Path(folder), tuple(loggers)
        self.checkpoints = self.folder / "checkpoints"
        self.pictures = self.folder / "pictures"
        self.snapshots = self.folder / "snapshots"
        self.model = self.folder / "model.safetensors"
        self.initial = self.folder / "init.safetensors"
        self.metrics = self.folder / "metrics.jsonl"

    @property
    def record(self) -> dict[str, Any] | None:
        """The content of ``run.json``: ``config``, ``data``, ``torch`` and ``finished``; None if there is no file.

        ``data`` is `describe`, with ``source`` and ``options`` if they were read from a name or a path.

        Raises `CheckpointError` if it is damaged.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        try:
            record = read_record(path)
            _ = record["config"], record["data"]["fingerprint"], record["finished"]  # pyright: ignore
        except OSError as error:
            cause = f"cannot be read ({error.strerror or error})"
            raise CheckpointError("UNREADABLE", path, cause, remedy(error)) from None
        except (KeyError, TypeError):
            fix = "Restore it, or train into another folder"
            raise CheckpointError("RUN", path, "not the record of a run, or damaged", fix) from None
        return record

    def require_record(self) -> dict[str, Any]:
        """`record`. Raises `CheckpointError` also where there is none."""
        if (record := self.record) is not None:
            return record
        raise CheckpointError("NOT_FOUND", self.folder, "there is no run in this folder", "Give the folder of a run")

    @property
    def id(self) -> str:
        """A digest of the recipe and the data that the run began with; it is in each of its checkpoints and snapshots.

        It stays when a run is extended or resumed by force. Empty if there is no record.
        """
        return (self.record or {}).get("id", "")

    @property
    def finished(self) -> bool:
        return (self.record or {}).get("finished", False)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint of training to resume from."""
        return bool(checkpoint_folders(self.checkpoints))

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the run for writing by this process, and create its folder.

        Raises `ResourceError` naming the process that holds the lock. A killed process releases it.
        """
        self._claim()
        with lock_folder(self.folder, "training into"):
            yield

    @property
    def training_pid(self) -> str | None:
        """The id of the process that holds the lock; see `lock_holder`."""
        return lock_holder(self.folder)

    def check_finished(self, config: Any, data: Dataset, init_fingerprint: str | None = None) -> bool:
        """Whether the run is finished. Raises `ChangedError` if so and recipe, data or initial weights are others."""
        record = self.record
        if record is None or not record["finished"]:
            return False
        if changed := _changes(record, _fresh(config, data, init_fingerprint) | {"torch": record.get("torch")}, config):
            raise ChangedError(self.folder, changed, finished=True)
        return True

    def open(
        self,
        config: Any,
        data: Dataset,
        force: bool = False,
        init_fingerprint: str | None = None,
        weights: InitialWeights | None = None,
    ) -> bool:
        """Write the record of a new run, or compare that of an existing one with recipe, data and torch's version.

        ``init_fingerprint`` is that of the weights that ``--init`` names; without it, and with ``force``, that of the
        record is kept. ``weights``: what training starts from, of which the run keeps a copy.
        Raises `ChangedError` if they differ; with ``force`` replace the record and return True.
        """
        self._claim()
        for name in ATOMIC_FILES:
            (self.folder / f"{name}.partial").unlink(missing_ok=True)
        changed = self._update_record(_fresh(config, data, init_fingerprint), config, data, force, weights)
        if data.report.skipped:  # after the record, without which the folder would not be taken for a run
            data.report.write(self.folder / "skipped.json")
        return changed

    def _keep(self, weights: InitialWeights, is_new: bool) -> None:
        """Copy the weights that training starts from, unless they are there; a resumed run needs the copy alone.

        Raises `ConfigError` if a new run would replace another file of that name.
        """
        content = weights.path.read_bytes()
        kept = self.initial.read_bytes() if self.initial.is_file() else None
        if is_new and kept not in (None, content):
            cause = "this file exists already and does not belong to this run"
            raise ConfigError("RUN", self.initial, cause, "Give --out a new folder")
        if kept != content:
            write_atomic(self.initial, content)

    def _update_record(
        self, fresh: dict[str, Any], config: Any, data: Dataset, force: bool, weights: InitialWeights | None
    ) -> bool:
        """Write ``fresh`` if there is no record, else compare the two: see `open`."""
        record = self.record
        if weights is not None and (record is None or record.get("init") == weights.fingerprint):
            self._keep(weights, is_new=record is None)
        if record is None:
            self._write({**fresh, "id": json_digest(_compared_fields(fresh))})
            return False
        if not (changed := _changes(record, fresh, config)):
            kept = {**record, "config": fresh["config"], "data": record["data"] | _origin(data)}
            if kept != record:
                self._write(kept)
            return False
        if not force:
            raise ChangedError(self.folder, changed)
        fresh.pop("init", None)
        self._write({**record, **fresh, "changed": [*record.get("changed", []), [list(row) for row in changed]]})
        return True

    def load_data(self) -> Dataset:
        """The data of the run, read from their source with the options that the run began with.

        Raises `ConfigError` (NO_SOURCE) if the run does not record a source, `DataError` (CHANGED) if the data there
        are others by now, and what `undiffuse.load_data` raises.
        """
        record, fix = self.record, "Name DATA"
        if record is None:
            raise ConfigError("NO_SOURCE", self.folder, "no run.json in this folder records the data", fix)
        began = record["data"]
        if not began.get("source"):
            cause = "this run does not record where its data came from (they were an array in Python)"
            raise ConfigError("NO_SOURCE", self.folder, cause, fix)
        if (path := path_of(began["source"])) is not None and not path.exists():
            raise DataError("NOT_FOUND", path, "the data that the run was trained on are not there", f"{fix} after RUN")
        data = load(began["source"], **began.get("options", {}))
        if data.fingerprint != began["fingerprint"]:
            counts = f": {counted(began['items'], 'item')} then, {len(data):,} now"
            cause = f"these data have changed since the run began{counts * (len(data) != began['items'])}"
            fix = "Restore them, or name DATA to use them as they are"
            raise DataError("CHANGED", began["source"], cause, fix)
        return data

    def finish(self) -> None:
        """Mark the run as finished."""
        self._write({**self.require_record(), "finished": True})

    def extend(self, config: Any, step: int) -> None:
        """Replace the recipe by a longer one that resumes from ``step``; note it, and mark the run unfinished."""
        record = self.require_record()
        new = to_dict(config)
        was, now = ({key: c["train"][key] for key in ("max_steps", "minutes")} for c in (record["config"], new))
        note = {"from_step": step, "was": was, "now": now}
        extended = [*record.get("extended", []), note]
        self._write({**record, "config": new, "finished": False, "extended": extended})

    def _claim(self) -> None:
        """Create the folders. Raises `ConfigError` if the folder holds something else than a run, `ResourceError`."""
        try:
            names = {f.name for f in self.folder.iterdir()} if self.folder.is_dir() else set()
            if "run.json" not in names and names - UNRECORDED_RUN:
                cause = "this folder is neither empty nor a run"
                raise ConfigError("RUN", self.folder, cause, "Give --out a new folder")
            for folder in (self.folder, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"cannot be created ({error.strerror})"
            raise ResourceError("FOLDER", self.folder, cause, "Give --out another folder") from None

    def _write(self, record: dict[str, Any]) -> None:
        write_record(self.folder / "run.json", record)

    def read_metrics(self, up_to: int | None = None, log: Log = lambda line: None) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl`` up to step ``up_to``, without damaged lines.

        ``log`` gets a message about them; a last line that was cut by a kill is not counted.
        """
        try:
            content = self.metrics.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            log(f"{self.metrics} cannot be read ({error.strerror}): the curves begin here")
            return []
        records, damaged = parse_metrics(content)
        if lost := damaged - (not content.endswith(b"\n") and damaged > 0):
            log(f"{self.metrics}: {lost} damaged {'line is' if lost == 1 else 'lines are'} left out")
        return [record for record in records if up_to is None or record["step"] <= up_to]

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a record to ``metrics.jsonl``, for `undiffuse watch`; only `write_metrics` makes it durable."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Write ``records`` as JSONL, and as CSV with the union of their columns."""
        write_atomic(self.metrics, "".join(json.dumps(r) + "\n" for r in records).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for r in records for key in r)))
        writer.writeheader()
        writer.writerows(records)
        write_atomic(self.folder / "metrics.csv", table.getvalue().encode())


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` in the order of their steps; what has another name is not ours."""
    return sorted(named_folders(folder, "step"), key=step_of)


def named_folders(folder: Path, kind: str) -> list[Path]:
    """The files and folders in ``folder`` that are named "kind-STEP"; ``kind`` is a regular expression."""
    return [path for path in folder.glob("*") if re.fullmatch(rf"({kind})-\d{{8,}}", path.name)]


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def describe(data: Dataset) -> dict[str, Any]:
    """Facts about the data for ``run.json`` and the model's file, as plain data."""
    return {
        "name": data.name,
        "items": len(data),
        "item_shape": list(data.item_shape),
        "num_values": data.num_values,
        "classes": list(data.classes),
        "columns": list(data.columns),
        "notes": list(data.notes),
        "fingerprint": data.fingerprint,
        **({"stage": data.stage} if isinstance(data, StageData) else {}),
        **({"text_encoder": data.text_encoder} if data.captions else {}),
    }


def _fresh(config: Any, data: Dataset, init_fingerprint: str | None) -> dict[str, Any]:
    """The record of a run that begins now."""
    begun = {"config": to_dict(config), "data": describe(data) | _origin(data), "torch": torch.__version__}
    return begun | ({"init": init_fingerprint} if init_fingerprint else {}) | {"finished": False}


def _changes(record: dict[str, Any], fresh: dict[str, Any], config: Any) -> list[Change]:
    """What differs between two records. Settings that are newer than ``record`` get their defaults in it."""
    with suppress(ConfigError):
        record["config"] = to_dict(from_dict(type(config), record["config"]))
    changed = [*_differences(_compared_fields(record), _compared_fields(fresh))]
    if "init" in fresh and fresh["init"] != record.get("init"):
        changed.append(("init", repr(record.get("init")), repr(fresh["init"])))
    return changed


def _origin(data: Dataset) -> dict[str, Any]:
    """Where the data came from, for ``run.json`` alone: a path says nothing on another machine."""
    return {"source": data.report.source, "options": dict(data.report.options)} if data.report.source else {}


def _compared_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that must not change when a run is resumed."""
    data = {key: record["data"][key] for key in ("fingerprint", "items", "item_shape", "num_values")}
    major = {"torch": record["torch"].split(".")[0]} if "torch" in record else {}
    train = {key: value for key, value in record["config"]["train"].items() if key not in CHANGEABLE_SETTINGS}
    return {**record["config"], "train": train, "data": data, **major}


def _differences(old: Any, new: Any, where: str = "") -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if where or key in old:  # skip whole sections that an older record does not have
                yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, repr(old), repr(new)

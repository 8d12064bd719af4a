"""A run folder: configuration, weights, training state, measurements and pictures of one model."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from undiffuse.config import to_dict
from undiffuse.data import Dataset
from undiffuse.errors import CheckpointError, ConfigError, ResourceError

BEFORE_RECORD = {"checkpoints", "pictures", "run.json.partial"}
"""What a run that was killed at its very beginning may leave."""


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
        """What ``run.json`` says: ``config``, ``data`` and ``finished``; None if there is none."""
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text())
            _ = record["config"], record["data"]["fingerprint"], record["finished"]
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                "RUN", path, "not the record of a run", "Restore it, or train into another folder"
            ) from None
        return record

    @property
    def finished(self) -> bool:
        record = self.record
        return bool(record and record["finished"])

    def open(self, config: Any, data: Dataset) -> None:
        """Creates the folder for this recipe, or makes sure that an unfinished run there is of it and the data."""
        record = self.record
        if record is None:
            if self.folder.is_dir() and any(f.name not in BEFORE_RECORD for f in self.folder.iterdir()):
                raise ConfigError(
                    "RUN", self.folder, "this folder is not empty and is no run", "Give --out a new folder"
                )
            try:
                for folder in (self.folder, self.checkpoints, self.pictures):
                    folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ResourceError(
                    "FOLDER", self.folder, f"cannot be created ({error.strerror})", "Give --out another folder"
                ) from None
            self._write({"config": to_dict(config), "data": describe(data), "finished": False})
            return
        if record["data"]["fingerprint"] != data.fingerprint:
            cause = f"this run was begun on other data ({record['data']['name']}, {record['data']['items']} items)"
            raise ConfigError("RUN", self.folder, cause, "Give --out a new folder, or the data it was begun with")
        changed = _differences(record["config"], to_dict(config))
        if changed:
            cause = f"this run was begun with another recipe: {'; '.join(changed[:4])}"
            raise ConfigError("RUN", self.folder, cause, "Give --out a new folder, or the flags it was begun with")

    def finish(self) -> None:
        """Marks the run as finished."""
        record = self.record
        assert record is not None
        self._write({**record, "finished": True})

    def _write(self, record: dict[str, Any]) -> None:
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(record, indent=1))
        os.replace(partial, self.folder / "run.json")

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

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """All ``records`` as JSONL and as CSV with every column that one of them has."""
        self.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
        columns = list(dict.fromkeys(key for r in records for key in r))
        with open(self.folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(records)


def describe(data: Dataset) -> dict[str, Any]:
    """What a run says of its data, plain."""
    return {
        "name": data.name,
        "items": len(data),
        "item_shape": list(data.item_shape),
        "levels": data.levels,
        "classes": list(data.classes),
        "notes": list(data.notes),
        "fingerprint": data.fingerprint,
    }


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where} was {old!r}, now {new!r}"]

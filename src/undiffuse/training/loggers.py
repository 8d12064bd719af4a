"""The records of a run as curves in TensorBoard or Weights & Biases, by the trackers of accelerate.

metrics.jsonl stays the record of a run. A logger gets a copy of each number once, also when the run is resumed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.errors import ConfigError
from undiffuse.runtime.side_files import read_record, write_record

Records = Sequence[Mapping[str, Any]]
BOARD, WANDB_RECORD = "tensorboard", "wandb.json"
"""In the folder of a run: event files of TensorBoard, and the id of its run of wandb."""
PROJECT = "undiffuse"


class Logger:
    """A ``tracker`` of accelerate that gets each number of the records from step ``first`` on once."""

    def __init__(self, tracker: Any, first: int = 0) -> None:
        self.tracker, self.first, self.written = tracker, first, set[tuple[int, str]]()

    def add(self, records: Records) -> None:
        """Log the numbers of ``records`` that it has not yet got; their steps do not fall."""
        for record in records:
            step = record["step"]
            fresh = [name for name in record if name != "step" and (step, name) not in self.written]
            self.written.update((step, name) for name in fresh)
            if fresh and step >= self.first:
                self.tracker.log({name: float(record[name]) for name in fresh}, step=step)

    def close(self) -> None:
        self.tracker.finish()


def board(folder: Path) -> Logger:
    """TensorBoard's files in ``folder``, whose earlier events no reader shows any more: it gets all records again."""
    _require("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    again = {"purge_step": 0} if any(folder.glob("*tfevents*")) else {}
    return Logger(_started(TensorBoardTracker(folder.name, folder.parent, **again)))


def _board_of(folder: Path, config: Mapping[str, Any]) -> Logger:
    return board(folder / BOARD)


def _wandb_of(folder: Path, config: Mapping[str, Any]) -> Logger:
    """The run of wandb that the run in ``folder`` began; a new one if it began none. wandb takes a step only once."""
    _require("wandb")
    from accelerate.tracking import WandBTracker

    record = read_record(folder / WANDB_RECORD)
    if record is None:
        record = {"id": secrets.token_hex(8)}
        write_record(folder / WANDB_RECORD, record)
    options = {"id": record["id"], "resume": "allow", "name": folder.resolve().name, "dir": str(folder)}
    options["config"] = dict(config)
    tracker = _started(WandBTracker(PROJECT, **options))
    return Logger(tracker, tracker.run.step if tracker.run.resumed else 0)


class Row(NamedTuple):
    """``open`` makes the logger of a run from its folder and its recipe."""

    extra: str
    open: Callable[[Path, Mapping[str, Any]], Logger]


LOGGERS = {"tensorboard": Row("tensorboard", _board_of), "wandb": Row("wandb", _wandb_of)}


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is not in `LOGGERS`, or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError("LOGGER", f"loggers = {name}", "no such logger", f"Give {' or '.join(LOGGERS)}")
        _require(name)


def open_loggers(names: Sequence[str], folder: Path, records: Records, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers ``names`` of the run in ``folder``, with its ``records`` so far.

    Raises `ConfigError` for one that cannot start.
    """
    opened = []
    for name in dict.fromkeys(names):
        try:
            logger = LOGGERS[name].open(folder, config)
            logger.add(records)
        except ConfigError:
            raise
        except Exception as error:  # of another package
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            fix = "Follow its documentation, or leave it out"
            raise ConfigError("LOGGER", f"loggers = {name}", f"it cannot start ({reason})", fix) from error
        opened.append(logger)
    return opened


def _require(package: str) -> None:
    if find_spec(package) is None:
        fix = f"Install it: pip install 'undiffuse[{LOGGERS[package].extra}]'"
        raise ConfigError("MISSING_PACKAGE", package, "is not installed", fix)


def _started(tracker: Any) -> Any:
    """``tracker``, started: in newer versions of accelerate creating one does not start it."""
    getattr(tracker, "start", lambda: None)()
    return tracker

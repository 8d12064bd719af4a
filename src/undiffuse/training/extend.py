"""Extend a run: on a CPU it becomes, to the bit, the run that would have started with the longer recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from undiffuse.data.dataset import Dataset
from undiffuse.errors import ConfigError, counted
from undiffuse.model.config import Config, from_dict, replace_train
from undiffuse.training.run_folder import Run
from undiffuse.training.train_state import (
    drop_checkpoints_after,
    finish_interrupted_writes,
    resume_step_for_extension,
)


def extend(
    out: str | Path,
    data: Dataset,
    steps: int | None = None,
    minutes: float | None = None,
    conditional: bool = False,
    force: bool = False,
    config_type: type = Config,
) -> tuple[Any, int]:
    """Make the run ``out`` longer by ``steps`` or ``minutes``; return the new recipe and the step it resumes from.

    That is its newest checkpoint before the decay of the learning rate, up to which a longer run is the same; if there
    is none, the newest, with a second decay. Then call the function that trained it, with the new recipe. Extending an
    unfinished run again by the same amount changes nothing, so that an interrupted command can be repeated.

    ``conditional``: require a conditional run. ``force``: accept one that another torch began. ``config_type`` is the
    class of its recipe. Nothing is changed if it raises `ConfigError`, `CheckpointError` or `ResourceError`.
    """
    run = Run(out)
    if run.record is None:
        raise ConfigError("EXTEND", run.folder, "there is no run to extend", "Train without --extend")
    with run.exclusive():
        record = run.require_record()
        if record["data"]["fingerprint"] != data.fingerprint:
            cause = f"this run began with other data ({record['data']['name']}, {record['data']['items']} items)"
            raise ConfigError("EXTEND", run.folder, cause, "Give the data that it began with")
        try:
            config = from_dict(config_type, record["config"], "run.json")
        except ConfigError as error:
            cause = "this run was made by another command or version"
            fix = "Extend it by the command that made it; a distilled run cannot be extended"
            raise ConfigError("EXTEND", run.folder, cause, fix) from error
        if conditional and not config.train.conditional:
            cause = "this run began without --conditional"
            raise ConfigError("EXTEND", run.folder, cause, "Omit it, or train into another folder")
        unit, more = ("max_steps", steps) if config.train.max_steps is not None else ("minutes", minutes)
        flag = "--steps" if unit == "max_steps" else "--minutes"
        length: float = getattr(config.train, unit)
        if more is None or None not in (steps, minutes):
            cause = f"the length of this run is {counted(length, flag[2:].removesuffix('s'))}"
            raise ConfigError("EXTEND", run.folder, cause, f"Give what to add, in the same unit: --extend {flag} N")
        if not 0 < more < math.inf:
            raise ConfigError("EXTEND", flag, f"a run cannot be extended by {more:g}", "Give a number above 0")
        extensions = [] if record["finished"] else record.get("extended", [])[-1:]
        if any(e["now"][unit] == length == e["was"][unit] + more for e in extensions):
            longer, step = config, extensions[0]["from_step"]
        else:
            longer = replace_train(config, **{unit: length + more})
            step = resume_step_for_extension(run.checkpoints)
            run.open(config, data, force)
            run.extend(longer, step)  # before checkpoints are removed: after a kill the command can be repeated
        finish_interrupted_writes(run.checkpoints)
        return longer, drop_checkpoints_after(run.checkpoints, step, getattr(longer.train, unit))

"""A run made longer: it becomes, to the bit, what it would have been had it been begun with the longer recipe."""

from __future__ import annotations

import math
from pathlib import Path

from undiffuse.config import Config, from_dict, replace_train
from undiffuse.data import Dataset
from undiffuse.errors import ConfigError
from undiffuse.train import state
from undiffuse.train.run import Run


def extend(
    out: str | Path,
    data: Dataset,
    steps: int | None = None,
    minutes: float | None = None,
    conditional: bool = False,
    force: bool = False,
) -> tuple[Config, int]:
    """The recipe of the run ``out``, longer by so many ``steps`` or ``minutes``, and the step from which it goes on.

    That is its newest checkpoint before the learning rate fell: training there was that of a longer run too. If none
    is left it goes on from the newest, with a decay of its own. `fit` with this recipe does the rest. A run that is
    not finished and was last made longer by as much is not made longer again: it goes on. ``conditional`` asks for
    such a run; ``force`` takes one that another torch began. What cannot be is refused before anything is changed.
    Raises `ConfigError`, `CheckpointError`, `ResourceError`.
    """
    run = Run(out)
    if run.record is None:
        raise ConfigError("EXTEND", run.folder, "there is no run to make longer", "Train without --extend")
    with run.alone():
        record = run.record
        assert record is not None
        if record["data"]["fingerprint"] != data.fingerprint:
            cause = f"this run was begun on other data ({record['data']['name']}, {record['data']['items']} items)"
            raise ConfigError("EXTEND", run.folder, cause, "Give the data that it was begun with")
        config = from_dict(Config, record["config"], "run.json")
        if conditional and not config.train.conditional:
            cause = "this run was begun without --conditional"
            raise ConfigError("EXTEND", run.folder, cause, "Leave it out, or train into another folder")
        unit, more = ("steps", steps) if config.train.steps is not None else ("minutes", minutes)
        length: float = getattr(config.train, unit)
        if more is None or None not in (steps, minutes):
            cause = f"the length of this run is {length:g} {unit}"
            raise ConfigError("EXTEND", run.folder, cause, f"Say with --{unit} how many more it shall have")
        if not 0 < more < math.inf:
            cause = f"{more:g} more {unit} make no run longer"
            raise ConfigError("EXTEND", f"--{unit}", cause, "Give a number above 0")
        notes = [] if record["finished"] else record.get("extended", [])[-1:]
        if any(note["now"][unit] == length == note["was"][unit] + more for note in notes):
            longer, step = config, notes[0]["from_step"]
        else:
            longer, step = replace_train(config, **{unit: length + more}), state.turning_point(run.checkpoints)
            run.open(config, data, force)
            run.lengthen(longer, step)  # before anything is removed: who is killed here asks again
        state.tidy(run.checkpoints)
        return longer, state.rewind(run.checkpoints, step, getattr(longer.train, unit))

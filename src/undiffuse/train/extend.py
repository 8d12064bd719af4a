"""A run made longer: it becomes, to the bit, what it would have been had it been begun with the longer recipe."""

from __future__ import annotations

from pathlib import Path

from undiffuse.config import Config, from_dict, replace_train
from undiffuse.data import Dataset
from undiffuse.errors import ConfigError
from undiffuse.train import state
from undiffuse.train.run import Run


def extend(
    out: str | Path, data: Dataset, steps: int | None = None, minutes: float | None = None
) -> tuple[Config, int]:
    """The recipe of the run ``out``, longer by so many ``steps`` or ``minutes``, and the step from which it goes on.

    That is its newest checkpoint before the learning rate fell: training there was that of a longer run too. If none
    is left it goes on from the newest, with a decay of its own. `fit` with this recipe does the rest. Raises
    `ConfigError`, `CheckpointError`, `ResourceError`.
    """
    run = Run(out)
    record = run.record
    if record is None:
        raise ConfigError("EXTEND", run.folder, "there is no run to make longer", "Train without --extend")
    if record["data"]["fingerprint"] != data.fingerprint:
        cause = f"this run was begun on other data ({record['data']['name']}, {record['data']['items']} items)"
        raise ConfigError("EXTEND", run.folder, cause, "Give the data that it was begun with")
    config = from_dict(Config, record["config"], "run.json")
    old = config.train
    unit, more = ("steps", steps) if old.steps is not None else ("minutes", minutes)
    if more is None or None not in (steps, minutes):
        cause = f"the length of this run is {getattr(old, unit):g} {unit}"
        raise ConfigError("EXTEND", run.folder, cause, f"Say with --{unit} how many more it shall have")
    longer = replace_train(config, **{unit: getattr(old, unit) + more})
    with run.alone():
        step = state.rewind(run.checkpoints)
        run.lengthen(longer, step)
    return longer, step

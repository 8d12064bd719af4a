"""From the options of a command of training to its recipe: one rule for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from undiffuse.cli.options import console
from undiffuse.errors import ConfigError, counted

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.config import TrainConfig
    from undiffuse.training.run_folder import Run

T = TypeVar("T")


@dataclass(frozen=True)
class RecipeOptions:
    """The options of a command of training that its recipe follows from; None where one is not given.

    ``own`` are those that only this command has. Raises `ConfigError` for a length that is given twice or is none.
    """

    minutes: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    lr: float | None = None
    seed: int | None = None
    config: Path | None = None
    own: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        check_length(self.minutes, self.steps, self.epochs)

    def are_given(self, except_for: tuple[str, ...] = ()) -> bool:
        """Whether any option is given that is not one of ``except_for``."""
        values = [getattr(self, field.name) for field in fields(self) if field.name not in (*except_for, "own")]
        return any(value is not None for value in (*values, *self.own))

    def extended(self, run: Run, dataset: Dataset, device: str, kind: type, *others: Any, **options: Any) -> Self:
        """Extend the ``run`` of recipes of ``kind``; returns the options that are left for the command.

        ``others`` are options that an extended run does not take either, ``options`` those of
        `undiffuse.training.extend.extend`. Raises `ConfigError`.
        """
        if self.are_given(except_for=("minutes", "steps")) or any(other is not None for other in others):
            cause = "an extended run keeps the recipe that it began with"
            raise ConfigError("USAGE", "--extend", cause, "Give no other option of training than --minutes or --steps")
        _extend(run, dataset, device, kind, self.steps, self.minutes, **options)
        return replace(self, minutes=None, steps=None)

    def recipe(
        self,
        run: Run,
        dataset: Dataset,
        kind: type[T],
        base: Callable[[], T],
        default_minutes: float = 10.0,
        on_nonfinite: str | None = None,
    ) -> tuple[T, bool]:
        """The recipe, and whether it is that of a ``run`` that has begun, which it is where no option is given.

        A new one is ``base()``, changed by the file of --config and then by the options. ``default_minutes`` is its
        length where none of them has one.
        """
        from undiffuse.model import config as configs

        record = None if self.are_given() else run.record
        if record is not None:
            recipe = configs.from_dict(kind, record["config"], "run.json")
        else:
            recipe = base() if self.config is None else configs.read(self.config, base())
            given = {name: value for name in ("batch", "lr", "seed") if (value := getattr(self, name)) is not None}
            recipe = configs.replace_train(recipe, **given)
            recipe = self._with_length(recipe, dataset, default_minutes)
        if on_nonfinite is not None:
            recipe = configs.replace_train(recipe, on_nonfinite=on_nonfinite)
        return recipe, record is not None

    def _with_length(self, recipe: T, dataset: Dataset, default: float) -> T:
        """The recipe with the length given by options, else its own, else ``default`` minutes."""
        from undiffuse.model.config import replace_train

        settings: TrainConfig = recipe.train  # pyright: ignore[reportAttributeAccessIssue]
        steps = self.steps if self.epochs is None else steps_of_epochs(self.epochs, dataset, settings)
        if self.minutes is not None or steps is not None:
            return replace_train(recipe, minutes=self.minutes, max_steps=steps)
        has_length = settings.minutes is not None or settings.max_steps is not None
        return recipe if has_length else replace_train(recipe, minutes=default)


def check_length(minutes: float | None, steps: int | None, epochs: float | None = None) -> None:
    """Raise `ConfigError` if more than one is given, or a number of epochs that is not above 0 and finite."""
    given = [flag for flag, x in (("--minutes", minutes), ("--steps", steps), ("--epochs", epochs)) if x is not None]
    if len(given) > 1:
        raise ConfigError("USAGE", ", ".join(given), "each determines the length of the run", "Give one of them")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError("USAGE", f"--epochs {epochs:g}", "not a length", "Give a number above 0")


def steps_of_epochs(epochs: float, data: Dataset, settings: TrainConfig) -> int:
    """The steps in which each training item occurs ``epochs`` times, rounded up: ⌈epochs · items / batch⌉.

    Raises `ConfigError`.
    """
    held_out, _ = data.held_out_fraction(settings.held_out)
    steps = epochs * len(data.split(held_out).train) / settings.batch
    if not steps < 2**63:
        raise ConfigError("USAGE", f"--epochs {epochs:g}", "the steps are too many", "Give fewer")
    return math.ceil(steps)


def format_length(settings: TrainConfig) -> str:
    """The length of a run in words."""
    return counted(settings.minutes, "minute") if settings.minutes else counted(settings.max_steps or 0, "step")


def _extend(
    run: Run, dataset: Dataset, device: str, kind: type, steps: int | None, minutes: float | None, **options: Any
) -> None:
    """Extend the run in one process of those that the launcher started; the others wait."""
    from undiffuse.runtime.distributed_group import init_process_group
    from undiffuse.training.extend import extend

    group = init_process_group(device)
    if group.rank == 0:
        _, step = extend(run.folder, dataset, steps, minutes, config_type=kind, **options)
        console.print(f"{run.folder} is extended and resumes from step {step:,}")
    group.gather(None)

"""Where a run stands: the steps and seconds done, and the plan for its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from undiffuse.model.config import TrainConfig

MEASURING_FRACTION, MEASURING_SECONDS = 0.05, 5.0
"""Of a run by the clock, evaluations take at most this fraction, or so many seconds if that is more."""


def measuring_allowance(settings: TrainConfig) -> float:
    """The seconds that all evaluations and pictures of a run by the clock may take; at most a quarter of the run.

    One half is for evaluations during training, the other for the last one. Infinite for a run of given steps.
    """
    if settings.max_steps is not None or settings.minutes is None:
        return math.inf
    seconds = 60 * settings.minutes
    return max(MEASURING_FRACTION * seconds, min(MEASURING_SECONDS, seconds / 4))


def training_seconds(settings: TrainConfig) -> float:
    """When the last step of a run by the clock ends, in seconds: the last measurement is inside its ``minutes``."""
    if settings.max_steps is not None or settings.minutes is None:
        return math.inf
    return 60 * settings.minutes - measuring_allowance(settings) / 2


@dataclass
class Progress:
    """``step`` optimizer steps, done in ``seconds``. The learning rate falls from step ``decay_from`` to ``last_step``.

    Both are None until `lr_schedule.plan_lr_decay` sets them. Stored as JSON in every checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    last_step: int | None = None
    skipped_in_a_row: int = 0
    """Consecutive steps, up to this one, that were skipped for a NaN or infinite loss or gradient."""
    length: float | None = None
    """The ``max_steps`` or ``minutes`` that the plan is for; another value (an extended run) makes a new plan."""
    run: str = ""
    """The id of the run, so that a checkpoint of another run is recognized."""
    step_seconds: float = 0.0
    """The seconds that the latest step took."""
    measuring_seconds: float = 0.0
    """The part of ``seconds`` that evaluations, pictures, and saving for them have taken."""
    compiled: bool | None = None
    """Whether the network is compiled, where the recipe leaves it open and `compiled.choose` has measured both."""
    evaluation_missing: bool = False
    """Whether an evaluation is due at this step and comes after the checkpoint."""

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.last_step is not None and self.step >= self.last_step

    def fraction(self, settings: TrainConfig) -> float:
        """The fraction of the run that is done, in [0, 1]: by steps once the last one is planned, else by the clock."""
        by_clock = min(1.0, self.seconds / (60 * settings.minutes)) if settings.minutes else 0.0
        if not self.last_step:
            return by_clock
        return min(1.0, max(self.step / self.last_step, by_clock))

"""The learning rate over a run: linear warmup, plateau and linear decay to 0, planned by steps or by the clock."""

from __future__ import annotations

import math

from undiffuse.model.config import TrainConfig
from undiffuse.training.progress import Progress, training_seconds


def plan_lr_decay(progress: Progress, settings: TrainConfig) -> None:
    """Set ``decay_from`` and ``last_step`` of ``progress``.

    With ``max_steps`` at the first call; with ``minutes`` when the clock reaches the decay, and when another step would
    end too late by more than half of the seconds that it takes.
    """
    length = settings.minutes if settings.max_steps is None else settings.max_steps
    if progress.length != length:
        progress.decay_from, progress.last_step, progress.length = None, None, length
    if settings.max_steps is not None:
        progress.last_step = settings.max_steps
        progress.decay_from = round(settings.max_steps * (1 - settings.decay))
    elif settings.minutes is not None and progress.step > 0:
        end = training_seconds(settings)
        if progress.decay_from is None and progress.seconds >= (1 - settings.decay) * end:
            progress.decay_from = progress.step
        if progress.last_step is None and progress.seconds + progress.step_seconds / 2 >= end:
            progress.last_step = progress.step


def decay_begins(progress: Progress, settings: TrainConfig) -> bool:
    """Whether the decay of a run by the clock begins now: from a checkpoint of this step it can be extended."""
    return settings.max_steps is None and progress.decay_from == progress.step


def lr_factor(progress: Progress, settings: TrainConfig) -> float:
    """min(warmup, decay) in [0, 1], by which the next step's learning rate is multiplied.

    With k steps done, warmup is (k + 1)/``warmup`` and decay is (``last_step`` − k)/(``last_step`` − ``decay_from``);
    in a run by the clock, which may slow down, seconds take the place of steps in the decay.
    """
    warmup = min(1.0, (progress.step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.max_steps is not None:
        done, start, end = progress.step, progress.decay_from, progress.last_step
    else:
        end = training_seconds(settings)
        done, start = progress.seconds, (1 - settings.decay) * end
    if start is None or end is None or not start < end < math.inf:
        return warmup
    return min(warmup, max((end - done) / (end - start), 0.0), 1.0)

"""The learning rate over a run: linear warmup, plateau and linear decay to 0, planned by steps or by the clock."""

from __future__ import annotations

from undiffuse.model.config import TrainConfig
from undiffuse.training.progress import Progress


def plan_lr_decay(progress: Progress, settings: TrainConfig) -> None:
    """Set ``decay_from`` and ``last_step`` of ``progress``, once.

    With ``max_steps`` at the first call; with ``minutes`` when the clock reaches the decay, from the speed so far.
    """
    length = settings.minutes if settings.max_steps is None else settings.max_steps
    if progress.last_step is not None and progress.length == length:
        return
    progress.decay_from, progress.last_step, progress.length = None, None, length
    if settings.max_steps is not None:
        progress.last_step = settings.max_steps
        progress.decay_from = round(settings.max_steps * (1 - settings.decay))
    elif settings.minutes is not None:
        budget = 60 * settings.minutes
        if progress.step > 0 and progress.seconds >= (1 - settings.decay) * budget:
            remaining = max(budget - progress.seconds, 0) * progress.step / progress.seconds
            progress.decay_from = progress.step
            progress.last_step = progress.step + max(round(remaining), 1)


def lr_factor(progress: Progress, settings: TrainConfig) -> float:
    """min(warmup, decay) in [0, 1], by which the next step's learning rate is multiplied.

    With k steps done, warmup is (k + 1)/``warmup`` and decay is (``last_step`` − k)/(``last_step`` − ``decay_from``).
    """
    warmup = min(1.0, (progress.step + 1) / settings.warmup) if settings.warmup else 1.0
    if progress.last_step is None or progress.decay_from is None or progress.last_step <= progress.decay_from:
        return warmup
    decay = (progress.last_step - progress.step) / (progress.last_step - progress.decay_from)
    return min(warmup, max(decay, 0.0), 1.0)

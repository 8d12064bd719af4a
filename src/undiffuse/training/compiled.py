"""Whether the network of a training is compiled where the recipe leaves it open: on a GPU, if steps become faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from undiffuse.model.config import TrainConfig

MIN_MINUTES, MIN_STEPS = 10.0, 2000
"""The shortest run, by the clock or in steps, that may win back the time of compiling, about a minute."""
REPEATS = 5
"""Gradients in each measured time; the first of each form is not measured."""


def is_tried(settings: TrainConfig, device: torch.device) -> bool:
    """Whether a run of ``settings`` on ``device`` compares both forms before its first step."""
    long = (settings.minutes or 0) >= MIN_MINUTES or (settings.max_steps or 0) >= MIN_STEPS
    return settings.compile is None and device.type == "cuda" and long


def choose(
    eager: Any,
    gradient: Callable[[Any], object],
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[bool, str]:
    """(whether the compiled form of ``eager`` computes gradients in less time, a line for the log about both).

    ``gradient(network)`` computes the gradient of a batch with a form of the network, ``synchronize()`` waits until it
    is done. A form that fails, for example without a compiler on the machine, is not chosen.
    """

    def seconds(network: Any, repeats: int) -> float:
        synchronize()
        began = clock()
        for _ in range(repeats):
            gradient(network)
        synchronize()
        return (clock() - began) / repeats

    seconds(eager, 1)
    plain = seconds(eager, REPEATS)
    try:
        form = torch.compile(eager)
        first = seconds(form, 1)
        compiled = seconds(form, REPEATS)
    except Exception as error:  # dynamo, inductor and triton raise errors of many classes, all of them without effect
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return False, f"note: the network is not compiled, because that failed: {reason[0][:200]}"
    measured = f"a gradient takes {1e3 * compiled:.3g} ms compiled ({first:.0f} s to compile), {1e3 * plain:.3g} ms not"
    return compiled < plain, f"note: the network is {'' if compiled < plain else 'not '}compiled: {measured}"

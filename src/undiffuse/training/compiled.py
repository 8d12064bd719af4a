"""The choice between a compiled and a plain network for a long run on a GPU whose recipe does not make it."""

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


def is_open(settings: TrainConfig, device: torch.device, processes: int) -> bool:
    """Whether a run of ``settings`` may take either form: one process on a GPU, and long enough."""
    long = (settings.minutes or 0) >= MIN_MINUTES or (settings.max_steps or 0) >= MIN_STEPS
    return settings.compile is None and device.type == "cuda" and processes == 1 and long


def compile_network(eager: Any, gradient: Callable[[Any], object]) -> tuple[Any, str]:
    """(the compiled form of ``eager``, "") after one gradient; (None, a line for the log) if that fails.

    It fails, for example, without a compiler on the machine. ``gradient(network)`` computes the gradient of a batch.
    """
    try:
        form = torch.compile(eager)
        gradient(form)
    except Exception as error:  # dynamo, inductor and triton raise errors of many classes, all of them without effect
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"note: the network is not compiled, because that failed: {reason[0][:200]}"
    return form, ""


def choose(
    eager: Any,
    gradient: Callable[[Any], object],
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Any, str]:
    """(the compiled form of ``eager`` if gradients take less time with it, else None; a line for the log).

    ``gradient(network)`` computes the gradient of a batch, ``synchronize()`` waits until it is done.
    """

    def seconds(network: Any) -> float:
        synchronize()
        began = clock()
        for _ in range(REPEATS):
            gradient(network)
        synchronize()
        return (clock() - began) / REPEATS

    gradient(eager)
    plain, began = seconds(eager), clock()
    form, failure = compile_network(eager, gradient)
    if failure:
        return None, failure
    synchronize()
    first, compiled = clock() - began, seconds(form)
    measured = f"a gradient takes {1e3 * compiled:.3g} ms compiled ({first:.0f} s to compile), {1e3 * plain:.3g} ms not"
    faster = compiled < plain
    return form if faster else None, f"note: the network is {'' if faster else 'not '}compiled: {measured}"

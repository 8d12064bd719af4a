"""The processes that a launcher began together, and how they tell each other things."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object

from undiffuse.train.parallel import meet


class Crew(NamedTuple):
    """This process's number ``rank`` of so many ``processes``, and its device.

    ``gather(said)`` is what each of them says, in order of rank; it waits until all have said it.
    """

    rank: int
    processes: int
    device: str
    gather: Callable[[Any], list[Any]]


def alone(device: str = "cpu") -> Crew:
    """A crew of one."""
    return Crew(0, 1, device, lambda said: [said])


def join(device: str) -> Crew:
    """The crew that torchrun or accelerate began this process in, with its share of the devices; else a crew of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return alone(device)
    meet(device)
    state = PartialState(cpu=device == "cpu")
    return Crew(state.process_index, state.num_processes, str(state.device), lambda said: gather_object([said]))

"""The processes that a launcher began together, and how they tell each other things."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes

from undiffuse.train.parallel import meet


class Crew(NamedTuple):
    """This process's number ``rank`` of so many ``processes``, and its device.

    ``gather(said)`` is what each of them says, plain data, in order of rank; it waits until all have said it.
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
    return Crew(state.process_index, state.num_processes, str(state.device), partial(_gather, str(state.device)))


def _gather(device: str, said: Any) -> list[Any]:
    """By JSON in tensors: launchers' own way to gather objects is by pickle."""
    text = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8, device=device)
    rows = gather(pad_across_processes(text, pad_index=ord(" "))[None])  # pyright: ignore
    return [json.loads(row.tobytes()) for row in rows.cpu().numpy()]  # pyright: ignore

"""The group of processes that a launcher (torchrun, accelerate) started together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes

from undiffuse.errors import ConfigError

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, for instance while the first one encodes the data into latents."""


class ProcessGroup(NamedTuple):
    """This process's ``rank`` among ``world_size`` processes, and its ``device``.

    ``gather(data)`` returns the plain data of all processes in order of rank; every process must call it.
    """

    rank: int
    world_size: int
    device: str
    gather: Callable[[Any], list[Any]]


def single_process(device: str = "cpu") -> ProcessGroup:
    """The group of one process."""
    return ProcessGroup(0, 1, device, lambda data: [data])


def init_process_group(device: str) -> ProcessGroup:
    """The group that a launcher started this process in, each process with its own device; else `single_process`."""
    if world_size() == 1:
        return single_process(device)
    init_gloo(device)
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    own = str(state.device)
    check_own_device(device, torch.device(own))
    return ProcessGroup(state.process_index, state.num_processes, own, partial(_gather_json, own))


def init_gloo(device: str) -> None:
    """Initialize gloo under a store prefix unique to this restart, so a restarted job does not wait for dead peers.

    Does nothing for one process, for a GPU, or where a group is initialized already.
    """
    if device == "cpu" and world_size() > 1 and not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=PATIENCE)


def host_group() -> dist.ProcessGroup:
    """A group of all processes for numbers on the host, so that no process waits for its GPU."""
    return _gloo_group(dist.group.WORLD)


@cache
def _gloo_group(world: object) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=PATIENCE)  # pyright: ignore


def check_own_device(device: str, own: torch.device) -> None:
    """Raises `ConfigError` unless ``own``, this process's device of several, is of the type that was asked for."""
    if device != own.type:
        cause = f"a launcher gives each of its {world_size()} processes a device of its own, here {str(own)!r}"
        raise ConfigError("DEVICE", f"device {device!r}", cause, f"Use {own.type!r}, or no launcher")


def world_size() -> int:
    """The number of processes that a launcher started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _gather_json(device: str, data: Any) -> list[Any]:
    """Gather plain data as JSON in tensors: torch's and accelerate's own gathering of objects uses pickle."""
    text = torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8, device=device)
    rows = gather(pad_across_processes(text, pad_index=ord(" "))[None])  # pyright: ignore
    return [json.loads(row.tobytes()) for row in rows.cpu().numpy()]  # pyright: ignore

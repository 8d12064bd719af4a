"""Past one process: what calls the network in training, and how its parts come together in a file.

Replicated (DDP), every process holds the whole network. Sharded (FSDP2), each holds its share of the weights, averages
and moments as a `DTensor`, and a checkpoint is the same file as ever: tensors are put together one at a time, and a run
goes on with any number of processes, sharded or not. torch's modules for shares take a second to import, so only who
needs them does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from undiffuse.config import TrainConfig
from undiffuse.networks.unet import Stage

if TYPE_CHECKING:
    from undiffuse.train.state import Progress


def meet(device: str) -> None:
    """Joins a launcher's processes on processors, in a place of the store that is this attempt's own.

    Processes that torchrun begins again would else find the addresses of those that died, and wait for them.
    """
    if device == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size)


def cut(network: nn.Module, settings: TrainConfig, processes: int, device: torch.device) -> nn.Module:
    """``network`` in shares, stage by stage, where there are several processes and ``settings.shard`` asks for it."""
    if processes > 1 and settings.shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # others are not cut
        mesh = init_device_mesh(device.type, (processes,))
        for part in [module for module in network.modules() if isinstance(module, Stage)]:
            fully_shard(part, mesh=mesh)
        fully_shard(network, mesh=mesh)
    return network


def recompute(network: nn.Module, settings: TrainConfig) -> nn.Module:
    """``network``, whose stages compute what is inside them again in the backward pass if ``settings`` say so."""
    for module in network.modules():
        if isinstance(module, Stage):
            module.recompute = settings.checkpointing
    return network


def prepare(accelerator: Accelerator, network: nn.Module, settings: TrainConfig) -> Any:
    """What training calls for ``network``, whose own names its weights keep: replicated, compiled, or itself."""
    sharded = any(map(in_shares, network.parameters()))
    called = network if sharded else accelerator.prepare_model(network)
    return torch.compile(called) if settings.compile else called


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """The norm of the gradients of all processes' shares together, which are scaled to at most ``most``."""
    return float(whole(nn.utils.clip_grad_norm_(parameters, most)))


def agree(accelerator: Accelerator, progress: Progress) -> None:
    """Makes the first process's clock and plan everybody's."""
    if accelerator.num_processes > 1:
        plan = [math.nan if step is None else step for step in (progress.decay_from, progress.last_step)]
        said = torch.tensor([progress.seconds, *plan], dtype=torch.float64, device=accelerator.device)
        progress.seconds, *plan = broadcast(said).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        progress.decay_from, progress.last_step = (None if math.isnan(step) else int(step) for step in plan)


def loudest(accelerator: Accelerator, asked: Sequence[int]) -> int:
    """The signal that any process was asked to stop by, the same in all of them; 0 if none was."""
    signal = asked[0] if asked else 0
    if accelerator.num_processes == 1:
        return signal
    signals = accelerator.gather(torch.tensor([signal], device=accelerator.device))
    return int(signals.max())  # pyright: ignore[reportAttributeAccessIssue]


def in_shares(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def own(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in place."""
    return tensor.to_local() if in_shares(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of one in shares every process has to ask at the same time."""
    return tensor.full_tensor() if in_shares(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """All of each tensor, on the processor if it was in shares; with ``keep`` false only the asking is done."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if in_shares(tensor) else full
    return found


def shared_like(full: Tensor, like: Tensor) -> Tensor:
    """``full``, which every process holds, in the shares that ``like`` is in."""
    if not in_shares(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(full.to(like.device), placed.device_mesh, placed.placements, src_data_rank=None)

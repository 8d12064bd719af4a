"""Several processes: replicate (DDP) or shard (FSDP2) the network, and bring its parts together for a checkpoint.

With DDP every process holds the whole network. With FSDP2 each holds a shard of the weights, averages and moments, as
`DTensor`. Checkpoints do not depend on either: tensors are gathered one at a time, and a run can be resumed with any
number of processes, sharded or not. torch's modules for sharding take a second to import, so imports are local.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from undiffuse.model.config import TrainConfig
from undiffuse.networks import protocol
from undiffuse.runtime.device import resolve_device
from undiffuse.runtime.distributed_group import PATIENCE, check_own_device, host_group, init_gloo, world_size
from undiffuse.training.progress import Progress


def start_accelerator(device: str | torch.device) -> Accelerator:
    """The launcher's processes, or this one alone, on ``device``, see `resolve_device`. Raises `ConfigError`."""
    place = resolve_device(device)
    init_gloo(place.type)
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # otherwise gradients are stored twice
    on_cpu = place.type == "cpu" and world_size() > 1
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=1, kwargs_handlers=[views, patience])
    accelerator.native_amp, accelerator.scaler = False, None  # the recipe has the precision, not the launcher
    accelerator.gradient_accumulation_steps = 1
    if accelerator.num_processes > 1:
        check_own_device(str(place), accelerator.device)
    else:
        # accelerate's own choice is the first GPU, for all runs of this process
        vars(accelerator.state)["device"] = place
    return accelerator


def shard_network(network: nn.Module, settings: TrainConfig, processes: int, device: torch.device) -> nn.Module:
    """``network``, sharded block by block if there are several processes and ``settings.shard`` is true."""
    if processes > 1 and settings.shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # FSDP2 needs it
        mesh = init_device_mesh(device.type, (processes,))
        for block in protocol.blocks(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    return network


def prepare_network(accelerator: Accelerator, network: nn.Module, settings: TrainConfig) -> Any:
    """The module to call in place of ``network``: wrapped by DDP, compiled, or itself. ``network`` keeps its names."""
    # the gradient of a categorical head's weight is a part of a larger one, which DDP copies
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    sharded = any(map(is_sharded, network.parameters()))
    wrapped = network if sharded else accelerator.prepare_model(network)
    return torch.compile(wrapped) if settings.compile else wrapped


def average_other_gradients(accelerator: Accelerator, model: Any) -> None:
    """Average over processes the gradients of the parameters that are outside ``model.network``, such as a schedule's.

    DDP and FSDP2 average those of the network.
    """
    if accelerator.num_processes == 1:
        return
    inside = set(model.network.parameters())
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in inside:
            mean = accelerator.reduce(parameter.grad.to(accelerator.device), "mean")
            parameter.grad.copy_(mean)  # type: ignore[arg-type]


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """The norm of the whole gradient, over all shards, before it is scaled to at most ``max_norm``; not read."""
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm))


def broadcast_progress(accelerator: Accelerator, progress: Progress) -> None:
    """Copy the clock and the plan of the first process to all others."""
    if accelerator.num_processes > 1:
        plan = [math.nan if step is None else step for step in (progress.decay_from, progress.last_step)]
        numbers = torch.tensor([progress.seconds, *plan], dtype=torch.float64)
        dist.broadcast(numbers, 0, host_group())
        progress.seconds, *plan = numbers.tolist()
        progress.decay_from, progress.last_step = (None if math.isnan(step) else int(step) for step in plan)


def reduce_signal(accelerator: Accelerator, received: Sequence[int]) -> int:
    """The number of a stop signal that any process has received, the same in all of them; 0 for none."""
    signal = torch.tensor(received[0] if received else 0)
    if accelerator.num_processes > 1:
        dist.all_reduce(signal, dist.ReduceOp.MAX, host_group())
    return int(signal)


def from_main_process(accelerator: Accelerator, decision: bool) -> bool:
    """The ``decision`` of the first process, which may depend on its clock, in all processes."""
    decided = torch.tensor(decision)
    if accelerator.num_processes > 1:
        dist.broadcast(decided, 0, host_group())
    return bool(decided)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a shard of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of ``tensor``, sharing memory with it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` gathered from its shards. All processes must call it at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_full(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Each of ``tensors`` gathered, sharded ones onto the CPU. With ``keep`` false take part but return nothing."""
    full_tensors = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            full_tensors[name] = full.cpu() if is_sharded(tensor) else full
    return full_tensors


def distribute_like(full: Tensor, like: Tensor) -> Tensor:
    """``full``, which every process holds, sharded as ``like`` is."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(full.to(like.device), placed.device_mesh, placed.placements, src_data_rank=None)

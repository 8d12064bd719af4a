"""A simulated GPU: tensors that say they are on another device, and hold their numbers on the CPU.

An operation that mixes them with tensors of the CPU raises, as on a GPU. Reads and copies that wait are counted.
The device is one of torch's that no longer has a backend, "lazy": neither torch nor the package treats it as special.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("lazy:0")
COPIES = {"aten::_to_copy", "aten::copy_"}
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
"""Operations whose result the host needs: it waits until the GPU has computed everything before."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
"""A tensor on a GPU may be indexed by one of the CPU, not the reverse."""


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts; `torch.utils._pytree` takes ten times as long."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [x for branch in tree for x in tensors_in(branch)]


def change_tensors(tree: Any, kind: type[Tensor], change: Callable[[Any], Tensor]) -> Any:
    """``tree`` with ``change(x)`` for each tensor x of this kind."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, dict):
        return {key: change_tensors(x, kind, change) for key, x in tree.items()}
    return type(tree)(change_tensors(x, kind, change) for x in tree) if isinstance(tree, (tuple, list)) else tree


class GpuTensor(Tensor):
    """A tensor on `GPU` whose numbers are those of ``host``, a tensor of the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> GpuTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=GPU,
            requires_grad=host.requires_grad,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"GpuTensor({self.host})"


class TensorFromData(TorchFunctionMode):
    """`torch.tensor` and ``new_tensor`` on `GPU`: torch makes a tensor without numbers and does not ask other modes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor and isinstance(args[0], GpuTensor):
            return torch.tensor(args[1], dtype=args[0].dtype).to(GPU)
        if function is torch.tensor and kwargs.get("device") == GPU:
            return torch.tensor(*args, **kwargs | {"device": None}).to(GPU)
        return function(*args, **kwargs)


class SimulatedGpu(TorchDispatchMode):
    """While it is on, tensors can be made on `GPU` and copied to it. ``counts`` is what `simulated_gpu` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = compute(function, args, kwargs or {})
        self.counts.update(what_happened(function._schema.name, args, kwargs or {}, result))
        return result


@contextmanager
def simulated_gpu() -> Iterator[Counter[str]]:
    """A block in which `GPU` can be used, and autocast has no effect on it. Returns the counts of `what_happened`."""
    autocast, mode, adam = torch.autocast, SimulatedGpu(), sys.modules["torch.optim.adam"]  # torch.optim hides it
    with pytest.MonkeyPatch.context() as patch, TensorFromData(), mode:
        patch.setattr(torch, "autocast", lambda kind, **to: nullcontext() if kind == GPU.type else autocast(kind, **to))
        patch.setattr(adam, "_device_dtype_check_for_fused", lambda *parameter, **settings: None)
        yield mode.counts


def what_happened(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> list[str]:
    """Of an operation: "operation" of the GPU, "copy" to it, "waiting copy" to it, "read" from it."""
    given, made = (any(isinstance(x, GpuTensor) for x in tensors_in(tree)) for tree in ((args, kwargs), result))
    if name == "aten::_to_copy" and made and not given:
        return ["copy"] if kwargs.get("non_blocking") else ["copy", "waiting copy"]
    if name in READS or (name == "aten::_to_copy" and not made):
        return ["operation", "read"] * given
    return ["operation"] * given


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation ``function`` on the CPU, whose result is on `GPU` if an argument is, or if it is to be there."""
    name = function._schema.name
    given = tensors_in((args, kwargs))
    on_gpu = [isinstance(x, GpuTensor) for x in given]
    if any(x.device == GPU and not gpu for x, gpu in zip(given, on_gpu, strict=True)):
        raise AssertionError(f"{name}: a tensor on the GPU without numbers, made while the simulation was off")
    if mixes_devices(name, args, given):
        shapes = [f"{tuple(x.shape)} on the {'GPU' if gpu else 'CPU'}" for x, gpu in zip(given, on_gpu, strict=True)]
        raise RuntimeError(f"{name}: tensors on two devices: {', '.join(shapes)}")
    device = kwargs.get("device")
    to_gpu = on_gpu[0] if name == "aten::copy_" else any(on_gpu) if device is None else torch.device(device) == GPU
    if device is not None and to_gpu:
        kwargs = kwargs | {"device": torch.device("cpu")}
    host_args, host_kwargs = change_tensors((args, kwargs), GpuTensor, lambda x: x.host)
    result = function(*host_args, **host_kwargs)
    if not to_gpu or result is None:
        return result
    if name == "aten::_to_copy" and not any(on_gpu):
        result = torch.clone(result)
    result = change_tensors(result, Tensor, GpuTensor)
    return return_and_correct_aliasing(function, args, kwargs, result) if any(on_gpu) else result


def mixes_devices(name: str, args: Any, given: list[Tensor]) -> bool:
    """Whether an operation gets tensors of both devices in a way that a GPU refuses."""
    if name.startswith("aten::_foreach"):  # a list of operations
        lists = [x for x in args if isinstance(x, (list, tuple))]
        return any(mixes_devices("", args, list(each)) for each in zip(*lists, strict=True))
    on_gpu = [isinstance(x, GpuTensor) for x in given]
    of_cpu = [x for x, gpu in zip(given, on_gpu, strict=True) if not gpu and x.ndim]  # single numbers may be mixed in
    return any(on_gpu) and bool(of_cpu) and name not in COPIES and not (name in INDEXING and on_gpu[0])

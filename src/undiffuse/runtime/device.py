"""The device to compute on, from its name. torch is imported inside, so that help texts start without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
CPU_BATCH, MAX_GPU_BATCH, GPU_BATCH_VALUES = 64, 1024, 2**20
"""Samples that are drawn at once by default: `CPU_BATCH` on a CPU. On a GPU there are more, up to `MAX_GPU_BATCH`, if
they have at most `GPU_BATCH_VALUES` values. Free memory has no influence, because rounding depends on the batch."""


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device called ``device``, after a test that this machine has it and that it computes in float64.

    ``auto`` is the accelerator that torch finds (a GPU) if it computes in float64, else the CPU; other names are
    torch's: ``cpu``, ``cuda``, ``cuda:1``, ``xpu``. Likelihoods are summed in float64, which Apple's ``mps`` does not
    have: it is refused. Raises `ConfigError`.

    From then on convolutions in float32 are not in TF32, and the current GPU is that of this process of a launcher.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    if "LOCAL_RANK" in os.environ and not str(device).startswith("cpu") and torch.cuda.is_available():
        # else every process opens a context on the first GPU; processes get GPUs as from accelerate
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and _problem(found) is None else torch.device("cpu")
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError):
        raise _refusal(device, "torch has no such device") from None
    if problem := _problem(named):
        raise _refusal(device, problem)
    return torch.device("cpu") if named.type == "cpu" else named


def to_device(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` in ``dtype`` on ``device``. The host does not wait for a copy from the CPU to a GPU.

    ``x`` is converted, then copied. The copy to a GPU is asynchronous, from pinned memory, which torch keeps until the
    copy is done; the GPU makes it after the work that was queued before.
    """
    x = x if dtype is None else x.to(dtype)
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def default_batch(dims: int, device: torch.device) -> int:
    """How many samples of ``dims`` values are drawn at once by default, a power of two."""
    if device.type == "cpu":
        return CPU_BATCH
    return max(CPU_BATCH, min(MAX_GPU_BATCH, 2 ** ((GPU_BATCH_VALUES // dims).bit_length() - 1)))


def halve_while_out_of_memory(draw: Callable[..., T], batch: int, log: Callable[[str], None]) -> tuple[T, int]:
    """(draw(batch=b), b) for the first b of ``batch``, ⌊batch/2⌋, … for which the memory of the GPU is large enough.

    ``log`` gets a line if that is not ``batch``. Raises torch's OutOfMemoryError if 1 is too many.
    """
    import torch

    size = batch
    while True:
        try:
            found = draw(batch=size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            if size < batch:
                log(f"the GPU has too little memory for batches of {batch:,}: {size:,} from here on")
            return found, size
        size //= 2  # outside of the handler, whose exception holds the tensors of the failed batch
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextmanager
def kept_random_state() -> Iterator[None]:
    """A block after which the global generators of the CPU and, where they are in use, of GPUs are as before."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(list(gpus)):
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """A block in which new tensors of floats are float32, whatever the program has set."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _problem(device: torch.device) -> str | None:
    """Why this device cannot be used; None if it can."""
    import torch

    if device.type == "meta":
        return "it holds no data"
    try:
        (torch.zeros(1, device=device) + 1).cpu()
    except (RuntimeError, AssertionError, ImportError):  # not compiled in, no driver, or no such number
        return "torch finds no such device on this machine"
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add(1).cpu()
    except (RuntimeError, TypeError):
        return "it does not compute in float64, in which likelihoods are summed"
    return None


def _refusal(device: object, cause: str) -> ConfigError:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if found is None else torch.accelerator.device_count()
    names = [] if found is None else [found.type, *(f"{found.type}:{i}" for i in range(count))]
    return ConfigError("DEVICE", f"device {str(device)!r}", cause, f"Use {' or '.join(['auto', 'cpu', *names])}")

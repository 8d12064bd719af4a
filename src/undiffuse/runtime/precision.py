"""The number format of the matrix products of a network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from undiffuse.errors import ConfigError

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_precision(precision: str, device: torch.device, dims: int = 2) -> str:
    """``precision``, where ``auto`` is bfloat16 if ``device`` multiplies matrices in it natively, else float32.

    It is float32 for items of three dimensions on the CPU: there the gradient of a bfloat16 convolution can be NaN for
    finite inputs (docs/log.md, 2026-11-28). Raises `ConfigError` for another name.
    """
    if precision not in PRECISIONS:
        raise ConfigError("PRECISION", precision, "there is no such precision", f"Use {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and dims != 3 and cpu_multiplies_bfloat16() else "float32"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype of matrix products in the network, None if it is that of the weights."""
    return torch.bfloat16 if precision == "bfloat16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """A block with matrix products in ``dtype``; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16 matrices."""
    queries = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
    return any(query() for query in queries if query)

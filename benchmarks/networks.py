"""What the networks cost on this machine, alternatives side by side: ``python benchmarks/networks.py``.

On one thread, in processor seconds, which other people's load distorts least; each table's rows are run in turn,
several rounds over. Printed are the median and the range. What was seen is in docs/networks-notes.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.networks import build
from undiffuse.networks.attention import attend
from undiffuse.networks.presets import PRESETS

BATCH, ROUNDS = 64, 3
BF16, FP32 = torch.bfloat16, torch.float32


def compare(title: str, rows: dict[str, Callable[[], object]], items: int | None = None) -> None:
    """Prints processor milliseconds, or ``items`` a processor second, of every row: median and range."""
    for run in rows.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, run in rows.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    print(f"\n{title} ({'items/s' if items else 'ms'}, load {os.getloadavg()[0]:.1f})")
    for name, seconds in taken.items():
        values = sorted(items / s if items else 1e3 * s for s in seconds)
        print(f"  {name:44} {median(values):8.1f}  [{values[0]:.1f}, {values[-1]:.1f}]", flush=True)


def training(name: str, shape: tuple[int, ...], dtype=BF16, last=False, **changed) -> Callable[[], object]:
    """One step of forward, backward and AdamW."""
    kind, settings = PRESETS[name]
    network = build(kind, channels=shape[0], **{**settings, **changed})
    x, times = torch.randn(BATCH, *shape), torch.rand(BATCH)
    if last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            y = network(x, times)
        F.mse_loss(y, x).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def both_ways(function: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward."""

    def run() -> object:
        y = function(*inputs)
        return torch.autograd.grad(y, inputs, y.detach())

    return run


def by_kernel(backend: SDPBackend) -> Callable:
    def function(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return function


def by_hand(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def folded(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Group norm from channels' first two moments, as one scale and shift a channel."""
    flat = x.flatten(2).mT
    first, second = flat.mean(1, dtype=FP32), (flat * flat).mean(1, dtype=FP32)
    first, second = (m.unflatten(1, (groups, -1)).mean(2, keepdim=True) for m in (first, second))
    scale = (second - first * first + 1e-6).rsqrt()
    scale, shift = (
        s.expand(-1, -1, x.shape[1] // groups).flatten(1)[..., None, None].to(x.dtype) for s in (scale, -first * scale)
    )
    return torch.addcmul(shift, x, scale)


def main() -> None:
    torch.set_num_threads(1)
    for heads in (12, 3, 1):
        rows = {}
        for dtype in (BF16, FP32):
            qkv = [torch.randn(BATCH, heads, 49, 96 // heads, dtype=dtype).requires_grad_() for _ in range(3)]
            name = str(dtype).removeprefix("torch.")
            rows[f"fused, {name}"] = both_ways(by_kernel(SDPBackend.FLASH_ATTENTION), *qkv)
            rows[f"plain, {name}"] = both_ways(by_kernel(SDPBackend.MATH), *qkv)
            rows[f"by hand, {name}"] = both_ways(by_hand, *qkv)
            if dtype == BF16:
                rows["fused in float32 from bfloat16: attend()"] = both_ways(attend, *qkv)
        compare(f"attention, 7x7 positions, {heads} heads of {96 // heads}", rows)

    rows = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(BATCH, 64, 14, 14, dtype=BF16).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(64, 64, 3, 3, dtype=BF16).contiguous(memory_format=layout).requires_grad_()
        name = str(layout).removeprefix("torch.")
        rows[f"torch's group norm, {name}"] = both_ways(lambda x: F.group_norm(x, 16), x)
        rows[f"folded group norm, {name}"] = both_ways(lambda x: folded(x, 16), x)
        rows[f"convolution beside it, {name}"] = both_ways(lambda x, w: F.conv2d(x, w, padding=1), x, weight)
        rows[f"SiLU beside it, {name}"] = both_ways(F.silu, x)
    compare("group norm, bfloat16, 64 channels at 14x14, forward and backward", rows)

    grey = (1, 28, 28)
    variants = {
        "cpu-small as it is": training("cpu-small", grey),
        "in float32": training("cpu-small", grey, FP32),
        "in channels-last": training("cpu-small", grey, last=True),
        "12 heads of 8": training("cpu-small", grey, heads=12),
        "attention throughout level 1": training("cpu-small", grey, attention=(1,)),
        "learned resampling": training("cpu-small", grey, learned_resampling=True),
        "widths 64, 128": training("cpu-small", grey, widths=(64, 128), heads=4),
        "scale and shift": training("cpu-small", grey, scale_shift=True),
    }
    compare("training step, 28x28 grey, bfloat16", variants, BATCH)
    compare("training step, cpu-small, 32x32 colour", {"cpu-small": training("cpu-small", (3, 32, 32))}, BATCH)
    digits = {
        "digits as it is": training("digits", (1, 8, 8)),
        "in float32": training("digits", (1, 8, 8), FP32),
        "without Fourier features": training("digits", (1, 8, 8), fourier=()),
        "widths 64, 64": training("digits", (1, 8, 8), widths=(64, 64)),
    }
    compare("training step, 8x8 grey", digits, BATCH)
    rest = {
        "vector, 16 features": training("vector", (16,)),
        "series, 1 x 128": training("series", (1, 128)),
        "volume, 1 x 16x16x16": training("volume", (1, 16, 16, 16)),
    }
    compare("training step, other presets", rest, BATCH)


if __name__ == "__main__":
    main()

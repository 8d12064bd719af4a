"""The cost of the networks on this machine, compared with alternatives: ``python benchmarks/networks.py``.

On one thread, in processor seconds, which depend least on other processes; the rows of a table are run in turn, for
several rounds. Printed are the median and the range. Results are discussed in docs/networks-notes.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.model.presets import PRESETS
from undiffuse.networks.attention import attend
from undiffuse.networks.registry import build

BATCH, ROUNDS = 64, 3
BF16, FP32 = torch.bfloat16, torch.float32


def compare(title: str, rows: dict[str, Callable[[], object]], items: int | None = None) -> None:
    """Print processor milliseconds, or ``items`` per processor second, of every row: median and range."""
    for run in rows.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, run in rows.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    print(f"\n{title} ({'items/s' if items else 'ms'}, load {os.getloadavg()[0]:.1f})")
    for name, seconds in times.items():
        values = sorted(items / s if items else 1e3 * s for s in seconds)
        print(f"  {name:44} {median(values):8.1f}  [{values[0]:.1f}, {values[-1]:.1f}]", flush=True)


def training(name: str, shape: tuple[int, ...], dtype=BF16, channels_last=False, **changed) -> Callable[[], object]:
    """One step of forward, backward and AdamW."""
    network = build(**{**PRESETS[name].model.network, "channels": shape[0], **changed})
    x, times = torch.randn(BATCH, *shape), torch.rand(BATCH)
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            y = network(x, times)
        F.mse_loss(y, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_backward(function: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """One forward and backward pass."""

    def run() -> object:
        y = function(*inputs)
        return torch.autograd.grad(y, inputs, y.detach())

    return run


def with_kernel(backend: SDPBackend) -> Callable:
    def function(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return function


def plain_attention(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def folded_group_norm(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Group norm from the first two moments of each channel, as one scale and shift per channel."""
    flat = x.flatten(2).mT
    first, second = flat.mean(1, dtype=FP32), (flat * flat).mean(1, dtype=FP32)
    first, second = (m.unflatten(1, (groups, -1)).mean(2, keepdim=True) for m in (first, second))
    scale = (second - first * first + 1e-6).rsqrt()
    scale, shift = (
        s.expand(-1, -1, x.shape[1] // groups).flatten(1)[..., None, None].to(x.dtype) for s in (scale, -first * scale)
    )
    return torch.addcmul(shift, x, scale)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    for heads in (12, 3, 1):
        rows = {}
        for dtype in (BF16, FP32):
            qkv = [torch.randn(BATCH, heads, 49, 96 // heads, dtype=dtype).requires_grad_() for _ in range(3)]
            name = str(dtype).removeprefix("torch.")
            rows[f"fused, {name}"] = forward_backward(with_kernel(SDPBackend.FLASH_ATTENTION), *qkv)
            rows[f"math kernel, {name}"] = forward_backward(with_kernel(SDPBackend.MATH), *qkv)
            rows[f"matrix products, {name}"] = forward_backward(plain_attention, *qkv)
            if dtype == BF16:
                rows["attend(): bfloat16, fused in float32"] = forward_backward(attend, *qkv)
        compare(f"attention, 7x7 positions, {heads} heads of {96 // heads}", rows)

    rows = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(BATCH, 64, 14, 14, dtype=BF16).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(64, 64, 3, 3, dtype=BF16).contiguous(memory_format=layout).requires_grad_()
        name = str(layout).removeprefix("torch.")
        rows[f"torch's group norm, {name}"] = forward_backward(lambda x: F.group_norm(x, 16), x)
        rows[f"folded group norm, {name}"] = forward_backward(lambda x: folded_group_norm(x, 16), x)
        rows[f"convolution of the same size, {name}"] = forward_backward(
            lambda x, w: F.conv2d(x, w, padding=1), x, weight
        )
        rows[f"SiLU of the same size, {name}"] = forward_backward(F.silu, x)
    compare("group norm, bfloat16, 64 channels at 14x14, forward and backward", rows)

    gray = (1, 28, 28)
    variants = {
        "cpu-small": training("cpu-small", gray),
        "in float32": training("cpu-small", gray, FP32),
        "in channels-last": training("cpu-small", gray, channels_last=True),
        "12 heads of 8": training("cpu-small", gray, heads=12),
        "attention at depth 1": training("cpu-small", gray, attention=(1,)),
        "learned resampling": training("cpu-small", gray, learned_resampling=True),
        "widths 64, 128": training("cpu-small", gray, widths=(64, 128), heads=4),
        "scale and shift": training("cpu-small", gray, scale_shift=True),
    }
    compare("training step, 28x28 gray, bfloat16", variants, BATCH)
    compare("training step, cpu-small, 32x32 colour", {"cpu-small": training("cpu-small", (3, 32, 32))}, BATCH)
    digits = {
        "digits": training("digits", (1, 8, 8)),
        "in float32": training("digits", (1, 8, 8), FP32),
        "without Fourier features": training("digits", (1, 8, 8), fourier=()),
        "widths 64, 64": training("digits", (1, 8, 8), widths=(64, 64)),
    }
    compare("training step, 8x8 gray", digits, BATCH)
    rest = {
        "vector, 16 features": training("vector", (16,)),
        "series, 1 x 128": training("series", (1, 128)),
        "volume, 1 x 16x16x16": training("volume", (1, 16, 16, 16)),
    }
    compare("training step, other presets", rest, BATCH)


if __name__ == "__main__":
    main()

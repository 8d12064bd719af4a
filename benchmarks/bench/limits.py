"""Operations of a training step of the presets, and the fraction of this machine's rate that the step reaches.

torch's FlopCounterMode counts the operations of matrix products, convolutions and attention, two for a multiplication
with its addition, forward and backward. The machine's rates are those of a matrix product and of a convolution with its
gradients, and are measured in turn with the step, so that all rows are of the same minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import alternate, spread
from bench.record import Result, Table
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.model import presets
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.norm import to_fast_layout
from undiffuse.training.ema import PowerEMA
from undiffuse.training.optimizer import make_optimizer
from undiffuse.training.posthoc_ema import SNAPSHOT_LENGTHS

ROUNDS = 5
REPEATS = 4
"""Products or convolutions in one measured time."""
CASES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "digits": ((1, 8, 8), 17),
    "cpu-small": ((1, 28, 28), 256),
    "vector": ((16,), None),
    "series": ((1, 128), None),
    "volume": ((1, 16, 16, 16), None),
}
"""Presets with the shape of an item and the number of its values, None for real numbers."""
MATRIX = 1024
CONVOLUTION = {"batch": 64, "channels": 64, "side": 14}
"""Of the size of the preset cpu-small at its finest level."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], object]


def training_step(preset: str, shape: tuple[int, ...], num_values: int | None, dtype: torch.dtype) -> Step:
    """Loss, backward, the preset's optimizer and the two averages of the weights for one batch."""
    torch.manual_seed(0)
    recipe = presets.adapt_to_data(presets.get(preset), num_values)
    transform = IntegerLevels(num_values) if num_values else Identity()
    model = Diffusion(recipe.model, shape, transform)
    to_fast_layout(model.network)
    model.autocast = torch.bfloat16 if dtype == torch.bfloat16 else None
    settings = replace(recipe.train, precision="bfloat16" if model.autocast else "float32")
    optimizer = make_optimizer([{"params": list(model.parameters())}], model.network, settings)
    averages, batch = [PowerEMA(model, length) for length in SNAPSHOT_LENGTHS], recipe.train.batch
    values = torch.randint(num_values, (batch, *shape)) if num_values else torch.randn(batch, *shape)
    u, eps = torch.rand(batch, dtype=torch.float64), torch.randn(batch, *shape)

    def step() -> None:
        model.loss(values, u, eps).mean().backward()
        optimizer.step()
        for average in averages:
            average.update(model, 10)
        optimizer.zero_grad()

    return step


def operations(step: Step) -> int:
    """What FlopCounterMode counts in one ``step``."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def matrix_product(dtype: torch.dtype, side: int = MATRIX, device: torch.device | None = None) -> Step:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return lambda: a @ b


def convolution(dtype: torch.dtype) -> Step:
    """A 3×3 convolution with the gradients of its input and weight."""
    width, side = CONVOLUTION["channels"], CONVOLUTION["side"]
    x = torch.randn(CONVOLUTION["batch"], width, side, side, dtype=dtype).requires_grad_()
    weight = torch.randn(width, width, 3, 3, dtype=dtype).requires_grad_()

    def step() -> None:
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    return step


def repeated(work: Step) -> Step:
    def several() -> None:
        for _ in range(REPEATS):
            work()

    return several


def run(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads or 1)
    rounds = options.rounds or ROUNDS
    rows, raw = [], {}
    for name, dtype in DTYPES.items():
        machine = {"matrix product": matrix_product(dtype), "convolution": convolution(dtype)}
        for preset, (shape, num_values) in CASES.items():
            if name == "bfloat16" and len(shape) == 4:
                continue  # volumes are trained in float32 on a processor: see undiffuse.runtime.precision
            step = training_step(preset, shape, num_values, dtype)
            counts = {key: operations(work) for key, work in {**machine, "step": step}.items()}
            times = alternate({**{key: repeated(work) for key, work in machine.items()}, "step": step}, rounds)
            reached = {
                key: [counts[key] * (REPEATS if key in machine else 1) / s / 1e9 for s in seconds]
                for key, seconds in times.items()
            }
            raw[f"{preset}, {name}"] = {"operations": counts, "seconds": times}
            step_rate, matrix, conv = (spread(reached[key]) for key in ("step", "matrix product", "convolution"))
            share = {
                key: spread([a / b for a, b in zip(reached["step"], reached[key], strict=True)]) for key in machine
            }
            rows.append(
                {
                    "preset": preset,
                    "products in": name,
                    "GFLOP a step": f"{counts['step'] / 1e9:.2f}",
                    "ms": f"{1e3 * spread(times['step']).median:.1f}",
                    "GFLOP/s": f"{step_rate:.1f}",
                    "matrix product, GFLOP/s": f"{matrix:.0f}",
                    "convolution, GFLOP/s": f"{conv:.0f}",
                    "fraction of the matrix rate": f"{share['matrix product']:.2f}",
                    "of the convolution's": f"{share['convolution']:.2f}",
                }
            )
            print(f"  {preset}, {name}", file=sys.stderr, flush=True)
    sizes = "{batch}×{channels}×{side}×{side}, 3×3".format(**CONVOLUTION)
    title = (
        f"A training step of each preset with its own batch, processor time, {rounds} rounds, medians with quartiles. "
        f"Matrix product {MATRIX}×{MATRIX}; convolution {sizes}, with its gradients"
    )
    notes = [
        "Counted are matrix products, convolutions and attention; norms, activations and the optimizer take time too."
    ]
    return Result("Operations of a training step, and the rate that it reaches", [Table(title, rows)], raw, notes=notes)

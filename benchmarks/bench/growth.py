"""How times grow with size: the exponent b of seconds ≈ a·size^b, with R², for each kind of size."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.measure import alternate, power_law
from bench.record import Result, Table
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import IntegerLevels
from undiffuse.model import presets
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.norm import to_fast_layout
from undiffuse.sampling.sampler import Sampler

ROUNDS = 3
WIDTHS, BATCH, SIDE = (32, 48), 16, 16
"""Of the network that a row does not change: the preset cpu-small with these widths, on images of this side."""
FILES = 32
"""Side of the PNG files."""
Step = Callable[[], object]


class Row(NamedTuple):
    """``build(size)`` is what is timed at each of ``sizes``; ``expected`` is the exponent by the algorithm."""

    what: str
    sizes: tuple[int, ...]
    build: Callable[[int], Step]
    expected: str


def model_of(side: int = SIDE, **network: Any) -> Diffusion:
    torch.manual_seed(0)
    config = presets.adapt_to_data(presets.get("cpu-small"), 256).model
    settings = {**config.network, "widths": WIDTHS, "heads": 1, **network}
    model = Diffusion(ModelConfig(**{**vars(config), "network": settings}), (1, side, side), IntegerLevels(256))
    to_fast_layout(model.network)
    return model


def training(model: Diffusion, batch: int = BATCH) -> Step:
    """Loss, backward and AdamW of one batch, in float32."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    values = torch.randint(256, (batch, *model.item_shape))
    u, eps = torch.rand(batch, dtype=torch.float64), torch.randn(values.shape)

    def step() -> None:
        model.loss(values, u, eps).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_chain(length: int) -> Diffusion:
    """The network of Ho's process with a chain of ``length`` steps."""
    torch.manual_seed(0)
    base = presets.get("ddpm-cifar10").model
    network = {**presets.get("digits").model.network, "widths": (16, 16), "fourier": ()}
    config = ModelConfig(**{**vars(base), "network": network, "schedule": {"name": "linear", "T": length}})
    return Diffusion(ModelConfig(**{**vars(config), "chain_length": length}), (1, 8, 8), IntegerLevels(17))


def walk(length: int) -> Step:
    model = of_chain(length)
    return lambda: model.sample(4, sampler=Sampler("ancestral", length))


def samples(n: int) -> Step:
    model = model_of()
    return lambda: model.sample(n, sampler=Sampler("ddim", 4), batch=BATCH)


def files_in(folder: Path) -> Callable[[int], Step]:
    """Reading a folder of as many PNG files."""

    def build(n: int) -> Step:
        place = folder / str(n)
        place.mkdir()
        g = np.random.default_rng(0)
        for number in range(n):
            Image.fromarray(g.integers(0, 256, (FILES, FILES, 3), dtype=np.uint8)).save(place / f"{number:05d}.png")
        return lambda: np.asarray(load(str(place)).values[:])

    return build


def rows(folder: Path) -> list[Row]:
    return [
        Row("training step, by the batch", (8, 16, 32, 64), lambda n: training(model_of(), n), "1"),
        Row("training step, by the side of the image", (16, 24, 32, 48), lambda n: training(model_of(n), 8), "2"),
        Row(
            "training step, by the width",
            (32, 64, 96, 128),
            lambda n: training(model_of(widths=(n, n)), 8),
            "1 to 2",
        ),
        Row("training step, by the chain's length T", (125, 500, 1000, 2000), lambda n: training(of_chain(n)), "0"),
        Row("samples by the whole chain, by T", (32, 64, 128, 256), walk, "1"),
        Row("samples in four steps, by their number", (16, 32, 64, 128), samples, "1"),
        Row("reading PNG files, by their number", (200, 400, 800, 1600), files_in(folder), "1"),
    ]


def measure(row: Row, rounds: int) -> dict[int, list[float]]:
    """Seconds at each size."""
    steps: Mapping[int, Step] = {size: row.build(size) for size in row.sizes}
    return alternate(steps, rounds)


def run(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads or 1)
    rounds = options.rounds or ROUNDS
    lines, raw = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            seconds = measure(row, rounds)
            medians = [statistics.median(times) for times in seconds.values()]
            exponent, r2 = power_law(list(seconds), medians)
            each = [power_law(list(seconds), [times[k] for times in seconds.values()])[0] for k in range(rounds)]
            last = power_law(list(seconds)[-2:], medians[-2:])[0]
            raw[row.what] = {"exponent": exponent, "R2": r2, "seconds": {str(k): v for k, v in seconds.items()}}
            lines.append(
                {
                    "time of a": row.what,
                    "sizes": ", ".join(map(str, seconds)),
                    "ms": ", ".join(f"{1e3 * value:.3g}" for value in medians),
                    "exponent [of single rounds]": f"{exponent:.2f} [{min(each):.2f}, {max(each):.2f}]",
                    "R²": f"{r2:.3f}",
                    "of the last two sizes": f"{last:.2f}",
                    "of the algorithm": row.expected,
                }
            )
            print(f"  {row.what}", file=sys.stderr, flush=True)
    title = f"Slopes of log seconds over log size, processor time, medians of {rounds} rounds in turn, float32"
    notes = ["Where the expected exponent is 0, R² says nothing. Fixed costs make exponents of small sizes too low."]
    return Result("How times grow", [Table(title, lines)], raw, notes=notes)

"""Training on a GPU: the fraction of the card's rate, what stands between, diffusers' example, and a training.

    benchmarks/bench/run gpu                    # on the GPU that torch finds: half an hour, 20 minutes a training
    benchmarks/bench/run gpu --gpu rates loop   # some of it: rates, profile, loop, diffusers, training
    benchmarks/bench/run gpu --dry-run          # the same on a processor with tiny networks, in a minute

A training that was stopped goes on in the same folder (``--out``).

The network of CIFAR-10's size is that of the preset ``ddpm-cifar10``. Times are by the clock, after the device has
done its work, and the forms alternate. Counted operations are those of `limits`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from bench import same_network
from bench.limits import matrix_product, operations
from bench.measure import alternate, paired_ratio, spread
from bench.record import Result, Table
from undiffuse import fit, load, load_data, preset
from undiffuse.data.from_array import from_array
from undiffuse.data.transform import IntegerLevels
from undiffuse.evaluation.comparison import compare
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.norm import to_fast_layout
from undiffuse.training.run_folder import Run

BF16 = torch.bfloat16
ROUNDS = 9
PROFILED = 3
"""Steps in the profile."""
Step = Callable[[], object]


class Size(NamedTuple):
    """What is measured: ``matrix`` (side of the product), ``batch`` of 3 × ``side`` × ``side``, the network's changes.

    ``peer``: the network of diffusers' example of unconditional generation; ``steps`` of the whole loop; ``minutes``
    of training on ``data``, then ``n`` samples.
    """

    matrix: int
    batch: int
    side: int
    network: dict[str, Any]
    peer: same_network.Size
    steps: int
    minutes: float
    n: int
    data: str


WHOLE = Size(8192, 128, 32, {}, same_network.EXAMPLE, 300, 20.0, 10_000, "fashion-mnist")
DRY = Size(256, 8, 8, {"widths": (8, 8), "attention": ()}, same_network.TINY, 3, 0.05, 32, "digits")


def cifar10_model(size: Size, device: torch.device) -> Diffusion:
    """The untrained model of `ddpm-cifar10`, with the network's changes of ``size``."""
    torch.manual_seed(0)
    recipe = preset("ddpm-cifar10").model
    config = replace(recipe, network={**recipe.network, **size.network})
    model = Diffusion(config, (3, size.side, size.side), IntegerLevels(256)).to(device)
    to_fast_layout(model.network)
    return model


def waiting(step: Step, device: torch.device) -> Step:
    """``step``, after which the host waits for ``device``."""

    def wait() -> None:
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return wait


def steps_of(size: Size, device: torch.device) -> dict[str, Step]:
    """A training step in each form: in float32, in bfloat16, and compiled."""
    shape = (size.batch, 3, size.side, size.side)
    values = torch.randint(256, shape, dtype=torch.uint8).to(device)

    def step(autocast: torch.dtype | None, compiled: bool) -> Step:
        model = cifar10_model(size, device)
        network = torch.compile(model.network, backend=backend(device)) if compiled else None
        return waiting(same_network.our_training_step(model, values, autocast, network), device)

    return {"float32": step(None, False), "bfloat16": step(BF16, False), "bfloat16, compiled": step(BF16, True)}


def backend(device: torch.device) -> str:
    """That of torch.compile; on a processor the one that generates no code, which takes minutes."""
    return "eager" if device.type == "cpu" else "inductor"


def rates(size: Size, device: torch.device, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Images per second of each form, and the fraction of the rate of a matrix product in bfloat16."""
    steps = steps_of(size, device)
    product = matrix_product(BF16, size.matrix, device)
    per_step, per_product = operations(steps["bfloat16"]), 2 * size.matrix**3
    times = alternate({**steps, "product": waiting(product, device)}, rounds, 3, time.perf_counter)
    rows = []
    for name in steps:
        reached = [per_step / s for s in times[name]]
        share = spread([rate * s / per_product for rate, s in zip(reached, times["product"], strict=True)])
        rows.append(
            {
                "training step": name,
                "ms": f"{1e3 * spread(times[name]).median:.1f}",
                "images/s": f"{spread([size.batch / s for s in times[name]]):,.0f}",
                "TFLOP/s": f"{spread(reached).median / 1e12:.2f}",
                "fraction of the matrix product's rate": f"{share:.3f}",
            }
        )
    card = spread([per_product / s / 1e12 for s in times["product"]])
    title = (
        f"The network of `ddpm-cifar10`, batches of {size.batch}, {per_step / 1e9:,.0f} GFLOP a step; a product of "
        f"{size.matrix}×{size.matrix} in bfloat16 reaches {card:.1f} TFLOP/s"
    )
    return Table(title, rows), {"operations": per_step, "seconds": times}


def profile(size: Size, device: torch.device) -> tuple[Table, dict[str, Any]]:
    """The operations of a step in bfloat16 that take most of the device's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record_of

    step = steps_of(size, device)["bfloat16"]
    step()
    on_gpu = device.type != "cpu"
    with record_of(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as record:
        for _ in range(PROFILED):
            step()
    title = "Where the time of a step in bfloat16 goes: the twelve operations that take most"
    return Table(title, longest(record.key_averages(), on_gpu)), {}


def longest(events: Iterable[FunctionEventAvg], on_gpu: bool) -> list[dict[str, str]]:
    """Rows of the twelve ``events`` that take most, with their shares of the device's time.

    On a GPU these are kernels and copies. An operation of the processor has the device time of its kernels again, and
    so has an annotation; torch leaves both out of the total of its table.
    """
    of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    if on_gpu:
        events = (event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation)
    events = sorted(events, key=lambda event: -getattr(event, of))
    total = sum(getattr(event, of) for event in events) or 1
    return [
        {
            "operation": event.key[:60],
            "calls a step": f"{event.count / PROFILED:.0f}",
            "ms a step": f"{getattr(event, of) / 1e3 / PROFILED:.2f}",
            "share": f"{100 * getattr(event, of) / total:.1f} %",
        }
        for event in events[:12]
    ]


def loop(size: Size, device: torch.device, place: Path) -> tuple[Table, dict[str, Any]]:
    """The whole loop of `fit` on uint8 images: images per second, and reads for which the host waited.

    Of two lengths, so that their difference leaves out the setting up and the last evaluation.
    """
    short, long = (one_loop(size, device, place, steps) for steps in (size.steps, 2 * size.steps))
    waits = f"{(long[1] - short[1]) / size.steps:.3f} ({short[1]} in the shorter run)"
    row = {
        "steps": f"{size.steps:,} and {2 * size.steps:,}",
        "images/s": f"{size.steps * size.batch / (long[0] - short[0]):,.0f}",
        "waits of the host for each further step": waits if device.type == "cuda" else "not counted on a processor",
    }
    return Table("The whole loop in bfloat16, not compiled, with data on the host as uint8", [row]), {}


def one_loop(size: Size, device: torch.device, place: Path, steps: int) -> tuple[float, int]:
    """Seconds of a training of so many ``steps``, and the reads for which the host waited."""
    values = torch.randint(256, (16 * size.batch, 3, size.side, size.side), dtype=torch.uint8).numpy()
    data = from_array(values, num_values=256, layout="NCHW", name="random images")
    recipe = preset("ddpm-cifar10")
    config = replace(recipe, model=replace(recipe.model, network={**recipe.model.network, **size.network}))
    settings = {"minutes": None, "max_steps": steps, "batch": size.batch, "previews": 0, "snapshots": 0}
    config = replace(config, train=replace(config.train, **settings))
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory(dir=place) as folder:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            began = time.perf_counter()
            fit(config, data, Path(folder) / "run", device=str(device), quiet=True)
            seconds = time.perf_counter() - began
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return seconds, sum("called a synchronizing" in str(warning.message) for warning in caught)


def peer(size: Size, device: torch.device, rounds: int) -> tuple[Table, dict[str, Any]]:
    """The network of diffusers' example with mixed precision, in its loop and in ours, with the same weights."""
    found = same_network.of_diffusers(size.peer, device)
    # a dry run on a processor without bfloat16 products has float32 alone
    theirs, ours = found.training.get("bfloat16", found.training["float32"])
    forms = {"theirs": waiting(theirs, device), "ours": waiting(ours, device)}
    model = found.model
    network = torch.compile(model.network, backend=backend(device))
    values = same_network.random_values(size.peer).to(device)
    forms["ours, compiled"] = waiting(same_network.our_training_step(model, values, BF16, network), device)
    times = alternate(forms, rounds, 3, time.perf_counter)
    rows = [
        {
            "loop": name,
            "images/s": f"{spread([size.peer.batch / s for s in times[name]]):,.0f}",
            "theirs/this": f"{paired_ratio(times[name], times['theirs']):.2f}",
        }
        for name in forms
    ]
    sizes = f"{size.peer.channels}×{size.peer.side}×{size.peer.side}, batches of {size.peer.batch}"
    title = f"diffusers' example of unconditional generation, {sizes}, {found.parameters:,} parameters, bfloat16"
    return Table(title, rows), {"seconds": times}


def training(size: Size, device: torch.device, place: Path, folder: Path | None) -> tuple[Table, dict[str, Any]]:
    """`ddpm-cifar10`'s network trained on Fashion-MNIST (a dry run: digits), its bound, distances of its samples."""
    data = load_data(size.data, **({} if folder is None else {"folder": folder}))
    recipe = preset("ddpm-cifar10")
    network = {**recipe.model.network, **(size.network or {"widths": (128, 256, 256)})}  # 28 pixels halve twice
    config = replace(recipe, model=replace(recipe.model, network=network))
    config = replace(config, train=replace(config.train, max_steps=None, minutes=size.minutes, batch=size.batch))
    finished = (Run(place / "run").record or {}).get("finished", False)
    run = fit(config, data, place / "run", device=str(device), quiet=True)
    model = load(run, device=device)
    began = time.perf_counter()
    samples = model.sample(size.n, seed=0)
    seconds = time.perf_counter() - began
    found = compare(samples.numpy(), data, metrics=("frechet", "kernel", "precision", "recall"), items=size.n)
    held_out = torch.from_numpy(data.values[data.split().test][: min(size.n, 1000)])
    bits = model.nll(held_out, mc_samples=16).bits_per_dim(model.dims).double()
    metrics = found.summary()["metrics"]
    last = Run(run).read_metrics()[-1]
    row = {
        "minutes": f"{size.minutes:g}",
        "images seen": f"{last['step'] * config.train.batch:,}",
        "bits/dim, chain": f"≤ {float(bits.mean()):.3f} ± {float(bits.std() / len(bits) ** 0.5):.3f}",
        "Fréchet (floor)": f"{metrics['frechet']['value'][0]:.2f} ({metrics['frechet']['floor'][0]:.2f})",
        "kernel": f"{metrics['kernel']['value'][0]:.3f}",
        "precision, recall": f"{metrics['precision']['value'][0]:.2f}, {metrics['recall']['value'][0]:.2f}",
        "samples/s": f"{size.n / seconds:,.0f}",
    }
    title = f"The network of `ddpm-cifar10` on {data.name}, {size.n:,} samples by the default sampler"
    if finished:
        title += "; the training was finished before, perhaps at another commit"
    return Table(title, [row]), {}


def run(options: argparse.Namespace) -> Result:
    size = DRY if options.dry_run else WHOLE
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("No GPU is at hand. --dry-run does the same on the processor, with tiny networks")
    device = torch.device("cpu" if options.dry_run else "cuda")
    rounds = options.rounds or (2 if options.dry_run else ROUNDS)
    data = None if options.dry_run else options.data
    parts: dict[str, Callable[[Path], tuple[Table, dict[str, Any]]]] = {
        "rates": lambda place: rates(size, device, rounds),
        "profile": lambda place: profile(size, device),
        "loop": lambda place: loop(size, device, place),
        "diffusers": lambda place: peer(size, device, rounds),
        "training": lambda place: training(size, device, place, data),
    }
    tables, raw = [], {}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(temporary) if options.dry_run else options.out / "gpu"
        place.mkdir(parents=True, exist_ok=True)
        for name in options.gpu or parts:
            table, numbers = parts[name](place)
            tables.append(table)
            raw[name] = numbers or {"rows": list(table.rows)}
            print(f"  {name}", file=sys.stderr, flush=True)
    notes = ["A dry run: nothing here says anything about a GPU."] if options.dry_run else []
    return Result("Training on a GPU", tables, raw, notes=notes)

"""What `undiffuse evaluate` does: the bound of a model on data, as a table, a picture and JSON."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from undiffuse.data import Dataset
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, DataError
from undiffuse.likelihood import NLL
from undiffuse.report import pictures, table

BUDGET = 120.0
"""Seconds that an evaluation without ``--exact`` plans for: with loading and pictures it ends within five minutes."""


def evaluate_model(
    model: Diffusion,
    data: Dataset,
    place: Path,
    part: str | None = None,
    items: int | None = None,
    draws: int | None = None,
    exact: bool = False,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Prints, writes and returns the bound on −log p of the items of ``data``, in bits per dimension."""
    console = console or Console(highlight=False, soft_wrap=True)
    if data.item_shape != model.item_shape or data.levels != model.info.get("levels"):
        theirs, ours = _kind(data.item_shape, data.levels), _kind(model.item_shape, model.info.get("levels"))
        cause = f"its items are {theirs}, the model's {ours}"
        raise DataError("SHAPE", data.name, cause, "Evaluate on data of the kind that the model was trained on")
    chosen, name = choose_items(model, data, part)
    if len(chosen) == 0:
        fix = "Use --part all, or other data"
        raise DataError("EMPTY", data.name, f"no items in this part ({name})", fix)
    if items is not None:
        chosen = chosen[:items]
    values = torch.from_numpy(np.ascontiguousarray(data.values[chosen]))
    if not exact and draws is None:
        values, draws = affordable(model, values, items is not None)
    draws = None if exact or draws is None or draws >= model.steps else draws
    console.print(
        f"{len(values):,} items ({name}), {'all' if draws is None else f'{draws} of the'} {model.steps:,} steps each",
        markup=False,
    )

    began = time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(values))
        result = model.nll(values, seed, draws, batch=64, progress=lambda done: bar.advance(task, done))
    seconds = time.perf_counter() - began

    report = summary(model, result, seconds) | {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "part": name,
        "seed": seed,
    }
    place.mkdir(parents=True, exist_ok=True)
    (place / "evaluation.json").write_text(json.dumps(report, indent=1))
    bits = report["bits_per_dim"]
    rows = [
        {"bound, bits/dim": key, "mean ± standard error": tuple(bits[key])}
        for key in ("prior", "steps", "decoder", "total")
    ]
    table.render(rows, f"{data.name}, {name}")
    kind = "" if model.info.get("levels") else " (a density: it depends on the units of the data, and may be negative)"
    console.print(f"an upper bound on −log₂ p per dimension{kind}", markup=False)
    console.print(f"{report['items']:,} items, {report['calls']} network calls an item, {seconds:.0f} s", markup=False)
    try:
        figure = bits_picture(model, result)
        figure.savefig(place / "bits-per-step.png", dpi=150)
        console.print(f"picture: {place / 'bits-per-step.png'}", markup=False)
    except ConfigError as error:
        console.print(f"no picture: {error}", markup=False)
    console.print(f"all numbers: {place / 'evaluation.json'}", markup=False)
    return report


def choose_items(model: Diffusion, data: Dataset, part: str | None) -> tuple[np.ndarray, str]:
    """The items of a part and its name: by default the test part of the model's own data, all of any other."""
    own = data.fingerprint == model.info.get("fingerprint")
    part = part or ("test" if own else "all")
    if part == "all":
        return np.arange(len(data)), "all" if not own else "all, training data among them"
    if part not in ("test", "validation", "train"):
        raise ConfigError("PART", f"--part {part}", "no such part", "Use test, validation, train or all")
    split = data.split(float(model.info.get("held_out", 0.1)))
    name = {"test": "held out for testing", "validation": "held out for validation", "train": "trained on"}[part]
    return getattr(split, part), name if own else f"{part} part of data that the model was not trained on"


def affordable(model: Diffusion, values: torch.Tensor, all_items: bool) -> tuple[torch.Tensor, int]:
    """As many items and steps an item as fit into `BUDGET` on this machine, by a short measurement.

    At least 16 steps an item; items, in their order of content, are cut only where they were not asked for.
    """
    probe = values[:64]
    model.nll(probe, draws=2)
    began = time.perf_counter()
    model.nll(probe, draws=4)
    calls = max(BUDGET * 4 * len(probe) / (time.perf_counter() - began), 1.0)
    if not all_items and len(values) * 16 > calls:
        keep = max(int(calls / 16), 64)
        values = values[torch.linspace(0, len(values) - 1, min(keep, len(values))).long()]
    return values, max(16, min(model.steps, int(calls / len(values))))


def summary(model: Diffusion, result: NLL, seconds: float) -> dict[str, Any]:
    """The result as plain data: bits per dimension with standard errors, and what they cost."""
    scale = model.dims * math.log(2)

    def with_error(nats: torch.Tensor) -> list[float]:
        bits = nats / scale
        return [float(bits.mean()), float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan]

    parts = {key: with_error(getattr(result, key)) for key in ("prior", "steps", "decoder", "total")}
    return {
        "bits_per_dim": parts,
        "items": len(result.total),
        "calls": result.calls,
        "chain": model.steps,
        "seconds": round(seconds, 1),
    }


def bits_picture(model: Diffusion, result: NLL) -> Any:
    """A figure of each step's share of the bound against its log-SNR, steps that were not drawn filled in.

    Where some were not, the shares are scaled to add up to the bound's own estimate.
    """
    scale = model.dims * math.log(2)
    bits = (torch.nanmean(result.per_step, 0) / scale).numpy()
    log_snr = torch.stack([level.log_snr for level in model.levels[:-1]]).flip(0).numpy()
    if float(model.levels[-1].sigma) == 0:
        log_snr, bits = log_snr[1:], bits[1:]
    drawn = np.flatnonzero(np.isfinite(bits))
    if len(drawn) > 0 and bool(result.per_step.isnan().any()):
        bits = np.interp(np.arange(len(bits)), drawn, bits[drawn])
        bits *= float(result.steps.mean()) / scale / bits.sum()
    return pictures.bits_per_step(
        log_snr, bits, float(result.prior.mean()) / scale, float(result.decoder.mean()) / scale
    )


def _kind(shape: tuple[int, ...], levels: int | None) -> str:
    return f"{'×'.join(map(str, shape))} of {levels or 'continuous'} levels"

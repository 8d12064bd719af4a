"""What `undiffuse evaluate` found, as rows, sentences, plain data and a picture, in bits per dimension."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse import estimate
from undiffuse.codec import Pixels
from undiffuse.diffusion import Diffusion
from undiffuse.likelihood import NLL, finite_ends
from undiffuse.report import pictures, table

PARTS = ("prior", "steps", "decoder", "total")
GROUPS = 40
"""Parts of the range of log-SNR that the picture tells apart."""


def with_error(model: Diffusion, nats: Tensor) -> tuple[float, float]:
    """(mean, its standard error over the items) of ``nats`` (B,) in bits per dimension; NaN for one item."""
    bits = nats / (model.dims * math.log(2))
    return float(bits.mean()), float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan


def summary(model: Diffusion, result: NLL, seconds: float, draws: int | None) -> dict[str, Any]:
    """An estimate as plain data: its parts with their standard errors, and what they cost."""
    return {
        "bits_per_dim": {part: list(with_error(model, getattr(result, part))) for part in PARTS},
        "items": len(result.total),
        "calls": result.calls,
        "draws": draws,
        "seconds": round(seconds, 1),
    }


def row(model: Diffusion, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A `summary` as a row of the table; "≤" where its expectation is an upper bound."""
    shown = {part: tuple(found["bits_per_dim"][part]) for part in PARTS}
    total = f"{'≤ ' if is_bound(model, name, found['draws']) else '  '}{table.cell(shown['total'])}"
    costs = {"items": found["items"], "calls an item": found["calls"], "time": f"{found['seconds']:,.0f} s"}
    return {"estimate": title(model, name, found["draws"]), **shown, "total": total, **costs}


def title(model: Diffusion, name: str, draws: int | None) -> str:
    steps = f"{'all' if draws is None else f'{draws:,} of'} {model.steps:,} steps"
    return {
        "discrete": f"bound of the chain, {steps}",
        "continuous": f"continuous bound, {draws} points",
        "ode": "probability flow" + (f", {draws} draws" if draws and draws > 1 else ""),
        "openai": "as improved-diffusion's script",
    }[name]


def is_bound(model: Diffusion, name: str, draws: int | None) -> bool:
    """Whether an estimate is, in expectation, no less than −log p of the model that it speaks of.

    The flow's is for data with levels, unless several draws are weighed whose divergence is estimated: the mean of
    exp(noise) is above 1. The script's is not: a clamp makes values likelier than they are.
    """
    if name != "ode":
        return name != "openai"
    return isinstance(model.codec, Pixels) and (draws == 1 or model.dims <= estimate.EXACT_TRACE)


def remarks(model: Diffusion, names: Iterable[str], iw: int) -> list[str]:
    """What the numbers are, a sentence a line."""
    lines = []
    levels, exact = isinstance(model.codec, Pixels), model.dims <= estimate.EXACT_TRACE
    if any(is_bound(model, name, iw) for name in names):
        lines.append("≤: an upper bound on −log₂ p per dimension, in expectation")
    if not levels:
        lines.append("a density: it depends on the units of the data, and may be negative")
    if "ode" in names:
        trace = "its divergence is exact" if exact else "its divergence is estimated by random signs, without bias"
        if levels and is_bound(model, "ode", iw):
            what = f"a bound, since levels are dequantised; {trace}"
        elif levels:
            what = f"no bound: {iw} draws whose divergence is estimated weigh too much together"
        elif exact:
            what = f"exact, to the integrator's tolerance {estimate.CLOSE.rtol:g}"
        else:
            what = f"no bound, but likelihood itself up to noise: {trace}"
        lines.append(f"probability flow: {what}")
        lines.append("were the denoiser exact, its prior would cost it on average at most the bounds' prior term")
    return lines


def differences(model: Diffusion, found: Mapping[str, NLL]) -> dict[str, dict[str, list[float]]]:
    """Each estimate less the chain's bound in bits per dimension, item by item over the items of both; by parts."""
    if "discrete" not in found:
        return {}
    ours, apart = found["discrete"], {}
    for name, other in found.items():
        n = min(len(other.total), len(ours.total))
        if name != "discrete":
            apart[name] = {p: list(with_error(model, getattr(other, p)[:n] - getattr(ours, p)[:n])) for p in PARTS}
    return apart


def compared(apart: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """`differences` in words."""
    names = {"continuous": "continuous bound", "ode": "probability flow"}
    said = [f"{names[name]} {table.cell(tuple(parts['total']))}" for name, parts in apart.items() if name in names]
    lines = [f"less the bound of the chain, item by item: {', '.join(said)}"] if said else []
    if "openai" in apart:
        total, decoder = (table.cell(tuple(apart["openai"][part])) for part in ("total", "decoder"))
        lines.append(
            f"improved-diffusion's script is off by {total} bits/dim over the same steps and noise, {decoder} of it in "
            "the decoder: it has a tanh for the normal distribution function, lifts a bin's probability to 1e-12, "
            "computes in float32, and clips x̂ to [−1, 1]"
        )
    return lines


def write_items(path: Path, model: Diffusion, chosen: np.ndarray, found: Mapping[str, NLL]) -> None:
    """A CSV file: an item's index in the data set, then its bits per dimension by each estimate, blank if not measured.

    ``chosen`` are the indices of the items in the order in which they were measured.
    """
    columns = {name: result.bits_per_dim(model.dims).tolist() for name, result in found.items()}
    most = max(map(len, columns.values()))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *columns])
        for i in np.argsort(chosen[:most]):
            writer.writerow([int(chosen[i]), *(bits[i] if i < len(bits) else "" for bits in columns.values())])


def bits_picture(model: Diffusion, found: Mapping[str, NLL]) -> Any:
    """A figure of what each stretch of log-SNR adds to the bounds among ``found``."""
    curves, totals = {}, []
    for name, shares in (("discrete", _chain), ("continuous", _points)):
        if name in found:
            result = found[name]
            prior, steps, decoder, total = (with_error(model, getattr(result, part))[0] for part in PARTS)
            label = (
                f"{'chain' if name == 'discrete' else 'continuous'}: {total:.3f} = prior {prior:.2g} "
                f"+ steps {steps:.3f} + decoder {decoder:.3f}"
            )
            curves[label] = _grouped(*shares(model, result))
            totals.append(total)
    return pictures.bits_per_step(curves, f"at most {totals[0]:.3f} bits per dimension")


def _chain(model: Diffusion, result: NLL) -> tuple[np.ndarray, np.ndarray]:
    """The log-SNR between which the steps lie (N + 1,), from data to noise, and the bits per dimension of each (N,).

    Steps that no item drew are filled in, and then all are scaled to add up to the bound's own estimate. The decoder
    is not among them, nor a step from noise without signal.
    """
    log_snr = torch.stack([level.log_snr for level in reversed(model.levels)]).numpy()
    bits = torch.nanmean(result.per_step, 0).numpy()
    if np.isinf(log_snr[0]):
        log_snr, bits = log_snr[1:], bits[1:]
    drawn = np.flatnonzero(np.isfinite(bits))
    if len(drawn) and bool(result.per_step.isnan().any()):
        bits = np.interp(np.arange(len(bits)), drawn, bits[drawn])
        bits *= float(result.steps.mean()) / bits.sum()
    finite = np.isfinite(log_snr)
    return log_snr[finite], bits[: finite.sum() - 1] / (model.dims * math.log(2))


def _points(model: Diffusion, result: NLL) -> tuple[np.ndarray, np.ndarray]:
    """The same of the continuous bound, whose points are spread evenly over log-SNR."""
    top, clean = (float(level.log_snr) for level in finite_ends(model.schedule))
    bits = result.per_step.mean(0).numpy() / (model.dims * math.log(2))
    return np.linspace(clean, top, len(bits) + 1), bits


def _grouped(edges: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours added up until each is wide enough to be seen, from falling ``edges`` to rising."""
    group = np.floor(GROUPS * (edges[0] - edges) / (edges[0] - edges[-1]) + 1e-9)
    starts = np.flatnonzero(np.diff(group, prepend=-1.0))
    starts = starts[starts < len(bits)]
    return np.append(edges[starts], edges[-1])[::-1], np.add.reduceat(bits, starts)[::-1]

"""What `undiffuse evaluate` does: bounds and likelihood of a model on data, as a table, a picture, JSON and CSV."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from undiffuse import __version__, checkpoint
from undiffuse.cli import partial, results
from undiffuse.cli.crew import Crew, alone
from undiffuse.cli.measure import measure
from undiffuse.data import Dataset
from undiffuse.diffusion import Diffusion, describe
from undiffuse.errors import ConfigError, DataError
from undiffuse.report import table

SHARES = {"discrete": 5, "openai": 5, "continuous": 4, "ode": 4}
"""The order of the estimates, and how the time that is not planned otherwise is divided among them."""
OWN = ("discrete", "continuous", "ode")
MEASURING = 0.85
"""The part of ``--minutes`` that is planned for: loading, a first look at the speed and pictures take the rest."""
LEAST = 16
"""Items of the flow and of a whole chain, and steps or points an item of the bounds, whatever they cost."""
MOST_POINTS = 256
GUESS = 400
"""Network calls that take as long as an item of the flow, with its divergence, until the first are measured."""


def evaluate_model(
    model: Diffusion,
    data: Dataset,
    place: Path,
    part: str | None = None,
    estimates: Sequence[str] = (),
    items: int | None = None,
    draws: int | None = None,
    exact: bool = False,
    iw: int = 1,
    seed: int = 0,
    compat: str | None = None,
    minutes: float = 5.0,
    console: Console | None = None,
    untold: bool = False,
    crew: Crew | None = None,
) -> dict[str, Any]:
    """Prints, writes and returns the estimates of −log p of the items of ``data``, in bits per dimension.

    A conditional model is told all that the data tell of an item, unless ``untold`` or they tell other things: then
    nothing, and the numbers are those of p(x) by itself. The processes of a ``crew`` call this together: they share
    the batches out, and all but the first say nothing and return {}.
    Finished batches are kept in ``place``/evaluation.partial until all is done. Item i of the list that
    `spread_out` makes of the part has noise that is a function of (seed, i) alone.
    """
    crew = crew or alone()
    console = Console(quiet=True) if crew.rank else console or Console(highlight=False, soft_wrap=True)
    say: partial.Say = lambda line: console.print(line, markup=False)  # noqa: E731
    names = _checked(model, data, estimates, iw, compat, minutes)
    chosen, name = choose_items(model, data, part)
    if len(chosen) == 0:
        cause, fix = f"no items in this part ({name})", "Use --part all, or other data"
        if model.info.get("held_out") == 0 and data.fingerprint == model.info.get("fingerprint"):
            cause, fix = "nothing was held out when the model was trained", "Use --part train, or other data"
        raise DataError("EMPTY", data.name, cause, fix)
    chosen = chosen[spread_out(len(chosen))][:items]
    values = torch.from_numpy(np.ascontiguousarray(data.values[chosen]))
    given, remark = ("nothing", None) if untold else known(model, data)
    cond = None if given == "nothing" else data.condition(chosen)

    text = json.dumps(describe(model), sort_keys=True)
    told = {"undiffuse": str(checkpoint.FORMAT), "model": text}
    weights = checkpoint.digest({key: w.cpu() for key, w in checkpoint.weights(model).items()}, told)
    about = {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "part": name,
        "given": given,
        "seed": seed,
        "digest": weights,
        "chain": model.steps,
        "version": __version__,
    }
    asked = about | {
        "estimates": names, "items": items, "draws": draws, "exact": exact, "iw": iw, "minutes": minutes
    }  # fmt: skip
    folder = place / "evaluation.partial"

    def choose() -> partial.Plan:
        return affordable(model, values, names, items, draws, exact, iw, minutes * crew.processes)

    plan, key = crew.gather(None if crew.rank else partial.begin(folder, asked, choose, say))[0]
    found = measure(model, values, plan, seed, folder, key, console, crew, bool(estimates), cond)
    if crew.rank:
        return {}
    nll = {n: result for n, (result, _) in found.items()}
    report = about | {"estimates": {n: results.summary(model, *found[n], plan[n]["draws"]) for n in found}}
    report["minus_discrete"] = apart = results.differences(model, nll)
    rows = [results.row(model, n, said) for n, said in report["estimates"].items()]
    told = "" if given == "nothing" else f", given {given}"
    table.render(rows, f"{data.name}, {name}: bits per dimension{told} ± standard error")
    lines = [*([remark] if remark else []), *results.remarks(model, nll, iw), *results.compared(apart)]
    (place / "evaluation.json").write_text(json.dumps(report, indent=1))
    results.write_items(place / "evaluation-items.csv", model, chosen, nll)
    if "discrete" in nll or "continuous" in nll:
        try:
            results.bits_picture(model, nll).savefig(place / "bits-per-step.png", dpi=150)
            lines.append(f"picture: {place / 'bits-per-step.png'}")
        except ConfigError as error:
            lines.append(f"no picture: {error}")
    lines.append(f"all numbers: {place / 'evaluation.json'}, item by item: {place / 'evaluation-items.csv'}")
    for line in lines:
        say(line)
    partial.remove(folder)
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


def known(model: Diffusion, data: Dataset) -> tuple[str, str | None]:
    """What ``model`` is told of the items of ``data``, in words, and why it is told nothing though it could hear."""
    hears = {name: size for name in ("classes", "vector", "tokens") if (size := model.config.network.get(name, 0))}
    if not hears:
        return "nothing", None
    words = " and ".join({"classes": "labels", "vector": "vectors", "tokens": "tokens"}[name] for name in hears)
    if data.hearing == hears and list(data.classes) == list(model.info.get("classes", [])):
        return words, None
    return "nothing", f"the model hears {words}, and these data have not the same: it is told nothing"


def spread_out(n: int) -> np.ndarray:
    """0 to n − 1 by their mirrored binary digits: the first k are spread evenly over all, for every k."""
    bits = max(n - 1, 1).bit_length()
    mirrored = np.zeros(1 << bits, np.int64)
    for bit in range(bits):
        mirrored |= (np.arange(1 << bits) >> bit & 1) << (bits - 1 - bit)
    return mirrored[mirrored < n]


def affordable(
    model: Diffusion,
    values: torch.Tensor,
    names: Sequence[str],
    items: int | None,
    draws: int | None,
    exact: bool,
    iw: int,
    minutes: float,
) -> partial.Plan:
    """What to measure of each estimate: ``items``, ``draws`` (None: every step), ``batch``, and ``expected`` seconds.

    What was not asked for is chosen so that all fits into ``minutes`` of one process on this machine, by a short
    measurement. Where ``fit`` is true the items are only an upper limit: the batches show how many fit into the
    seconds expected.
    """
    rate = speed(model, values[:64])
    total = MEASURING * 60 * minutes
    seconds = {n: total * SHARES[n] / sum(SHARES[n] for n in names) for n in names}
    if len(names) > 1 and "ode" in names:  # its first items may take longer than its share
        flow = min(total / 2, max(seconds["ode"], LEAST * GUESS * iw / rate))
        seconds = {n: s * (total - flow) / (total - seconds["ode"]) for n, s in seconds.items()} | {"ode": flow}
    calls = {n: max(1, int(rate * s)) for n, s in seconds.items()}
    whole = items is not None or exact
    bounds = [n for n in names if n == "continuous" or (n == "discrete" and "openai" not in names)]

    n_bounds = len(values)
    if bounds and not whole and draws is None:
        n_bounds = min(n_bounds, max(64, min(calls[n] for n in bounds) // LEAST))
    n_chain = len(values)
    if "openai" in names and not whole:
        n_chain = min(n_chain, max(LEAST, min(calls["discrete"], calls["openai"]) // model.steps))

    plan: partial.Plan = {}
    for name in names:
        n, each, fit = n_bounds, None, False
        if name == "ode":
            n, each, fit = len(values), iw, not whole
        elif name not in bounds:
            n = n_chain
        elif exact:
            each = None if name == "discrete" else model.steps
        else:
            most = model.steps if name == "discrete" else MOST_POINTS
            each, fit = draws or max(LEAST, min(most, calls[name] // n)), not whole and draws is None
        if name == "discrete" and each is not None and each >= model.steps:
            each = None
        cost = n * (GUESS * iw if name == "ode" else each or model.steps) / rate
        batch = batch_size(model, name == "ode" or (each or model.steps) > 128)
        expected = seconds[name] if fit else cost
        plan[name] = {"items": n, "draws": each, "batch": batch, "expected": expected, "fit": fit}
    return plan


def speed(model: Diffusion, values: torch.Tensor) -> float:
    """Network calls of single items a second."""
    model.nll(values, draws=2)
    began = time.perf_counter()
    calls = model.nll(values, draws=4).calls
    return calls * len(values) / (time.perf_counter() - began)


def batch_size(model: Diffusion, long: bool) -> int:
    """Items at a time: few where each takes long, so that little is lost when stopped. No clock has a say in it."""
    return (16 if long else 64) * (16 if model.dims <= 256 or model.device.type == "cuda" else 1)


def _checked(
    model: Diffusion, data: Dataset, estimates: Sequence[str], iw: int, compat: str | None, minutes: float
) -> list[str]:
    """The names of the estimates, in order. Raises `DataError` and `ConfigError` before anything is measured."""
    if data.item_shape != model.item_shape or data.levels != model.info.get("levels"):
        theirs, ours = _kind(data.item_shape, data.levels), _kind(model.item_shape, model.info.get("levels"))
        cause = f"its items are {theirs}, the model's {ours}"
        raise DataError("SHAPE", data.name, cause, "Evaluate on data of the kind that the model was trained on")
    for name in estimates:
        if name not in OWN:
            raise ConfigError("ESTIMATE", f"--estimate {name}", "no such estimate", f"Use one of {', '.join(OWN)}")
    if compat not in (None, "openai"):
        raise ConfigError("COMPAT", f"--compat {compat}", "no such script", "Use openai, or leave it out")
    if compat and data.levels != 256:
        raise ConfigError("COMPAT", f"--compat {compat}", "the script knows images of 256 levels only", "Leave it out")
    if iw > 1 and data.levels is None:
        cause = "the flow's likelihood of continuous data has no draws to be weighed"
        raise ConfigError("IW", f"--iw {iw}", cause, "Leave it out")
    if not 0 < minutes < math.inf:
        raise ConfigError("MINUTES", f"--minutes {minutes:g}", "no length of time", "Give a number above 0")
    asked = {*(estimates or OWN), *(("discrete", "openai") if compat else ())}
    return [name for name in SHARES if name in asked]


def _kind(shape: tuple[int, ...], levels: int | None) -> str:
    return f"{'×'.join(map(str, shape))} of {levels or 'continuous'} levels"

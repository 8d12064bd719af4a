"""``undiffuse advise``: measure which solver and levels suit a model, and keep the best for ``sample --calls``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress

from undiffuse import checkpoint
from undiffuse import data as datasets
from undiffuse.advise import SPACINGS, VARIANTS, Advice, advise
from undiffuse.cli.choose import unit, write_advice
from undiffuse.cli.evaluate import choose_items
from undiffuse.cli.guide import class_names
from undiffuse.cli.options import Device, RunArgument, beside, console, device_of
from undiffuse.cli.reading import Read, reads_data
from undiffuse.cli.told import tell
from undiffuse.diffusion import Diffusion
from undiffuse.errors import DataError
from undiffuse.metrics.law import FEWEST, FINAL, Judged, nearest, noisy
from undiffuse.randomness import ItemNoise
from undiffuse.report import table
from undiffuse.sample import prior_sample
from undiffuse.solvers import SOLVERS

SHOWN = 12
AT_MOST = 10_000
"""So many items of the data are compared with."""


@torch.no_grad()
@reads_data
def advise_command(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Argument(
            help="The data, to judge solvers that draw noise too; built-in sets are found.", metavar="[DATA]"
        ),
    ] = None,
    calls: Annotated[int, typer.Option(help="Network calls that a sample may take.", min=1)] = 10,
    items: Annotated[
        int, typer.Option(help="Walks of the flow that are compared; half serve to fit grids.", min=8)
    ] = 64,
    samples: Annotated[int, typer.Option(help="Samples of each walk that are compared with the data.", min=20)] = 500,
    fine: Annotated[int, typer.Option(help="Steps of the flow's reference.", min=4)] = 200,
    label: Annotated[list[str] | None, typer.Option(help="Classes to be sampled, in turn; see sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starts.")] = 1,
    device: Device = "auto",
    *,
    read: Read,
) -> None:
    """Measure which solver and levels are best for a number of network calls on this model; 'sample --calls' uses it.

    First every solver of the flow walks from the same noise, and its ends are compared with those of a fine walk. Then
    the best of them and all that draw noise are judged by how far their samples are from held-out data.
    """
    model = checkpoint.load(run, device_of(device))
    name = data or next((name for name in datasets.BUILTIN if name == model.info.get("name")), None)
    compared = _items(model, read(name)) if name and not label else None
    noise = ItemNoise(seed, range(items), model.item_shape, "advise", model.device)
    start, told = prior_sample(model.levels[0], noise(1)[0]), tell(class_names(model), label or ())
    cond = told and model.heard(told(range(items)), items)
    began = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        rows = (len(SOLVERS) + len(VARIANTS)) // 2 * len(SPACINGS)
        task = bar.add_task(f"the flow in {calls} calls", total=1.5 * fine + calls * (rows + 60))
        advice = advise(model.sampler(), start, calls, lambda done: bar.advance(task, done), fine=fine, cond=cond)
        best, ranking = advice.ranking[0].choice, None
        if compared is not None:
            choices = [best, *noisy(model, advice.known, calls)]
            bar.remove_task(task)
            task = bar.add_task(f"{samples} samples a walk", total=samples * calls * (len(choices) // 4 + FINAL))
            ranking, floor = nearest(model, choices, *compared, samples, seed, lambda done: bar.advance(task, done))
            if ranking:
                best, ranking = ranking[0].choice or best, [*ranking, floor]

    measured = {"items": items, "seed": seed, "fine": fine, "label": label, **_flow(model, advice, calls, fine)}
    if ranking:
        measured |= _laws(ranking, calls, samples)
    else:
        why = "that is done for samples that are told nothing" if label else "give held-out DATA beside RUN"
        why = why if ranking is None else "no sample was a number"
        console.print(f"solvers that draw noise are not judged: {why}", markup=False)
    measured |= {"calls": best.calls(model.schedule), "seconds": round(time.perf_counter() - began, 1)}
    path = write_advice(beside(run), checkpoint.fingerprint(model), calls, best, measured)
    same = "".join(f" --label {one}" for one in label or ())
    console.print(
        f"kept in {path}: {best}, {best.spacing} levels; undiffuse sample {run} --calls {calls}{same}", markup=False
    )


def _items(model: Diffusion, data: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of validation items, or of all of data that it was not trained on; and of training items."""
    if data.item_shape != model.item_shape or data.levels != model.info.get("levels"):
        shape = "×".join(map(str, model.item_shape))
        cause = f"its items are {'×'.join(map(str, data.item_shape))} of {data.levels} levels, the model's {shape}"
        raise DataError("SHAPE", data.name, cause, "Give the data that the model was trained on")
    own = data.fingerprint == model.info.get("fingerprint")
    parts = [choose_items(model, data, part)[0] for part in ("validation" if own else "all", "train")]
    chosen = (part[np.linspace(0, len(part) - 1, min(len(part), AT_MOST)).astype(int)] for part in parts)
    held_out, train = (torch.from_numpy(data.values[part]) for part in chosen)
    if min(len(held_out), len(train)) < FEWEST:
        cause = f"{len(held_out)} items to compare with, and {len(train)} others"
        raise DataError("FEW", data.name, cause, f"Give at least {FEWEST} of each")
    return held_out, train


def _flow(model: Diffusion, advice: Advice, calls: int, fine: int) -> dict[str, Any]:
    """Shows the ranking of the solvers of the flow; the same to be kept."""
    scale, name = unit(model)
    best = advice.ranking[0]

    def scaled(numbers: tuple[float, float]) -> tuple[float, float]:
        return scale * numbers[0], scale * numbers[1]

    shown = [
        {
            "solver": str(one.choice),
            "levels": one.choice.spacing,
            "calls": one.calls,
            f"error ({name})": scaled(one.mean),
            "behind the best": None if one is best else scaled(one.behind(best)),
        }
        for one in advice.ranking
    ]
    coarse = scale * float(advice.known.coarse.mean())
    table.render(shown[:SHOWN], f"the flow: the best {min(SHOWN, len(shown))} of {len(shown)} walks of {calls} calls")
    console.print(f"error: the root mean square between an end and that of {fine} steps, of {len(best.error)} items")
    console.print(f"that reference differs by {coarse:.2g} from one of half as many steps")
    console.print("left out: " + "; ".join(_left_out(advice.left_out)), markup=False)
    ranking = [{**row, "behind the best": row["behind the best"] or (0.0, 0.0)} for row in shown]
    return {"error": scaled(best.mean), "unit": name, "coarse": coarse, "ranking": ranking}


def _laws(ranking: list[Judged], calls: int, samples: int) -> dict[str, Any]:
    """Shows whose samples are nearest to the data, the floor last; the same to be kept."""
    best, *_, floor = ranking
    shown: list[dict[str, Any]] = [
        {
            "solver": "training items" if one.choice is None else str(one.choice),
            "levels": one.choice and one.choice.spacing,
            "Fréchet": one.mean,
            "behind the best": None if one is best or one is floor else one.behind(best),
            "kernel": one.kernel,
        }
        for one in ranking
    ]
    table.render(shown, f"the law: {samples} samples of {calls} calls beside held-out items")
    console.print(
        "Fréchet and kernel: how far the principal components' laws are apart; the least there can be is last"
    )
    return {"laws": shown, "samples": samples}


def _left_out(reasons: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]

"""``undiffuse advise``: measure which solver and levels suit a model, and keep the best for ``sample --calls``."""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from undiffuse import checkpoint
from undiffuse.advise import SPACINGS, VARIANTS, advise
from undiffuse.cli.choose import unit, write_advice
from undiffuse.cli.guide import class_names
from undiffuse.cli.options import Device, RunArgument, beside, console, device_of
from undiffuse.cli.told import tell
from undiffuse.denoiser import Told
from undiffuse.randomness import ItemNoise
from undiffuse.report import table
from undiffuse.sample import prior_sample
from undiffuse.solvers import SOLVERS

SHOWN = 12


@torch.no_grad()
def advise_command(
    run: RunArgument,
    calls: Annotated[int, typer.Option(help="Network calls that a sample may take.", min=1)] = 10,
    items: Annotated[int, typer.Option(help="Samples that are compared; half of them serve to fit grids.", min=8)] = 64,
    fine: Annotated[int, typer.Option(help="Steps of the reference.", min=4)] = 200,
    label: Annotated[list[str] | None, typer.Option(help="Classes to be sampled, in turn; see sample.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starts.")] = 0,
    device: Device = "auto",
) -> None:
    """Measure which solver and levels are best for a number of network calls on this model; 'sample --calls' uses it.

    Every deterministic solver walks from the same noise, and its ends are compared with those of a fine walk.
    """
    model = checkpoint.load(run, device_of(device))
    noise = ItemNoise(seed, range(items), model.item_shape, "advise", model.device)
    start, told = prior_sample(model.levels[0], noise(1)[0]), tell(class_names(model), label or ())
    denoise = model.sampler()
    if told is not None:
        denoise = Told(denoise, model.heard(told(range(items)), items))
    began = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        rows = (len(SOLVERS) + len(VARIANTS)) // 2 * len(SPACINGS)
        task = bar.add_task(f"measuring {calls} calls", total=1.5 * fine + calls * (rows + 60))
        advice = advise(denoise, start, calls, lambda done: bar.advance(task, done), fine=fine)
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
    measured = {"calls": best.calls, "error": scaled(best.mean), "unit": name, "items": items, "seed": seed}
    measured |= {"fine": fine, "coarse": coarse, "label": label, "seconds": round(time.perf_counter() - began, 1)}
    measured["ranking"] = [{**row, "behind the best": row["behind the best"] or (0.0, 0.0)} for row in shown]
    path = write_advice(beside(run), checkpoint.fingerprint(model), calls, best.choice, measured)
    table.render(shown[:SHOWN], f"the best {min(SHOWN, len(shown))} of {len(shown)} walks of at most {calls} calls")
    console.print(f"error: the root mean square between an end and that of {fine} steps, of {len(best.error)} items")
    console.print(f"that reference differs by {coarse:.2g} from one of half as many steps")
    console.print("left out: " + "; ".join(_left_out(advice.left_out)), markup=False)
    console.print(f"kept in {path}: undiffuse sample {run} --calls {calls}", markup=False)


def _left_out(reasons: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]

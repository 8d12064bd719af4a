"""``undiffuse advise``: measure which sampler suits a model, and store the best one for ``sample --calls``."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.cascade_options import require_then
from undiffuse.cli.data_options import ReadData, read_data, with_data_options
from undiffuse.cli.guidance_options import class_names
from undiffuse.cli.label_options import make_condition, parse_labels
from undiffuse.cli.options import (
    MAX_COUNT,
    Device,
    NetworkFile,
    Precision,
    RunArgument,
    as_argument,
    console,
    network_option,
    register_network,
    require_memory_for,
    resolve_device,
    run_folder,
)
from undiffuse.cli.prompt_options import Prompt, Prompts, prompt_condition, read_prompts
from undiffuse.cli.results import add, show, with_json
from undiffuse.cli.sampler_options import write_advice
from undiffuse.data.sources.registry import option_words
from undiffuse.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from undiffuse.evaluation.sampler_ranking import ComparedItems, SamplerScore
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.sampling.sampler import Sampler
    from undiffuse.sampling.sampler_search import SearchResult

MAX_ROWS = 12
"""The most samplers in the table."""


@with_json
@with_data_options
def advise_command(
    run: RunArgument,
    data: Annotated[
        str | None,
        typer.Argument(
            help="Held-out data, to compare stochastic solvers too; by default those of the run.",
            metavar="[DATA]",
        ),
    ] = None,
    calls: Annotated[int, typer.Option(help="Network calls per sample.", min=1, max=MAX_COUNT)] = 10,
    items: Annotated[
        int,
        typer.Option(help="Starting points of the flow; half of them are for fitting the times.", min=8, max=MAX_COUNT),
    ] = 64,
    samples: Annotated[
        int, typer.Option(help="Samples per sampler that are compared with the data.", min=20, max=MAX_COUNT)
    ] = 500,
    fine: Annotated[int, typer.Option(help="Steps of the reference solution of the flow.", min=4, max=MAX_COUNT)] = 200,
    label: Annotated[list[str] | None, typer.Option(help="Classes to sample, used in turn; see sample.")] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting points and samples.", min=0)] = 1,
    network: NetworkFile = None,
    device: Device = "auto",
    precision: Precision = "auto",
    *,
    read: ReadData,
) -> None:
    """Find the best sampler for a number of network calls.

    'sample --calls' uses the result.

    First all deterministic solvers start from the same noise, and their endpoints are compared with those of a fine
    solution of the flow. Then the best of them and all stochastic solvers are ranked by the distance of their samples
    to held-out data. Samples of a model with labels or captions have those of the held-out data; --label compares items
    of some classes alone, --label none samples without a condition, and with prompts only the flow is measured.
    """
    import torch

    from undiffuse.evaluation.sampler_ranking import NUM_FINALISTS, floor_size, rank_samplers, stochastic_samplers
    from undiffuse.model import checkpoint
    from undiffuse.model.arguments import check_predicts_mean
    from undiffuse.process.prior import prior_sample
    from undiffuse.process.seeded_noise import ItemNoise
    from undiffuse.report.progress_bar import ProgressBar
    from undiffuse.sampling.sampler_search import SEARCH_SPACINGS, SEARCH_VARIANTS, search_sampler
    from undiffuse.sampling.solvers import SOLVERS

    register_network(network)
    model = checkpoint.load(run, resolve_device(device), precision=precision)
    require_then(model, run)
    check_predicts_mean(model.config, run)
    texts, real, reason = read_prompts(prompt, prompts), None, "they are compared without prompts only"
    of_data = option_words({name: value for name, value in read.keywords.items() if name != "text_encoder"})
    if texts and (data is not None or of_data):
        cause = "with prompts samples are not compared with data"
        raise ConfigError("USAGE", of_data[0] if data is None else data, cause, "Leave DATA and its options out")
    labels = parse_labels(class_names(model), label).tolist() if label else []
    if not texts:
        real, reason = _real_items(model, run, data, read, samples, labels)
    require_memory_for(f"--items {items}", 4 * items * model.dims)
    require_memory_for(f"--samples {samples}", 4 * samples * model.dims)
    noise = ItemNoise(seed, range(items), model.x_shape, "advise", model.device)
    encoder = read.keywords.get("text_encoder") if texts else None
    start, text = prior_sample(model.chain[0], noise(1)[0]), prompt_condition(model, run, texts, encoder)
    condition = make_condition(class_names(model), label or (), text=text)
    cond = condition and condition(range(items))
    if real and real.cond:
        cond = real.cond.take(torch.arange(items) % samples)
    cond = cond and model.prepare_condition(cond, items)
    began = time.perf_counter()
    rows = (len(SOLVERS) + len(SEARCH_VARIANTS)) // 2 * len(SEARCH_SPACINGS)
    with (
        torch.no_grad(),
        ProgressBar(console, f"flow, {counted(calls, 'call')}", 1.5 * fine + calls * (rows + 60)) as bar,
    ):
        names = [*SOLVERS] if model.config.few_call_solver == "flow_map" else None
        result = search_sampler(
            model.sampling_denoiser(), start, calls, bar.advance, names, fine, cond, model.chain_length
        )
        best, scores, floor = result.ranking[0].sampler, [], None
        if real is not None:
            samplers = [best, *stochastic_samplers(model, result.reference, calls)]
            total = samples * calls * (len(samplers) // 4 + NUM_FINALISTS)
            bar.restart(f"{counted(samples, 'sample')} per sampler", total)
            scores, floor = rank_samplers(model, samplers, real, samples, seed, bar.advance)
            best = (scores[0].sampler if scores else None) or best

    of_items = real.conditions if real and not label else "none"
    given = {"label": ["all"] if "labels" in of_items else label, "prompt": texts or None, "conditions": of_items}
    measured = {"items": items, "seed": seed, "fine": fine, **given, **_show_flow(model, result, calls, fine)}
    if scores and floor is not None and real is not None:
        measured |= _show_scores([*scores, floor], calls, samples, floor_size(samples, real.others), real.conditions)
    else:
        if real is not None:
            reason = "all samples became NaN or infinite"
        console.print(f"stochastic solvers were not compared: {reason}")
    own = network_option(network)
    _store(run, model, calls, best, measured | {"seconds": round(time.perf_counter() - began, 1)}, own)


def _store(run: RunArgument, model: Diffusion, calls: int, best: Sampler, measured: dict[str, Any], own: str) -> None:
    from undiffuse.model import checkpoint
    from undiffuse.sampling.sampler_search import count_calls

    measured |= {"calls": count_calls(best, model.schedule)}
    path = write_advice(run_folder(run), checkpoint.fingerprint(model), calls, best, measured)
    add(best=best.to_dict(), **measured, stored=path)
    given = [(name, one) for name in ("label", "prompt") for one in measured[name] or ()]
    options = "".join(f" --{name} {shlex.quote(one)}" for name, one in given)
    console.print(f"best: {best}, {best.spacing} levels, stored in {path}")
    console.print(f"next: undiffuse sample {as_argument(run)} --calls {calls}{options}{own}")


def _real_items(
    model: Diffusion, run: RunArgument, data: str | None, read: ReadData, samples: int, labels: list[int]
) -> tuple[ComparedItems | None, str]:
    """Real items of DATA or of the run to compare samples with, or the reason why there are none."""
    from undiffuse.data.sources.builtin import BUILTIN
    from undiffuse.evaluation.sampler_ranking import compared_items

    try:
        return compared_items(model, read_data(read, data, run), samples, labels), ""
    except (ConfigError, DataError) as error:
        if data is not None or error.code == "USAGE":
            raise
        if error.code == "NO_SOURCE" and model.info.get("name") in BUILTIN:
            return compared_items(model, read(model.info["name"]), samples, labels), ""
        return None, f"{error.cause}; give held-out DATA after RUN"


def _show_flow(model: Diffusion, result: SearchResult, calls: int, fine: int) -> dict[str, Any]:
    """Prints the ranking of the deterministic solvers; returns the numbers to store."""
    from undiffuse.evaluation.sampler_ranking import data_unit

    scale, unit = data_unit(model)
    best = result.ranking[0]

    def scaled(numbers: tuple[float, float]) -> tuple[float, float]:
        return scale * numbers[0], scale * numbers[1]

    rows = [
        {
            "solver": str(one.sampler),
            "levels": one.sampler.spacing,
            "calls": one.calls,
            f"error ({unit})": scaled(one.mean_error),
            "behind the best": None if one is best else scaled(one.regret(best)),
        }
        for one in result.ranking
    ]
    coarse = scale * float(result.reference.coarse_error.mean())
    title = (
        f"flow: the best {min(MAX_ROWS, len(rows))} of {len(rows)} deterministic samplers of {counted(calls, 'call')}"
    )
    show(rows[:MAX_ROWS], title)
    console.print(f"error: root mean square distance to the endpoint of {fine} steps, over {len(best.error)} items")
    console.print(f"that reference differs by {coarse:.2g} from one of half as many steps")
    console.print("excluded: " + "; ".join(_by_reason(result.excluded)))
    ranking = [{**row, "behind the best": row["behind the best"] or (0.0, 0.0)} for row in rows]
    return {"error": scaled(best.mean_error), "unit": unit, "coarse": coarse, "ranking": ranking}


def _show_scores(
    scores: list[SamplerScore], calls: int, samples: int, floor_items: int, conditions: str
) -> dict[str, Any]:
    """Prints the samplers by the distance of their samples to the data, the floor last; returns what to store."""
    best, *_, floor = scores
    rows: list[dict[str, Any]] = [
        {
            "solver": f"{floor_items:,} other items" if score.sampler is None else str(score.sampler),
            "levels": score.sampler and score.sampler.spacing,
            "Fréchet": score.mean,
            "behind the best": None if score is best or score is floor else score.regret(best),
            "kernel": score.kernel,
        }
        for score in scores
    ]
    given = "" if conditions == "none" else f" with the same {conditions}"
    show(rows, f"samples: {samples} per sampler of {counted(calls, 'call')}, compared with held-out items{given}")
    console.print("Fréchet, kernel: distances in principal components; the last row is the floor for a perfect sampler")
    if floor_items < samples:
        console.print(
            "the Fréchet distance of that row is too high, because it has fewer items than the others have samples"
        )
    return {"scores": rows, "samples": samples}


def _by_reason(excluded: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in excluded.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]

"""``undiffuse sample``: draw samples with any solver and guidance, in parts that a stopped command resumes from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.cascade_options import (
    ImageNoise,
    Then,
    check_image_noise,
    load_model,
    refuse_with_then,
    report_unused_advice,
    require_then,
    stage_words,
)
from undiffuse.cli.data_options import refuse_inside
from undiffuse.cli.guidance_options import class_names, load_classifier, load_guide, report_guidance_twice
from undiffuse.cli.label_options import ConditionFn, make_condition, parse_labels, report_unused_conditions
from undiffuse.cli.options import (
    Device,
    NetworkFile,
    Precision,
    RunArgument,
    at_hand,
    bytes_per_value,
    console,
    log_of,
    network_option,
    register_network,
    require_disk_space,
    resolve_device,
    run_folder,
)
from undiffuse.cli.prompt_options import (
    EncoderFolder,
    Prompt,
    Prompts,
    prompt_condition,
    read_prompts,
)
from undiffuse.cli.sample_names import folder_name, model_words
from undiffuse.cli.sampler_options import (
    DEFAULT_QUALITY,
    QUALITIES,
    SamplerOptions,
    check_one_length,
    read_advice,
)
from undiffuse.errors import counted
from undiffuse.runtime.device import CPU_BATCH, MAX_GPU_BATCH, default_batch, halve_while_out_of_memory
from undiffuse.sampling.sampler import CLASSIFIER_FORMS, THRESHOLDS, Sampler, describe_stages
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.tables import SPACINGS

if TYPE_CHECKING:
    from undiffuse.model.cascade import AnyModel
    from undiffuse.report.sample_folder import SampleFolder

MIN_FILE_BYTES = 4096
"""What an image file takes on a disk at least."""
MAX_ANIMATED = 16
"""The most samples in an animation."""


def sample(
    run: RunArgument,
    n: Annotated[int, typer.Option(help="Number of samples.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Sample i depends on (seed, i) alone.", min=0)] = 0,
    quality: Annotated[str | None, typer.Option(help=f"{', '.join(QUALITIES)}; default {DEFAULT_QUALITY}.")] = None,
    calls: Annotated[
        int | None,
        typer.Option(
            help="Network calls per sample, by the sampler that 'advise' stored for this number, if any. Default of a "
            "distilled model: the number that it was distilled for.",
            min=1,
        ),
    ] = None,
    solver: Annotated[str | None, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the solver, such as eta=0.5; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver, at most those of the chain.", min=1)] = None,
    spacing: Annotated[str | None, typer.Option(help=f"Spacing of the steps: {', '.join(SPACINGS)}.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A class by name or index, 'all' or 'none'; repeatable, used in turn.")
    ] = None,
    cond: Annotated[
        Path | None, typer.Option(help="An array file of condition vectors or tokens, used in turn.")
    ] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    negative: Annotated[str | None, typer.Option(help="A prompt that --guidance moves the samples away from.")] = None,
    text_encoder: EncoderFolder = None,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 disables it.")] = 1.0,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest log-SNR of the guidance.", metavar="LOW HIGH"),
    ] = None,
    guidance_rescale: Annotated[float, typer.Option(help="Guidance rescale phi [Lin23], 0 to 1.")] = 0.0,
    classifier: Annotated[
        Path | None,
        typer.Option(help="A run of train-classifier, for classifier guidance to --label.", callback=at_hand),
    ] = None,
    classifier_scale: Annotated[float, typer.Option(help="Scale of the classifier's gradient.")] = 1.0,
    classifier_form: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(CLASSIFIER_FORMS)}: the classifier's gradient is added to the score, or to the mean of a "
            "step (algorithm 1 of Dhariwal and Nichol, with --solver ancestral only)."
        ),
    ] = "score",
    autoguide: Annotated[
        Path | None,
        typer.Option(help="A run of a weaker model of the same data, for autoguidance.", callback=at_hand),
    ] = None,
    autoguide_scale: Annotated[float, typer.Option(help="Autoguidance scale; 1 disables it.")] = 2.0,
    threshold: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(THRESHOLDS)}: static clamps predictions to the range of bounded data; dynamic rescales "
            "each item instead, which makes white backgrounds grey."
        ),
    ] = "static",
    animate: Annotated[
        Path | None, typer.Option(help="Also write an animation of the first samples, .gif or .mp4.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help=f"Samples per batch; changes the samples by rounding only. Default {CPU_BATCH}; on a GPU up to "
            f"{MAX_GPU_BATCH:,} if they are small.",
            min=1,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder, new or of this command; default is a folder in the run.")
    ] = None,
    then: Then = None,
    image_noise: ImageNoise = None,
    network: NetworkFile = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Draw samples from a trained model.

    Writes single files, a grid, an array, and a manifest. A stopped command is resumed.
    """
    import torch

    from undiffuse.model.arguments import check_condition
    from undiffuse.model.cascade import Cascade, weights_of
    from undiffuse.report.animation import animate_sampling, check_animation_path
    from undiffuse.report.sample_folder import SampleFolder
    from undiffuse.runtime.distributed_group import init_process_group
    from undiffuse.runtime.side_files import read_record
    from undiffuse.runtime.signals import interruptible

    # The model
    refuse_inside(out, None, run)
    refuse_inside(animate, None, run, "--animate")
    if animate is not None:
        check_animation_path(animate)
    check_one_length(quality, calls, steps)
    register_network(network)
    group = init_process_group(resolve_device(device))
    log = log_of(group)
    refuse_with_then(then, classifier=classifier, autoguide=autoguide, animate=animate)
    model = load_model(run, then, group.device, log, precision)
    require_then(model, run)

    # What is drawn: conditions, sampler, guidance
    guiding = None if classifier is None else load_classifier(model, classifier)
    labels, names, texts = label or [], class_names(model, guiding), read_prompts(prompt, prompts)
    encoder = text_encoder if texts or negative is None else None  # it may be that of the negative prompt alone
    condition = make_condition(names, labels, cond, prompt_condition(model, run, texts, encoder))
    avoided = None if negative is None else prompt_condition(model, run, [negative], text_encoder)
    guidance_fields = {
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale,
        "classifier_scale": classifier_scale,
        "classifier_form": classifier_form,
        "autoguidance_scale": autoguide_scale,
        "threshold": threshold,
    }
    files = {"cond": cond, "classifier": classifier, "autoguide": autoguide}
    options = SamplerOptions(quality, calls, solver, setting or (), steps, spacing, guidance_fields)
    weights = weights_of(model)

    def advised(sampler: Sampler, calls: int) -> Sampler | None:
        if isinstance(model, Cascade):
            report_unused_advice(model, [run, *(then or ())], calls, log)
            return None
        if solver or spacing or setting:
            return None
        conditions = {"label": label, **files, "prompt": texts or None}
        return read_advice(run, str(weights), calls, log, sampler, conditions, network_option(network))

    sampler = options.choose(model, log, advised)
    if condition is not None:  # a wrong one is an error before a folder is opened
        check_condition(condition(range(1))).validate_for(model.condition_sizes, 1, classifier is not None)
    numbers = parse_labels(names, labels).tolist() if labels else []
    report_unused_conditions(n, log, labels=numbers, prompts=texts)
    labelled = any(number >= 0 for number in numbers)
    has_condition = labelled if classifier else labelled or cond is not None or any(texts)
    guide = load_guide(model, sampler, guiding, autoguide, has_condition, avoided)
    report_guidance_twice(model, sampler, log)
    noise = check_image_noise(then, image_noise)
    stages = stage_samplers(model, sampler)
    stage_steps(model, sampler)  # an error here leaves the samples of a folder as they are

    # Where it is written: the plan is all that a sample depends on
    plan = {"weights": weights, "seed": seed, "sampler": sampler.to_dict(), "label": label}
    plan |= {"precision": model.precision}
    plan |= {name: None if path is None else _sha256(path) for name, path in files.items()}
    plan |= {"prompt": texts, "negative": negative} if texts or negative is not None else {}
    plan |= {"image_noise": noise} if then else {}
    if out is None:
        others = [*stage_words(then, image_noise), *model_words(run, precision, model, sampler)]
        used = [path for path in files.values() if path]
        name = folder_name(sampler, seed, labels, texts, negative, others, used, then or ())
        out = run_folder(run) / "samples" / name
    num_values, columns = model.info.get("num_values"), model.info.get("columns", ())
    folder = SampleFolder(out, plan, model.item_shape, num_values, columns, labels=numbers, classes=names)
    sample_bytes = model.dims * bytes_per_value(num_values) + MIN_FILE_BYTES * folder.is_image
    require_disk_space(f"--n {n}", out, n * sample_bytes)

    # Draw; every process draws its share of the batches, and the first one writes the rest
    batch = batch or default_batch(model.dims, model.device)
    if animate is not None and group.rank == 0 and not isinstance(model, Cascade):
        items = range(min(n, MAX_ANIMATED))
        animate_sampling(animate, model, items, seed, sampler, condition and condition(items), guide)
        log(f"animation: {animate}")
    began = time.perf_counter()
    with interruptible(), folder.open(range(n), log) if group.rank == 0 else nullcontext([]) as gaps:
        missing = [range(*gap) for gap in group.gather([[gap.start, gap.stop] for gap in gaps])[0]]
        parts = _missing_parts(range(n), batch, missing, group.rank, group.world_size)
        further = {"negative": avoided, "image_noise": noise} if isinstance(model, Cascade) else {"guide": guide}
        _draw(folder, model, seed, parts, batch, sampler, condition, further, log)
        group.gather(None)
        if group.rank:
            return
        seconds, grid = time.perf_counter() - began, folder.grid
        if not folder.finished:
            facts = {"model": str(run), "seconds": round(seconds, 3), "torch": torch.__version__}
            if then:
                facts |= {"then": list(map(str, then)), "stage_samplers": [stage.to_dict() for stage in stages]}
            grid = folder.finish(range(n), facts)

    # Report
    if folder.finished:
        stored = (read_record(folder.manifest) or {}).get("n", n)
        more = f", among {stored:,}" if stored > n else ""
        log(("this sample exists already" if n == 1 else f"these {n:,} samples exist already") + more)
    else:
        rate = sum(map(len, missing)) / seconds
        log(f"{counted(n, 'sample')} by {describe_stages(stages)}, {seconds:.1f} s ({rate:.1f} per second)")
    if grid is not None and grid.is_file():
        log(f"grid: {grid}")
    log(f"samples: {folder.array}, manifest: {folder.manifest}")


def stage_samplers(model: AnyModel, sampler: Sampler) -> list[Sampler]:
    """The sampler of each stage of a cascade, of which a distilled one has its own; ``sampler`` of a model alone."""
    from undiffuse.model.cascade import Cascade

    if isinstance(model, Cascade):
        return [model.stage_sampler(stage, sampler) for stage in range(len(model.models))]
    return [sampler]


def stage_steps(model: AnyModel, sampler: Sampler) -> list[int]:
    """The steps of each stage of a cascade, those of a model alone. Raises `ConfigError` for impossible levels."""
    from undiffuse.model.cascade import Cascade

    if isinstance(model, Cascade):
        return [model.num_steps(stage, sampler) for stage in range(len(model.models))]
    return [model.num_steps(sampler)]


def _missing_parts(items: range, batch: int, missing: list[range], rank: int, processes: int) -> list[range]:
    """The ``missing`` samples that the process ``rank`` of ``processes`` draws, at most ``batch`` at once.

    The processes take turns: the batches are those of all ``items``, whichever are missing.
    """
    batches = [items[start : start + batch] for start in range(0, len(items), batch)]
    parts = [
        range(max(block.start, gap.start), min(block.stop, gap.stop))
        for block in batches[rank::processes]
        for gap in missing
    ]
    return [part for part in parts if part]


def _draw(
    folder: SampleFolder,
    model: AnyModel,
    seed: int,
    parts: list[range],
    batch: int,
    sampler: Sampler,
    condition: ConditionFn | None,
    options: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Add the samples of ``parts``, at most ``batch`` at once, with a progress bar; of a cascade a line for each stage.

    ``options`` are further arguments of the model's ``sample``.
    """
    from undiffuse.model.cascade import Cascade
    from undiffuse.report.progress_bar import ProgressBar

    cascade = model if isinstance(model, Cascade) else None
    titles, steps = ["sampling"], stage_steps(model, sampler)
    if cascade:
        titles = [f"stage {i} of {len(cascade.models)}, {shape}" for i, shape in enumerate(cascade.shapes, 1)]
    items, seconds, began = sum(map(len, parts)), [0.0] * len(titles), time.perf_counter()
    with ProgressBar(console, titles[0], items * sum(steps)) as bar, folder.adding_in_background() as write:

        def advance_stage(stage: int, count: int) -> None:
            nonlocal began
            now = time.perf_counter()
            seconds[stage], began = seconds[stage] + now - began, now
            bar.title = titles[stage]
            bar.advance(count)

        for part in parts:
            given = {**options, "first": part.start, "progress": advance_stage if cascade else bar.advance}
            draw = partial(model.sample, len(part), seed, sampler, condition and condition(part), **given)
            values, batch = halve_while_out_of_memory(draw, batch, log)
            write(part.start, values.numpy())
    if cascade and parts:
        for stage, title in enumerate(titles):
            log(f"{title}: {cascade.stage_sampler(stage, sampler).describe()}, {seconds[stage]:.1f} s")


def _sha256(path: Path) -> str:
    from undiffuse.runtime.atomic_file import file_digest
    from undiffuse.runtime.tensor_file import model_path

    return file_digest(model_path(path))

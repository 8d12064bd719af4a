"""``undiffuse restore``: fill in, enlarge, sharpen or denoise an image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import recorded_options, refuse_inside
from undiffuse.cli.guidance_options import class_names
from undiffuse.cli.label_options import make_condition
from undiffuse.cli.options import (
    Device,
    NetworkFile,
    Precision,
    RunArgument,
    console,
    limit_steps,
    register_network,
    require_memory_for,
    resolve_device,
    run_folder,
)
from undiffuse.cli.prompt_options import EncoderFolder, Prompt, prompt_condition
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.runtime.side_files import numbered
from undiffuse.sampling.tables import RESTORATION_METHODS, RESTORATION_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from undiffuse.model.diffusion import Diffusion
    from undiffuse.model.restoration import Degradation
    from undiffuse.networks.condition import Condition

    Drawn = tuple[Tensor, dict[str, Any], Image]
    Draw = Callable[[Callable[[int], None]], Drawn]

MAX_NOISE = 10
"""The largest --noise."""
MAX_IN_STRIP = 6
"""The most restorations in the strip."""

SDEDIT_HELP = "sdedit makes variants of an intact IMAGE: noise, and back."
STRENGTH_HELP = (
    "With --method sdedit: time t of the noise added to IMAGE, above 0 and at most 1 (noise only); default 0.6."
)
DEFAULT_STRENGTH = 0.6


def restore(
    run: RunArgument,
    image: Annotated[Path, typer.Argument(help="The image to restore.", metavar="IMAGE")],
    mask: Annotated[
        Path | None,
        typer.Option(help="An image of IMAGE's size: white or transparent where IMAGE is to be filled in, else black."),
    ] = None,
    upsample: Annotated[int, typer.Option(help="Factor by which each side is to be enlarged.", min=1)] = 1,
    blur: Annotated[
        float, typer.Option(help="Standard deviation of IMAGE's Gaussian blur, in pixels of the result.", min=0)
    ] = 0,
    noise: Annotated[
        float,
        typer.Option(
            help="Standard deviation of IMAGE's noise, as a fraction of black to white.", min=0, max=MAX_NOISE
        ),
    ] = 0,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="IMAGE is intact: apply the degradation to it first, then restore it.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(RESTORATION_METHODS)}; default is pigdm with --blur, else mmps. {SDEDIT_HELP}"),
    ] = None,
    strength: Annotated[float | None, typer.Option(help=STRENGTH_HELP)] = None,
    label: Annotated[list[str] | None, typer.Option(help="The class of IMAGE; repeatable, used in turn.")] = None,
    prompt: Prompt = None,
    text_encoder: EncoderFolder = None,
    n: Annotated[
        int, typer.Option(help="Number of restorations: different images that are all consistent with IMAGE.", min=1)
    ] = 4,
    seed: Annotated[int, typer.Option(help="Restoration i depends on (seed, i) alone.", min=0)] = 0,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Steps of the solver, at most those of the chain; default {RESTORATION_STEPS}.", min=1),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Restorations per batch; changes the results by rounding only.", min=1)
    ] = 16,
    out: Annotated[Path | None, typer.Option(help="A new output folder; default is one in the run.")] = None,
    network: NetworkFile = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Fill in, enlarge, sharpen or denoise IMAGE.

    RUN is a model of such images. Writes restorations, their mean and spread.
    """
    import torch

    from undiffuse.data.single import load_image
    from undiffuse.data.transform import IntegerLevels, is_latent
    from undiffuse.model import checkpoint, restoration
    from undiffuse.model.arguments import check_predicts_mean
    from undiffuse.runtime.atomic_file import file_digest

    if out is not None and _is_finished(out):
        raise ConfigError(
            "OUT", out, "it already holds finished restorations or samples", "Give another folder, or remove it"
        )
    refuse_inside(out, None, run)
    register_network(network)
    model = checkpoint.load(run, resolve_device(device), precision=precision)
    pixels = restoration.check_image_model(model, run)
    if method == "sdedit" and steps is not None and model.config.calls:
        cause = "with --method sdedit a distilled model takes the times of its own sampler"
        raise ConfigError("USAGE", f"--steps {steps}", cause, "Omit it")
    steps = limit_steps(RESTORATION_STEPS if steps is None else steps, model.chain_length)
    text = prompt_condition(model, run, prompt or (), text_encoder)
    condition = make_condition(class_names(model), label or (), text=text)
    common = {"model": str(run), "image": str(image), "label": label, "seed": seed, "steps": steps}
    common |= {"precision": model.precision} | ({"prompt": prompt} if prompt else {})
    if method == "sdedit":
        if mask is not None or upsample != 1 or blur or noise or degrade:
            cause, fix = (
                "it makes variants of an intact image",
                "Omit --mask, --upsample, --blur, --noise and --degrade",
            )
            raise ConfigError("METHOD", "--method sdedit", cause, fix)
        strength = DEFAULT_STRENGTH if strength is None else strength
        make_variants(model, run, image, strength, n, batch, common, condition and condition(range(n)), out)
        return
    if strength is not None:
        fix = "Add --method sdedit, or omit it"
        raise ConfigError("USAGE", "--strength", "only the method 'sdedit' has a strength", fix)
    check_predicts_mean(model.config, run)
    channels, *sides = model.item_shape
    if mask is None and upsample == 1 and not blur and not noise:
        fix = "Give --mask, --upsample, --blur or --noise"
        raise ConfigError("USAGE", "restore", "no degradation of the image is given", fix)
    degradation = restoration.Degradation(model.item_shape, blur, upsample, 2 * noise)
    small_sides = degradation.full_operator.out_shape[1:]
    exact = degrade or (upsample == 1 and not blur and not noise)  # else resizing would change blur and noise
    prepare = recorded_options(run) if exact else {}
    loaded = load_image(image, channels, sides if degrade else small_sides, prepare)
    if prepare and loaded.changes:
        console.print(f"note: {image}: {', '.join(loaded.changes)}")
    x = IntegerLevels(loaded.num_values).to_model(torch.tensor(loaded.pixels)[None])[0]
    if mask is not None:
        hidden = load_image(mask, 1, small_sides, prepare | {"background": "white"})
        if not (degrade and upsample > 1) and (theirs := load_image(mask, 1).pixels.shape[1:]) != (
            ours := _sides(image)
        ):
            cause = f"it has {theirs[1]} x {theirs[0]} pixels, and {image} {ours[1]} x {ours[0]}"
            raise DataError("SIZE", mask, cause, "Draw it on a copy of the image")
        known = torch.tensor(2 * hidden.pixels.astype(int) < hidden.num_values)
        degradation = restoration.Degradation(model.item_shape, blur, upsample, 2 * noise, known)
        if degradation.is_inpainting and bool(known.all()):
            raise ConfigError("MASK", mask, "it hides nothing", "Make white the part that is to be filled in")
    method = method or restoration.default_method(degradation, is_latent(model.transform))
    restoration.check_method(model, degradation, method)
    observed = restoration.degrade(degradation, x, seed, loaded.num_values) if degrade else x
    rounding = restoration.rounding_std(loaded.num_values)
    plan = common | {
        "mask": mask and str(mask),
        "mask_sha256": mask and file_digest(mask),
        "upsample": upsample,
        "blur": blur,
        "noise": noise,
        "degrade": degrade,
        "method": method,
    }

    def draw(progress: Callable[[int], None]) -> Drawn:
        values = restoration.restore(
            model,
            degradation,
            observed,
            n,
            method=method,
            seed=seed,
            num_steps=steps,
            batch=batch,
            floor=rounding,
            progress=progress,
            cond=condition and condition(range(n)),
        )
        residual = restoration.data_residual(model, degradation, observed, values)
        picture = strip(model, degradation, x if degrade else None, observed, values)
        return values, {"residual": [float(r) / 2 for r in residual]}, picture

    work = n * restoration.num_steps_of(model, method, steps)
    folder, values, facts, seconds = _write(model, run, out, plan, observed, n, work, draw)
    coarser = restoration.rounding_std(min(loaded.num_values, pixels.num_values))  # of the image or of the model
    expected = float((degradation.noise_std**2 + coarser**2) ** 0.5)
    console.print(f"{counted(n, 'restoration')} by {method} in {counted(steps, 'step')}, {seconds:.1f} s")
    console.print(
        f"residual between restorations and IMAGE: {_percent(2 * fmean(facts['residual']))} of black to white; "
        f"expected from noise and rounding: {_percent(expected)}",
    )
    if degrade:
        error = float((pixels.to_model(values).mean(0) - x).square().mean().sqrt())
        console.print(f"root mean square error of their mean: {_percent(error)} of black to white")
    console.print(f"strip: {folder}/strip.png, single restorations: {folder}/000000.png ...")


def make_variants(
    model: Diffusion,
    run: Path,
    image: Path,
    strength: float,
    n: int,
    batch: int,
    common: dict[str, Any],
    cond: Condition | None,
    out: Path | None,
) -> None:
    """Write variants of IMAGE by noise and back, and a strip of IMAGE and the variants."""
    import torch

    from undiffuse.data.single import load_image
    from undiffuse.data.transform import IntegerLevels, values_transform
    from undiffuse.model.sdedit import sdedit, variant_levels

    seed, num_steps = common["seed"], common["steps"]
    steps = len(variant_levels(model, strength, num_steps)) - 1
    channels, *sides = model.item_shape
    loaded = load_image(image, channels, sides, recorded_options(run))
    if loaded.changes:
        console.print(f"note: {image}: {', '.join(loaded.changes)}")
    x = IntegerLevels(loaded.num_values).to_model(torch.tensor(loaded.pixels)[None])[0]
    plan = common | {"steps": steps, "method": "sdedit", "strength": strength}

    def draw(progress: Callable[[int], None]) -> Drawn:
        values = sdedit(model, x, n, strength, seed, num_steps, batch, progress, cond)
        shown = values_transform(model.transform).to_model(values)[:MAX_IN_STRIP]
        columns = [("input", x), *((f"variant {i}", item) for i, item in enumerate(shown))]
        return values, {}, _image_strip(model, columns)

    folder, *_, seconds = _write(model, run, out, plan, x, n, n * steps, draw)
    console.print(
        f"{counted(n, 'variant')} by sdedit from t = {strength:g} in {counted(steps, 'step')}, {seconds:.1f} s"
    )
    console.print(f"strip: {folder}/strip.png, single variants: {folder}/000000.png ...")


def _write(
    model: Diffusion, run: Path, out: Path | None, plan: dict[str, Any], observed: Tensor, n: int, work: int, draw: Draw
) -> tuple[Path, Tensor, dict[str, Any], float]:
    """The folder that n results were written to, their values, their facts, and the seconds that it took.

    ``draw`` returns the values, facts for the manifest and the strip; it reports its progress, ``work`` in all.
    """
    from undiffuse.model import checkpoint
    from undiffuse.report.progress_bar import ProgressBar
    from undiffuse.report.sample_folder import SampleFolder

    digest = hashlib.sha256(observed.numpy().data).hexdigest()
    plan = plan | {"weights": checkpoint.fingerprint(model), "observed": digest, "n": n}
    folder = out or _unused_folder(run_folder(run) / "restored" / f"{Path(plan['image']).stem}-{plan['method']}")
    samples = SampleFolder(folder, plan, model.item_shape, model.info.get("num_values"), more=["strip.png"])
    require_memory_for(f"--n {n}", 4 * n * model.dims)
    began = time.perf_counter()
    with samples.open(range(n), console.print) as missing:
        with ProgressBar(console, "making variants" if plan["method"] == "sdedit" else "restoring", work) as bar:
            values, facts, picture = draw(bar.advance)
        seconds = time.perf_counter() - began
        for gap in missing:
            samples.add(gap.start, values.numpy()[gap.start : gap.stop])
        samples.finish(range(n), facts, {"strip.png": picture})
    return folder, values, facts, seconds


def _sides(image: Path) -> tuple[int, ...]:
    """Height and width of an image that stands upright."""
    from undiffuse.data.single import load_image

    return load_image(image, 3).pixels.shape[1:]


def _percent(difference: float) -> str:
    """A ``difference`` in x, which is 2 from black to white, in percent of that."""
    return f"{50 * difference:.2f} %"


def _is_finished(folder: Path) -> bool:
    """Whether the folder holds finished restorations."""
    from undiffuse.runtime.side_files import read_record

    return (read_record(folder / "manifest.json") or {}).get("finished") is True


def _unused_folder(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that is new or holds restorations that were interrupted."""
    return next(path for path in map(folder.with_name, numbered(folder.name)) if _is_unused(path))


def _is_unused(folder: Path) -> bool:
    from undiffuse.runtime.side_files import read_record

    if record := read_record(folder / "manifest.json"):
        return record.get("finished") is False
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def strip(model: Diffusion, degradation: Degradation, intact: Tensor | None, observed: Tensor, values: Tensor) -> Image:
    """Images side by side: the intact one if given, the observed one, restorations, their mean and spread."""
    import torch

    from undiffuse.data.transform import values_transform

    x = values_transform(model.transform).to_model(values)
    shown = observed if degradation.known is None else torch.where(degradation.known, observed, 0.0)
    shown = shown.repeat_interleave(degradation.shrink, -1).repeat_interleave(degradation.shrink, -2)
    columns = [] if intact is None else [("intact", intact)]
    columns += [("observed", shown), *((f"restored {i}", x[i]) for i in range(min(len(x), MAX_IN_STRIP)))]
    if len(x) > 1:
        columns += [("mean", x.mean(0)), ("2 x spread", 2 * x.std(0, correction=0) - 1)]
    return _image_strip(model, columns)


def _image_strip(model: Diffusion, columns: Sequence[tuple[str, Tensor]]) -> Image:
    """The images of ``columns``, in the units of x, side by side under their names."""
    import torch

    from undiffuse.data.transform import IntegerLevels, values_transform
    from undiffuse.report import figures

    transform = values_transform(model.transform)
    assert isinstance(transform, IntegerLevels)
    frames = transform.to_data(torch.stack([column for _, column in columns])[:, None])
    return figures.image_strip(frames.numpy(), [name for name, _ in columns], transform.num_values)

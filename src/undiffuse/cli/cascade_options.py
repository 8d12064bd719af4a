"""``--then``: the models of a cascade after the base, of the commands that sample and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import at_hand
from undiffuse.errors import ConfigError, counted

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.cascade import AnyModel, Cascade

Then = Annotated[
    list[Path] | None,
    typer.Option(
        "--then",
        metavar="RUN",
        help="The next model of a cascade, of super-resolution (train --from); repeatable.",
        callback=at_hand,
    ),
]
ImageNoise = Annotated[
    float | None,
    typer.Option(
        help="Standard deviation, 0 to 1, of the noise on images that --then enlarges; default 0.2.", min=0.0, max=1.0
    ),
]


def load_model(
    run: Path, then: list[Path] | None, device: str, log: Callable[[str], None], precision: str = "float32"
) -> AnyModel:
    """The model of ``run``, or the cascade with those of ``then``; ``log`` gets its notes. Raises `ConfigError`."""
    from undiffuse.model import checkpoint
    from undiffuse.model.cascade import Cascade

    if not then:
        return checkpoint.load(run, device, precision=precision)
    cascade = Cascade.load([run, *then], device, precision)
    for note in cascade.notes:
        log(f"note: {note}")
    return cascade


def full_resolution(data: Dataset) -> Dataset:
    """The images that ``data`` are a stage of, or ``data`` itself."""
    from undiffuse.data.stage_data import StageData

    return data.full if isinstance(data, StageData) else data


def refuse_with_then(then: list[Path] | None, **flags: Any) -> None:
    """Raise `ConfigError` if ``then`` is given and one of the ``flags``, by the name of the argument, is not None."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if then and given:
        raise ConfigError("USAGE", given[0], "it is for a single model, and --then makes a cascade", "Leave it out")


def check_image_noise(then: list[Path] | None, image_noise: float | None) -> float:
    """``image_noise`` or its default. Raises `ConfigError` if it is given without ``then``."""
    from undiffuse.model.cascade import DEFAULT_IMAGE_NOISE

    if image_noise is not None and not then:
        raise ConfigError("USAGE", "--image-noise", "it is for images that --then enlarges", "Leave it out")
    return DEFAULT_IMAGE_NOISE if image_noise is None else image_noise


def stage_words(then: list[Path] | None, image_noise: float | None) -> list[str]:
    """What the name of a folder of samples or numbers lists of a cascade: its models, and the noise if it is given."""
    from undiffuse.cli.options import run_folder

    def name(path: Path) -> str:
        folder = run_folder(path).resolve().name
        return folder if path.is_dir() or path.stem == "model" else f"{folder}-{path.stem}"

    runs = [name(path) for path in then or ()]
    return runs if image_noise is None else [*runs, f"image-noise-{image_noise:g}"]


def report_unused_advice(cascade: Cascade, runs: list[Path], calls: int, log: Callable[[str], None]) -> None:
    """Log a line if one of the ``runs`` of the ``cascade`` has advice, which is for a model alone.

    Also one for each distilled stage: its number of calls is fixed.
    """
    from undiffuse.cli.options import run_folder
    from undiffuse.cli.sampler_options import ADVICE_FILE

    files = [path for run in runs if (path := run_folder(run) / ADVICE_FILE).exists()]
    if files:
        log(
            f"{files[0]} is not used: it is for its model alone. With --then each stage takes {calls} calls of a solver"
        )
    for run, model in zip(runs, cascade.models, strict=True):
        if model.config.calls and model.config.calls != calls:
            log(f"note: {run} is distilled and takes {counted(model.config.calls, 'call')}, whatever --calls")


def require_then(model: AnyModel, run: Path) -> None:
    """Raise `ConfigError` if ``model`` is one stage of super-resolution, which needs images to enlarge."""
    from undiffuse.model.cascade import Cascade

    if not isinstance(model, Cascade) and "image" in model.condition_sizes:
        cause = "it is a super-resolution model, which needs images to enlarge"
        raise ConfigError("CASCADE", run, cause, f"Name the model of the small images: sample BASE --then {run}")

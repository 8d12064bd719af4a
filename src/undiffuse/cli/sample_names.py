"""The default name of the folder of samples that a command writes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from undiffuse.cli.prompt_options import slug
from undiffuse.sampling.sampler import Sampler, guidance_changes

if TYPE_CHECKING:
    from undiffuse.model.cascade import AnyModel

MAX_NAME_BYTES = 120
"""The longest name in UTF-8."""


def model_words(run: Path, precision: str, model: AnyModel, sampler: Sampler) -> list[str]:
    """The file ``run``, where it is not the model of its folder, and the ``precision``, where it is given.

    For a distilled ``model`` also the word uniform, unless the ``sampler`` has fixed times, as its default sampler has.
    """
    from undiffuse.model.cascade import Cascade

    words = [run.stem] if run.is_file() and run.name != "model.safetensors" else []
    if not isinstance(model, Cascade) and model.config.calls and sampler.times is None:
        words += ["uniform"] if sampler.spacing == "uniform" else []
    return words if precision == "auto" else [*words, precision]


def folder_name(
    sampler: Sampler,
    seed: int,
    labels: Sequence[str] = (),
    prompts: Sequence[str] = (),
    negative: str | None = None,
    others: Sequence[str] = (),
    files: Sequence[Path] = (),
    stages: Sequence[Path] = (),
) -> str:
    """A name that lists the sampler, conditions, ``others`` and files, leaving out what has its default.

    A digest tells apart what could have the same name: prompts, files, the ``stages`` of a cascade, and words with
    characters that a name does not keep.
    """
    from undiffuse.runtime.atomic_file import json_digest

    spacing = [] if sampler.spacing == "uniform" else [sampler.spacing]
    words = [*str(sampler).split(), str(sampler.given_steps), *spacing, *labels, *slug(prompts)]
    words += [*slug([negative] if negative else []), *others]
    words += [f"{name}-{value}" for name, value in guidance_changes(sampler).items()]
    words += [path.stem for path in files]
    text, end = "-".join(words), f"-seed-{seed}"
    name, room = re.sub(r"[^\w.+-]+", "-", text), MAX_NAME_BYTES - len(end)
    changed = any("-" in label for label in labels) or re.search(r"[^\w.+-]", "".join([*labels, *others])) is not None
    if changed or prompts or negative is not None or files or stages or len(name.encode()) > room:
        places = [os.path.abspath(path) for path in (*files, *stages)]
        digest = json_digest([text, list(labels), list(prompts), negative, places])[:6]
        name = f"{name.encode()[: room - 7].decode(errors='ignore')}-{digest}"
    return (name + end).strip("-.")

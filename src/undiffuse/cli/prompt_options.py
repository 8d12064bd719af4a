"""The options ``--prompt``, ``--prompts``, ``--negative`` and ``--text-encoder``."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli.data_options import recorded_options
from undiffuse.errors import ConfigError, printable

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.text_conditions import TextModel
    from undiffuse.networks.condition import Condition

MAX_PROMPTS_BYTES, MAX_SLUG = 1 << 22, 40
"""The largest file of prompts, and the most characters of a folder's name that come from prompts."""

Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; repeatable, used in turn.")]
Prompts = Annotated[Path | None, typer.Option(help="A text file of prompts, one a line, used in turn.")]
PromptOfImage = Annotated[str | None, typer.Option(help="A prompt for A and B, for a model trained with captions.")]
EncoderFolder = Annotated[
    str | None,
    typer.Option("--text-encoder", help="Folder of the text encoder of training, if it has moved."),
]


def read_prompts(prompt: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of both options in order; an empty one, given by ``--prompt ""``, is none. Raises `ConfigError`."""
    prompts = list(prompt or ())
    if file is None:
        return prompts
    try:
        if file.stat().st_size > MAX_PROMPTS_BYTES:
            raise ConfigError("PROMPT", file, f"it is larger than {MAX_PROMPTS_BYTES:,} bytes", "Give fewer prompts")
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ConfigError("PROMPT", file, f"cannot be read ({what})", "Give a text file, one prompt a line") from None
    if not any(lines):
        raise ConfigError("PROMPT", file, "there is no prompt in it", "Give one prompt a line")
    return [*prompts, *filter(None, lines)]


def prompt_condition(
    model: TextModel, run: Path, prompts: Sequence[str], encoder: str | None = None
) -> Condition | None:
    """The conditions of the ``prompts``, None without any; a folder's encoder is found where training found it.

    Raises `ConfigError` and `DataError`.
    """
    from undiffuse.model.text_conditions import text_condition, text_encoder_of

    if not prompts:
        if encoder is not None:
            raise ConfigError("USAGE", "--text-encoder", "it has no effect without a prompt", "Give --prompt")
        return None
    recorded = text_encoder_of(model) or {}
    if encoder is None and "digest" in recorded:
        encoder = "minilm" if recorded["name"] == "minilm" else recorded_options(run).get("text_encoder")
        if encoder is None or (encoder != "minilm" and not os.path.isdir(encoder)):
            cause = f"the text encoder {recorded['name']!r}, with which the model was trained, is not there"
            raise ConfigError("TEXT_ENCODER", encoder or run, cause, "Name its folder: --text-encoder FOLDER")
    return text_condition(model, prompts, encoder)


def example_condition(conditions: Collection[str], data: Dataset | None = None) -> str:
    """The option of ``sample`` for a model with these ``conditions``, after a space; empty if it has none.

    That is the first caption of ``data`` as a prompt, else each label in turn: samples without an option are
    unconditional.
    """
    prompt = data.captions[0][0] if conditions and data and data.captions else ""
    if prompt and not prompt.startswith("-"):
        return f" --prompt {shlex.quote(printable(prompt))}"
    return " --label all" if "classes" in conditions else ""


def slug(prompts: Sequence[str]) -> list[str]:
    """A word for the name of a folder, none without prompts: the prompts, shortened and without punctuation."""
    text = re.sub(r"[^\w]+", "-", "-".join(prompt or "none" for prompt in prompts))
    return [word] if (word := text.strip("-")[:MAX_SLUG].strip("-")) else []

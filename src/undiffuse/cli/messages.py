"""Errors as the command line shows them: options are spelled as flags, and a command that works is printed whole."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from undiffuse.cli.options import flag_words, in_flags
from undiffuse.errors import UndiffuseError

SETTING_FLAGS = {"max_steps": "--steps"}
"""Flags of settings of [train] that are not named after the setting."""

LIBRARY_NAMES = {"factor": "--upsample", "noise_std": "--noise", "num_steps": "--steps", "loggers": "--log"}
"""Flags of arguments of the library that have other names there."""


def error_line(error: UndiffuseError, arguments: Sequence[str]) -> str:
    """The line of an ``error`` of the command ``arguments``, whose options are flags."""
    flags = command_flags(arguments)
    where, cause, fix = error.where, in_flags(error.cause, flags), f"{in_flags(error.fix, flags)}."
    setting = re.fullmatch(r"train\.(\w+) = (.*)", where)
    named = re.fullmatch(r"(\w+)(?: = (.*))?", where)
    quoted = re.fullmatch(r"(?:\w+ )?'(.*)'", where)
    if setting and (flag := SETTING_FLAGS.get(setting[1], _as_flag(setting[1]))) in arguments:
        where, fix = f"{flag} {setting[2]}", fix.replace("Change this setting", "Change it")
    elif named and where not in arguments and (flag := flags.get(named[1], LIBRARY_NAMES.get(named[1]))):
        where = " ".join(filter(None, (flag, named[2])))
    elif quoted and (flag := _flag_of_value(quoted[1], arguments)):
        where = f"{flag} {quoted[1]}"
    remedy: Mapping[str, Any] = getattr(error, "remedy", {})
    if remedy and remedy.keys() <= flags.keys():
        line = shlex.join(["undiffuse", *arguments])
        added = [shlex.join(flag_words(flags[name], value)) for name, value in remedy.items()]
        fix = f"Run: {' '.join([line, *(words for words in added if f' {words} ' not in f'{line} ')])}"
    return f"error[{error.code}] {where}: {cause}. {fix}"


def command_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flag of each option of the command that ``arguments`` name, by the name of its Python argument."""
    from undiffuse.cli.app import app

    commands: Mapping[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    command = next((commands[word] for word in arguments if word in commands), None)
    flags = {p.name: p.opts for p in command.params} if command is not None else {}
    return {name: max(opts, key=len) for name, opts in flags.items() if opts[0].startswith("--")}


def config_hint(option: str) -> str:
    """Where an unknown ``option`` of ``train`` belongs in a recipe; empty if it is no setting."""
    from undiffuse.model.config import ModelConfig, TrainConfig
    from undiffuse.model.presets import PRESETS

    name = option.lstrip("-").replace("-", "_")
    places = {key: "[model] network" for preset in PRESETS.values() for key in preset.model.network}
    places |= {field.name: "[model]" for field in dataclasses.fields(ModelConfig)}
    places |= {field.name: "[train]" for field in dataclasses.fields(TrainConfig)}
    name = next(iter(difflib.get_close_matches(name, places, 1, cutoff=0.8)), "")
    if not name:
        return ""
    return f"{name} is a setting of {places[name]} in a recipe: give it in a file, --config FILE.toml"


def _flag_of_value(value: str, arguments: Sequence[str]) -> str | None:
    """The flag that was given with this ``value``."""
    pairs = itertools.pairwise(arguments)
    return next((flag for flag, given in pairs if given == value and flag.startswith("--")), None)


def _as_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

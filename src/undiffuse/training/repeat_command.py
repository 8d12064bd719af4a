"""The command that trains a run again, from what ``run.json`` records."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undiffuse.data.sources.registry import OPTIONS, as_source, option_words, path_of
from undiffuse.errors import counted
from undiffuse.networks.tables import INSTALLED_NETWORKS
from undiffuse.report.model_facts import settings_in_words
from undiffuse.report.run_sections import recipe_json
from undiffuse.runtime.terminal import as_argument

COMMANDS = {"classifier": "train-classifier", "autoencoder": "train-autoencoder"}
"""The commands of training by the kind of model; of a diffusion model it is train."""


def repeat(record: Mapping[str, Any], kind: str) -> tuple[list[str], str]:
    """What to do to train the same again: sentences with a command as the second of them, and the recipe's text."""
    config, facts = record.get("config"), record.get("data") or {}
    if not config or "model" not in config:  # a task of the user's own has no command
        return [], ""
    settings, model, source = config["train"], config["model"], facts.get("source")
    is_path = bool(source) and path_of(source) is not None
    data = "DATA" if not source else as_argument(as_source(Path(source).name) if is_path else source)
    options = {name: value for name, value in (facts.get("options") or {}).items() if name in OPTIONS}
    shortened = {name: _without_folder(value) for name, value in options.items()}
    words = [data, *map(shlex.quote, option_words(shortened))]
    own = ["--network", "FILE.py:NAME"] if _is_own_network(model) else []
    where = " in the folder of the data" if is_path else ""
    if "teacher" in config:
        words += ["--calls", str(model["calls"]), "--method", config["method"]]
        words += ["--pairs", config["pairs"], "--guidance", repr(config["guidance"])]
        words += ["--both-ways"] * bool(config["both_ways"]) + ["--seed", str(settings["seed"])]
        words += ["--steps", str(settings["max_steps"])] if settings["max_steps"] else []
        words += ["--minutes", repr(settings["minutes"])] if settings["minutes"] else []
        sentence = f"TEACHER is the run with the weights {config['teacher'][:16]}. Run{where}:"
        return [sentence, f"undiffuse distill TEACHER {' '.join([*words, *own])} --out NEW", *_notes(record)], ""
    words += ["--config", "recipe.json", "--seed", str(settings["seed"])]
    command = COMMANDS.get(kind, "train")
    if command == "train":
        words += ["--autoencoder", "AUTOENCODER"] if model.get("autoencoder") else []
        words += own
        words += ["--init", "INIT"] if record.get("init") else []
    sentence = f"Save the text below as recipe.json, and run{where}:"
    return [sentence, f"undiffuse {command} {' '.join(words)} --out NEW", *_notes(record)], recipe_json(config)


def _notes(record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    settings, notes = config["train"], [f"It was trained with torch {record.get('torch', 'of an unknown version')}."]
    if not settings["max_steps"]:
        notes.append("The length of the run is in minutes: how many steps these are depends on the machine.")
    if config["model"].get("autoencoder"):
        notes.append(f"AUTOENCODER is the one with the fingerprint {config['model']['autoencoder'][:16]}.")
    if record.get("init"):
        notes.append(f"INIT is the model file with the sha256 {record['init'][:16]}.")
    if _is_own_network(config["model"]):
        notes.append(f"NAME is {settings_in_words(config['model']['network'])}, in a file of the user.")
    if record.get("extended"):
        notes.append(f"The run was extended {counted(len(record['extended']), 'time')}, which one run does not repeat.")
    if record.get("changed"):
        notes.append("The run was resumed with changed settings, data or torch, which one run does not repeat.")
    return notes


def _is_own_network(model: Mapping[str, Any]) -> bool:
    return "schedule" in model and model["network"].get("kind") not in INSTALLED_NETWORKS


def _without_folder(value: Any) -> Any:
    """``value``, of a path its last part alone: folders of a machine say nothing on another, and may be private."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

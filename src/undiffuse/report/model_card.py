"""A model card: the page of a model in the form of the Hugging Face hub, Markdown below metadata in YAML."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from undiffuse import __version__
from undiffuse.errors import printable
from undiffuse.report import run_sections
from undiffuse.report.html import minus
from undiffuse.report.run_report import RunContent
from undiffuse.report.table import cell
from undiffuse.runtime.terminal import as_argument

TAGS = ("diffusion", "likelihood")
SEAL = re.compile(r"\n<!-- undiffuse card (?P<record>\{[^{}\n]*\}) -->\n\Z")
"""The last line of a card: the sha256 of the text above it, and of the model file that it describes."""
NO_COPIES = "No evidence that training items are copied"


def card(
    content: RunContent,
    model_file: str,
    name: str,
    task: str = "",
    license: str | None = None,
    network: str = "",
    enlarges: bool = False,
) -> str:
    """The card of the model that ``content`` describes, whose file has the sha256 ``model_file``.

    ``name`` is what `Diffusion.from_pretrained` takes, ``task`` the hub's word for what the model does, if it has one.
    The ``license`` is the user's to choose: without one the card names none. ``network``: the class of a network that
    is not part of undiffuse. ``enlarges``: it is a super-resolution model, which samples after a base.
    """
    parts = [
        f"---\n{_metadata(content, task, license)}\n---",
        f"# {escaped(content.name)}: a diffusion model",
        f"Written by undiffuse {__version__}.",
        *_use(name, network, enlarges),
        *_likelihood(content),
        *_comparison(content),
        "## Data",
        facts_table(content.data),
        "## Model",
        facts_table(content.model),
        *_repeat(content),
    ]
    text = "\n\n".join(parts) + "\n"
    record = json.dumps({"text": hashlib.sha256(text.encode()).hexdigest(), "model": model_file})
    return f"{text}\n<!-- undiffuse card {record} -->\n"


def described_model(text: str) -> str | None:
    """The sha256 of the model file that a card describes; None for a text that is no card, or was edited."""
    seal = SEAL.search(text)
    try:
        record = json.loads(seal["record"]) if seal else {}
        written = hashlib.sha256(text[: seal.start()].encode()).hexdigest() if seal else ""
        return str(record["model"]) if record["text"] == written else None
    except (ValueError, LookupError, TypeError):
        return None


def escaped(text: str) -> str:
    """``text`` on one line without meaning in Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", printable(" ".join(text.split())))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` under the names of their fields, as `undiffuse.report.table.render`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[escaped(minus(cell(row.get(name)).strip())) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts_table(pairs: Iterable[tuple[str, object]]) -> str:
    """A table of names and values without a head."""
    lines = [f"| {escaped(name)} | {escaped(str(value))} |" for name, value in pairs if value]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _metadata(content: RunContent, task: str, license: str | None) -> str:
    """The metadata in YAML, written by huggingface_hub, with the likelihood of held-out items as results."""
    from huggingface_hub import EvalResult, ModelCardData

    results, measured = [], str((content.evaluation or {}).get("data") or content.name)
    for name, numbers in _estimates(content).items():
        value, stderr = numbers["bits_per_dim"]["total"]
        if math.isfinite(value) and math.isfinite(stderr):
            results.append(
                EvalResult(
                    task_type=task or "other",
                    dataset_type=measured,
                    dataset_name=measured,
                    dataset_split=str((content.evaluation or {}).get("part", "")),
                    metric_type="bits_per_dim",
                    metric_name=f"{numbers.get('title', name)}: ± {stderr:.2g}, n = {numbers['items']:,}",
                    metric_value=value,
                )
            )
    fields: dict[str, Any] = {"library_name": "undiffuse", "tags": list(TAGS)}
    fields |= {"license": license} if license else {}
    fields |= {"pipeline_tag": task} if task else {}
    fields |= {"model_name": content.name, "eval_results": results} if results else {}
    return ModelCardData(**fields).to_yaml(line_break="\n")


def _estimates(content: RunContent) -> Mapping[str, Any]:
    return (content.evaluation or {}).get("estimates") or {}


def _use(name: str, network: str, enlarges: bool) -> list[str]:
    lines = [
        "import undiffuse",
        "",
        f"model = undiffuse.Diffusion.from_pretrained({name!r}{f', network={network}' if network else ''})",
        "samples = model.sample(16, seed=0)  # (16, *model.item_shape), as numbers of the data",
    ]
    if enlarges:
        base = 'undiffuse.Diffusion.from_pretrained("BASE")  # the model of the small images'
        cascade = "cascade = undiffuse.model.cascade.Cascade([base, model])"
        lines = ["import undiffuse.model.cascade", "", f"base = {base}", lines[2], cascade]
        lines.append("samples = cascade.sample(16, seed=0)  # (16, *cascade.item_shape), as numbers of the data")
    words = "It needs the Python package undiffuse"
    words += f", and the class `{network}` of its network, in a file FILE.py." if network else "."
    run = f"BASE --then {as_argument(name)}" if enlarges else as_argument(name)
    command = f"$ undiffuse sample {run} --n 16{f' --network FILE.py:{network}' if network else ''}"
    return ["## Use", words, "\n".join(["```python", *lines, "```"]), f"```console\n{command}\n```"]


def _likelihood(content: RunContent) -> list[str]:
    if content.evaluation is None or not _estimates(content):
        bound = run_sections.training_bound(content.records)
        reason = content.why.get("evaluation", "")
        words = f"Not measured{f': {reason}' if reason else ''}."
        return ["## Likelihood", escaped(f"At the end of training: {bound}" if bound else words)]
    rows, caption = run_sections.likelihood_rows(content.evaluation)
    notes = [f"- {escaped(run_sections.sentence(line))}" for line in content.evaluation.get("explanations") or ()]
    return ["## Likelihood", f"{escaped(caption)}.", table(rows), *(["\n".join(notes)] if notes else [])]


def _comparison(content: RunContent) -> list[str]:
    if content.comparison is None:
        return []
    rows, caption = run_sections.distance_rows(content.comparison)
    lines = ["## Distances", f"{escaped(caption)}.", table(rows)]
    if test := content.comparison["copying"]:
        found = "Training items are copied" if test["significant"] else NO_COPIES
        lines.append(f"{found} (p ≤ {test['p_value']:.1g}).")
    return lines


def _repeat(content: RunContent) -> list[str]:
    if not content.repeat:
        return []
    parts = ["## Repeat it", escaped(content.repeat[0]), f"```console\n$ {printable(content.repeat[1])}\n```"]
    parts += map(escaped, content.repeat[2:])
    return [*parts, f"```json\n{content.recipe}\n```"] if content.recipe else parts

"""The page of a run: what `undiffuse.training.run_report` has collected, as sections of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from undiffuse import __version__
from undiffuse.errors import counted
from undiffuse.report import html, run_sections
from undiffuse.report.html import Markup, code, element, facts, figure, join, missing, paragraph

MAX_BYTES = 3_000_000
"""The size of a page, at most."""
BUDGET = {"samples": 500_000, "forward": 250_000, "reverse": 250_000, "solvers": 480_000, "neighbours": 200_000}
BUDGET |= {"data": 220_000, "reconstructions": 400_000}
"""The bytes of the pictures of a kind, at most; in the page they take a third more."""


@dataclass
class Drawing:
    """Pictures of a kind with a ``caption``: each with its text for those who do not see it, and a ``title`` if given.

    ``plot``: they are drawn on white by matplotlib. Without pictures ``reason`` says why, and ``command`` adds them.
    """

    images: Sequence[Image.Image] = ()
    alts: Sequence[str] = ()
    caption: object = ""
    titles: Sequence[object] = ()
    plot: bool = False
    reason: str = ""
    command: str | None = None


@dataclass
class RunContent:
    """All that a page shows, as plain data. What is None or empty is not there.

    ``run`` is the run as a word of a command. ``kind`` is a "diffusion model", a "classifier" or an "autoencoder".
    ``record`` is that of run.json, ``records`` the metrics, ``info`` the facts in the model's file. ``evaluation`` and
    ``comparison`` are the records of `evaluate` and `compare`. ``why`` has the reason why a part is not there, by its
    name. ``commands`` measure or repeat a part; "report" writes the page again.
    """

    run: str
    name: str
    kind: str
    record: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    info: Mapping[str, Any] = field(default_factory=dict)
    model: Sequence[tuple[str, str]] = ()
    evaluation: Mapping[str, Any] | None = None
    comparison: Mapping[str, Any] | None = None
    data: Sequence[tuple[str, str]] = ()
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    repeat: Sequence[str] = ()
    recipe: str = ""
    notes: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        return bool(self.record.get("finished", True))


def page(content: RunContent) -> str:
    """The page, in at most `MAX_BYTES`: pictures that are too large are reduced."""
    for scale in (1.0, 0.5, 0.2, 0.05):
        written = _page(content, scale)
        if len(written.encode()) <= MAX_BYTES:
            break
    return written


def _page(content: RunContent, scale: float) -> str:
    def drawn(name: str) -> Markup:
        return _drawn(content.drawings.get(name), int(scale * BUDGET[name]), content.commands.get("report"))

    sections: list[tuple[str, str, list[object]]] = []
    diffusion = content.kind == "diffusion model"
    if diffusion:
        sections.append(("samples", "Samples", [drawn("samples")]))
        sections.append(("process", "Between data and noise", [drawn("forward"), drawn("reverse")]))
        sections.append(("solvers", "Solvers from the same noise", [drawn("solvers")]))
    if content.kind == "autoencoder":
        sections.append(("reconstructions", "Reconstructions", [drawn("reconstructions")]))
    sections.append(("training", "Training", run_sections.training(content.records)))
    if content.kind == "classifier":
        sections.append(("accuracy", "Accuracy", run_sections.accuracy(content.info.get("accuracy") or ())))
    if diffusion:
        sections.append(("likelihood", "Likelihood", _likelihood(content)))
        sections.append(("distances", "Distances", _distances(content)))
        sections.append(("copies", "Nearest training items", _copies(content, drawn("neighbours"))))
    sections.append(("data", "Data", [facts(content.data, "The data of the run"), drawn("data"), *_notes(content)]))
    sections.append(("settings", "Settings", [facts(content.model, "The model"), *_training_settings(content)]))
    sections.append(("repeat", "Repeat it", _repeat(content)))
    return html.page(f"{content.name}: {content.kind}", _head(content), sections, _foot())


def _head(content: RunContent) -> Markup:
    """The state of the run, and its most important numbers."""
    state = "" if content.finished else " Its training has not finished."
    lines = [paragraph("Report of the run ", code(content.run), ".", state)]
    lines += [paragraph(note, class_="note") for note in content.notes]
    numbers = run_sections.key_numbers(content.records, dict(content.model), content.evaluation, content.comparison)
    cells = [
        element("div", element("dt", name), element("dd", value, element("small", more)))
        for name, value, more in numbers
    ]
    return join(*lines, element("dl", *cells, class_="numbers"))


def _foot() -> Markup:
    return paragraph(
        f"Written by undiffuse {__version__}. This file is complete: it loads nothing and runs no program."
    )


def _drawn(drawing: Drawing | None, max_bytes: int, report: str | None) -> Markup:
    if drawing is None:
        return join()
    if not drawing.images:
        return missing(str(drawing.caption), drawing.command, drawing.reason, report)
    budget = max_bytes // len(drawing.images)
    shown = [
        html.picture(image, alt, budget, drawing.plot) for image, alt in zip(drawing.images, drawing.alts, strict=True)
    ]
    if not drawing.titles:
        return figure(shown[0], drawing.caption)
    named = [figure(image, title) for image, title in zip(shown, drawing.titles, strict=True)]
    narrow = all(image.width <= image.height for image in drawing.images)
    size = "pictures small" if narrow else "pictures"
    return join(element("div", *named, class_=size), paragraph(drawing.caption, class_="caption"))


def _likelihood(content: RunContent) -> list[object]:
    if content.evaluation is None:
        reason, command = content.why.get("evaluation", ""), content.commands.get("evaluation")
        bound = run_sections.training_bound(content.records)
        parts = [paragraph("At the end of training: ", bound)] if bound else []
        return [*parts, missing("No likelihood is measured", command, reason, content.commands.get("report"))]
    return [*run_sections.likelihood(content.evaluation), *_measured_by(content.commands.get("evaluation"))]


def _distances(content: RunContent) -> list[object]:
    if content.comparison is None:
        reason, command = content.why.get("comparison", ""), content.commands.get("comparison")
        return [missing("No distances are measured", command, reason)]
    measured = [content.commands[name] for name in ("samples", "comparison") if name in content.commands]
    return [*run_sections.distances(content.comparison), *_measured_by(*measured)]


def _copies(content: RunContent, picture: Markup) -> list[object]:
    if content.comparison is None:
        reason, command = content.why.get("comparison", ""), content.commands.get("comparison")
        return [missing("Whether training items are copied is not tested", command, reason)]
    verdict, *table = run_sections.copies(content.comparison)
    return [verdict, element("div", picture or None, *table, class_="beside")]


def _measured_by(*lines: str | None) -> list[object]:
    given = [line for line in lines if line]
    return [paragraph("Measured by:"), html.commands(*given)] if given else []


def _notes(content: RunContent) -> list[object]:
    notes = list((content.record.get("data") or content.info).get("notes") or ())
    if not notes:
        return []
    shown = [element("li", note) for note in notes[: run_sections.MAX_LISTED]]
    more = len(notes) - len(shown)
    shown += [element("li", f"and {counted(more, 'more note')}")] if more else []
    return [element("h3", "Notes on reading the data"), element("ul", *shown, class_="notes")]


def _training_settings(content: RunContent) -> list[object]:
    settings = (content.record.get("config") or {}).get("train")
    if not settings:
        return []
    shown = [(name.replace("_", " "), run_sections.setting(value)) for name, value in settings.items()]
    return [element("h3", "The training"), html.settings((name, value) for name, value in shown if value)]


def _repeat(content: RunContent) -> list[object]:
    if not content.repeat:
        return [missing("The command is not known", None, content.why.get("repeat", "there is no run.json"))]
    parts: list[object] = [paragraph(content.repeat[0]), html.commands(content.repeat[1])]
    parts += [paragraph(line) for line in content.repeat[2:]]
    if content.recipe:
        parts += [element("h3", "recipe.json"), html.verbatim(content.recipe)]
    return parts

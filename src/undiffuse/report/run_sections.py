"""The parts of a run's page that are made of numbers: metrics, and the records of `evaluate` and `compare`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from undiffuse.errors import counted
from undiffuse.evaluation.memorization_test import FALSE_ALARM_RATE, MIN_GAP_ITEMS
from undiffuse.report.html import Markup, element, figure, minus, paragraph, table
from undiffuse.report.svg import Line, chart
from undiffuse.report.table import cell

Record = Mapping[str, Any]
MAX_LISTED = 20
"""Classes, columns and notes that are named, at most."""
MAX_EVALUATIONS = 16
"""Evaluations during training in a table: the last ones."""
PLACES = ("nearest training item", "second", "third")
WINDOW_PARTS = 50
"""The averaged loss is that of a window of this part of the curve."""
BITS = "bits/dim"
MEASURES = {
    "bits_per_dim": ("held-out bound", BITS),
    "accuracy": ("held-out accuracy", "mean over log-SNR"),
    "l1": ("held-out L1", "mean |x − x̂|"),
    "distance": ("distance to the teacher's flow", "rms in x"),
}
"""What evaluations during training measure, by the name in the records: a title and the unit."""


def with_error(value: float, stderr: float | None) -> str:
    """The value ± its standard error, where there is one."""
    return minus(cell((float(value), math.nan if stderr is None else float(stderr))))


def training_bound(records: Sequence[Record]) -> str:
    """The last bound of held-out items that the run measured, in words; empty if there is none."""
    for prefix in ("final_", ""):
        for r in [r for r in records if f"{prefix}bits_per_dim" in r][-1:]:
            value = with_error(r[f"{prefix}bits_per_dim"], r.get(f"{prefix}stderr"))
            items, mc_samples, of = r.get(f"{prefix}items"), r.get(f"{prefix}mc_samples"), ""
            if items and mc_samples:
                of = f", {counted(items, 'held-out item')}, {counted(mc_samples, 'noise level')} each"
            return f"≤ {value} bits per dimension{of}."
    return ""


def key_numbers(
    records: Sequence[Record], model: Mapping[str, str], evaluation: Record | None, comparison: Record | None
) -> list[tuple[str, str, str]]:
    """The most important numbers: what, the number, and what it is of. ``model`` is the model in words."""
    numbers = []
    estimates = (evaluation or {}).get("estimates") or {}
    if estimates:
        name = next((name for name in ("discrete", "continuous") if name in estimates), next(iter(estimates)))
        bits = estimates[name]["bits_per_dim"]["total"]
        numbers.append(
            (
                "Likelihood",
                f"{_bound(estimates[name])}{with_error(*bits)}",
                f"{BITS}, {_items(estimates[name], evaluation)}",
            )
        )
    else:
        numbers += [_from_training(records)] * bool(_from_training(records))
    metrics = (comparison or {}).get("metrics") or {}
    for metric in [metrics[name] for name in ("frechet",) if name in metrics]:
        floor = f"floor {with_error(*metric['floor'][:2])}, {metric['features']}, n = {metric['n']:,}"
        numbers.append(("Fréchet distance", with_error(*metric["value"][:2]), floor))
    if copying := (comparison or {}).get("copying"):
        found = "found" if copying["significant"] else "no evidence"
        numbers.append(("Copies of training items", found, f"p ≤ {copying['p_value']:.1g}"))
    step, seconds = (max((r[key] for r in records if key in r), default=None) for key in ("step", "seconds"))
    if step is not None:
        numbers.append(("Training", counted(step, "step"), f"in {counted(round((seconds or 0) / 60, 1), 'minute')}"))
    if count := model.get("parameters"):
        numbers.append(("Parameters", count, model.get("kind", "")))
    return numbers


def _from_training(records: Sequence[Record]) -> Any:
    for key, (title, unit) in MEASURES.items():
        for prefix in ("final_", ""):
            for r in [r for r in records if f"{prefix}{key}" in r][-1:]:
                value = with_error(r[f"{prefix}{key}"], r.get(f"{prefix}stderr") if key == "bits_per_dim" else None)
                items = r.get(f"{prefix}items", r.get("items"))
                of = f", {counted(items, 'item')}" if items else ""
                return (title.capitalize(), f"{'≤ ' * (key == 'bits_per_dim')}{value}", f"{unit}{of}, in training")
    return None


def training(records: Sequence[Record]) -> list[object]:
    """The curves of the loss and of what evaluations measured, and the latter as a table."""
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r and math.isfinite(r["loss"])]
    figures = []
    if losses:
        steps, values = zip(*losses, strict=True)
        log = min(values) > 0 and max(values) > 10 * min(values)
        window = max(1, len(values) // WINDOW_PARTS)
        averaged = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
        curves = [Line("", steps, values, faint=window > 1)]
        curves += [Line("", steps[window // 2 :][: len(averaged)], averaged)] if window > 1 else []
        title = f"training loss, {values[0]:.4g} at step {steps[0]:,} to {values[-1]:.4g} at step {steps[-1]:,}"
        drawn = chart(title, curves, "step", "training loss", log)
        figures.append(figure(drawn, "Training loss, means of 50 steps." + " Thick: moving average." * (window > 1)))
    rows = []
    for key, (title, unit) in MEASURES.items():
        measured = [r for r in records if key in r and math.isfinite(r[key])]
        if not measured:
            continue
        steps, values = [r["step"] for r in measured], [r[key] for r in measured]
        errors = [r.get("stderr", 0.0) for r in measured] if key == "bits_per_dim" else []
        best = min(measured, key=lambda r: -r[key] if key == "accuracy" else r[key])
        curve = Line("", steps, values, errors, dots=True, colour=1)
        alt = f"{title}, {unit}, at {counted(len(steps), 'step')}: last {values[-1]:.4g}, best {best[key]:.4g}"
        bars = ", with its standard error" if errors else ""
        caption = f"{title.capitalize()} of the averaged weights{bars}. {_best(key, best, measured[-1])}"
        low, high = (0.0, 1.0) if key == "accuracy" else (None, None)
        figures.append(figure(chart(alt, [curve], "step", unit, low=low, high=high), caption))
        rows += [_evaluation(key, title, unit, r) for r in measured[-MAX_EVALUATIONS:]]
    if not figures:
        return [paragraph("No steps are recorded yet.", class_="missing")]
    parts: list[object] = [element("div", *figures, class_="charts")]
    if bound := training_bound([r for r in records if "final_bits_per_dim" in r]):
        parts.append(paragraph("With more noise levels, at the end: ", bound))
    if flags := [r["overfit"] for r in records if "overfit" in r]:
        parts.append(_overfitting(flags[-1], [r for r in records if "overfit" in r][-1]))
    caption = "Evaluations during training; each item has the same noise every time"
    return [*parts, table(rows, caption)] if rows else parts


def _best(key: str, best: Record, last: Record) -> str:
    """The best evaluation in words; of a bound only where the last is worse by more than the standard error of both."""
    if key != "bits_per_dim":
        return f"Best: {best[key]:.4g} at step {best['step']:,}."
    shown = f"{with_error(best[key], best.get('stderr'))} at step {best['step']:,}"
    stderr = math.hypot(best.get("stderr", math.inf), last.get("stderr", math.inf))
    if best is last or last[key] - best[key] > stderr:
        return f"Best: {shown}."
    within = f", within the standard error of the last, {with_error(last[key], last.get('stderr'))}"
    return f"Lowest: {shown}{within * math.isfinite(stderr)}."


def _evaluation(key: str, title: str, unit: str, r: Record) -> dict[str, Any]:
    value = with_error(r[key], r.get("stderr") if key == "bits_per_dim" else None)
    row: dict[str, Any] = {"step": f"{r['step']:,}", f"{title}, {unit}": "≤ " * (key == "bits_per_dim") + value}
    if "gap" in r:
        row["held out − training"] = with_error(r["gap"], r.get("gap_stderr"))
    row |= {name: f"{r[name]:.4g}" for name in ("reconstruction", "kl") if name in r}
    return row | {"items": r.get("items"), "noise levels": r.get("mc_samples")}


def _overfitting(significant: object, r: Record) -> Markup:
    if significant:
        words = "Overfitting: training items have a lower bound than held-out items, on the same noise and times, by "
        return paragraph(f"{words}{with_error(r['gap'], r.get('gap_stderr'))} {BITS}.", class_="bad")
    gap, items = with_error(r["gap"], r.get("gap_stderr")), r.get("items", math.inf)
    measured = f"held-out minus training items, on the same noise and times, is {gap} {BITS}"
    if items < MIN_GAP_ITEMS:
        few = counted(items, "held-out item")
        words = f"Overfitting cannot be tested with {few}, at least {MIN_GAP_ITEMS} are needed"
        return paragraph(f"{words}: {measured}.", class_="missing")
    rate = f"the test has a false-alarm rate of {FALSE_ALARM_RATE:g}"
    return paragraph(f"No overfitting is proved: {measured}; {rate}.", class_="good")


def accuracy(rows: Sequence[Record]) -> list[object]:
    """The curve of a classifier's accuracy over log-SNR, and its table."""
    if not rows:
        return [paragraph("No accuracy on test items is recorded.", class_="missing")]
    log_snr, correct, stderr = ([float(row[name]) for row in rows] for name in ("log_snr", "accuracy", "stderr"))
    line = Line("", log_snr, correct, stderr, dots=True)
    title = f"test accuracy at {len(rows)} levels of log-SNR"
    drawn = chart(title, [line], "noise  ←  log-SNR  →  data", "accuracy", low=0.0, high=1.0)
    shown = [
        {"log-SNR": f"{r['log_snr']:.2f}", "accuracy": with_error(r["accuracy"], r["stderr"]), "items": r["items"]}
        for r in rows
    ]
    caption = "Accuracy for test items with noise, ± standard error."
    return [element("div", figure(drawn, caption), class_="charts"), table(shown, "Accuracy by log-SNR")]


def likelihood_rows(evaluation: Record) -> tuple[list[dict[str, Any]], str]:
    """The estimates of an evaluation as rows of a table, "≤" where the expectation is an upper bound; its caption."""
    rows = []
    for name, numbers in evaluation["estimates"].items():
        parts = {part: tuple(map(float, bits)) for part, bits in numbers["bits_per_dim"].items()}
        total = f"{_bound(numbers) or '  '}{cell(parts.pop('total'))}"
        title = numbers.get("title", name)
        rows.append(
            {"estimate": title, **parts, "total": total, "items": numbers["items"]}
            | {"calls per item": numbers["calls"]}
        )
    given = "" if evaluation.get("condition", "none") == "none" else f", given {evaluation['condition']}"
    return rows, f"{evaluation['data']}, {evaluation['part']}: bits per dimension{given} ± standard error"


def likelihood(evaluation: Record) -> list[object]:
    """The table of estimates of an evaluation, the bits over log-SNR, and what they mean."""
    rows, caption = likelihood_rows(evaluation)
    shown: list[object] = [table(rows, caption)]
    stored = evaluation.get("bits_by_log_snr") or {}
    curves = {name: curve for name, curve in stored.items() if curve["bits"] and all(map(math.isfinite, curve["bits"]))}
    if curves:
        names = {"discrete": "chain", "continuous": "continuous bound"}
        lines = [
            Line(
                f"{names.get(name, name)}: {evaluation['estimates'][name]['bits_per_dim']['diffusion'][0]:.3f} {BITS}",
                curve["edges"],
                [bits / (b - a) for bits, a, b in zip(curve["bits"], curve["edges"], curve["edges"][1:], strict=False)],
                stairs=True,
                dashed=i > 0,
                colour=i,
            )
            for i, (name, curve) in enumerate(curves.items())
        ]
        drawn = chart("bits per dimension over log-SNR", lines, "noise  ←  log-SNR  →  data", f"{BITS} per unit")
        caption = "Where the bits are paid: the area below a curve is the diffusion term, without prior and decoder."
        shown.append(element("div", figure(drawn, caption), class_="charts"))
    if lines := evaluation.get("explanations"):
        shown.append(element("ul", *(element("li", sentence(line)) for line in lines), class_="notes"))
    return shown


def _bound(numbers: Record) -> str:
    return "≤ " if numbers.get("is_bound") else ""


def _items(numbers: Record, evaluation: Record | None) -> str:
    is_held_out = str((evaluation or {}).get("part", "")).startswith("held out")
    return counted(numbers["items"], "held-out item" if is_held_out else "item")


def distance_rows(comparison: Record) -> tuple[list[dict[str, Any]], str]:
    """The metrics of a comparison as rows of a table with intervals and floors, and its caption."""
    rows = []
    for name, metric in comparison["metrics"].items():
        *value, low, high = metric["value"]
        digits = len(cell(tuple(value)).split(" ")[0].partition(".")[2])
        interval = f"{low:.{digits}f} to {high:.{digits}f}"
        row = {"metric": metric.get("title", name), "value": tuple(value), "95 %": interval}
        row |= {"floor": tuple(metric["floor"][:2]), "better": metric["better"], "n": metric["n"]}
        rows.append(row | {"features": metric["features"], "error by": metric["error"]})
    sampler = f", drawn by {comparison['sampler']}" if comparison.get("sampler") else ""
    return rows, f"Samples{sampler}, compared with {comparison['data']}: ± standard error, with 95 % interval"


def distances(comparison: Record) -> list[object]:
    """The table of metrics with intervals and floors."""
    rows, caption = distance_rows(comparison)
    lines = [line for line in comparison.get("explanations") or () if not line.startswith("memorization")]
    notes = [element("li", sentence(line)) for line in lines]
    return [table(rows, caption), *([element("ul", *notes, class_="notes")] if notes else [])]


def copies(comparison: Record) -> list[object]:
    """The test of whether samples copy training items, and the samples that are nearest to them."""
    parts: list[object] = []
    if test := comparison["copying"]:
        found = "Training items are copied" if test["significant"] else "No evidence that training items are copied"
        why = (
            f"{found}: of {test['training']:,} training and {test['held_out']:,} held-out items, the nearest one is a "
            f"training item for {test['share']:.1%} of the samples, and {test['expected']:.1%} are expected without "
            f"copying (p ≤ {test['p_value']:.1g}; tested at a false-alarm rate of {test['false_alarm_rate']:g})."
        )
        parts.append(paragraph(why, class_="bad" if test["significant"] else "good"))
    else:
        parts += [paragraph(sentence(line)) for line in comparison["explanations"] if line.startswith("memorization")]
    rows = [
        {"sample": f"{row['sample']:,}"}
        | {
            place: f"{name}, at {distance:.3g}"
            for place, name, distance in zip(PLACES, row["training"], row["distances"], strict=False)
        }
        for row in comparison.get("nearest") or ()
    ]
    features = comparison.get("features", "")
    if rows:
        parts.append(table(rows, f"The samples nearest to training items: item and distance, features {features}"))
    return parts


def sentence(line: str) -> str:
    """A line of a record as a sentence."""
    return minus(f"{line[:1].upper()}{line[1:]}.")


def setting(value: object) -> str:
    """A setting as a short text; empty for one that is not set."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        rest = dict(value)
        name = rest.pop("name", None) or rest.pop("kind", "")
        return f"{name} {', '.join(f'{key}={setting(one)}' for key, one in rest.items())}".strip()
    if isinstance(value, list | tuple):
        shown = ", ".join(setting(one) for one in value[:MAX_LISTED])
        return f"[{shown}{f', and {len(value) - MAX_LISTED} more' if len(value) > MAX_LISTED else ''}]"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def recipe_json(config: Mapping[str, Any]) -> str:
    """A recipe as JSON that ``--config`` reads: a line for each setting."""
    tables = []
    for name, settings in config.items():
        if isinstance(settings, Mapping):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items())
            tables.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            tables.append(f" {json.dumps(name)}: {json.dumps(settings)}")
    return "{\n" + ",\n".join(tables) + "\n}"

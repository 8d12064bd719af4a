"""``undiffuse doctor``: what this machine can do, and what is missing for which feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from undiffuse import __version__
from undiffuse.cli.options import Device, resolve_device
from undiffuse.cli.results import show, with_json

TIMED = {"digits": ((1, 8, 8), 17), "cpu-small": ((1, 28, 28), 256)}
"""The recipes whose step is timed: the shape of an item and its number of values."""


@with_json
def doctor(device: Device = "auto") -> None:
    """Describe this machine and installation.

    Prints versions, processor, GPU, precision, memory, speed, and missing packages.
    """
    import torch

    from undiffuse.model import presets
    from undiffuse.runtime import environment
    from undiffuse.runtime.precision import resolve_precision
    from undiffuse.training.step_time import seconds_per_step

    place = torch.device(resolve_device(device))
    precision = resolve_precision("auto", place)
    facts: dict[str, Any] = {"undiffuse": __version__, **environment.package_versions(), **environment.processor()}
    facts["GPU"] = "; ".join(environment.gpus()) or "none that torch finds"
    facts["device of training"] = f"{place}, precision {precision}"
    facts |= environment.memory(Path.cwd())
    step_seconds = {}
    for name, (item_shape, num_values) in TIMED.items():
        seconds = seconds_per_step(presets.get(name), item_shape, num_values, place)
        batch = presets.get(name).train.batch
        step_seconds[name] = seconds
        size = "×".join(map(str, item_shape))
        facts[f"a step of {name}"] = f"{seconds:.3f} s: {batch / seconds:,.0f} items of {size} a second"
    for feature in environment.FEATURES:
        missing = feature.missing
        remedy = f"missing: {', '.join(missing)}. Run: pip install 'undiffuse[{feature.extra}]'"
        facts[feature.name] = remedy if missing else "installed"
    rows = [{"": name, "here": value} for name, value in facts.items()]
    show(rows, "this machine", **facts, step_seconds=step_seconds, memory_bytes=environment.memory_bytes(Path.cwd()))

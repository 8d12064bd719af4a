"""How ``sample`` walks from noise to data: by a quality, by the advice for a number of calls, or by what is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from undiffuse import advise, solvers
from undiffuse.advise import Choice
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError

QUALITIES = {"draft": Choice("dpm++2m_sde", 10), "good": Choice("dpm++2m_sde", 25), "best": Choice("dpm++2m_sde", 100)}
"""Ever nearer to the law of the chain; docs/choosing.md says how near, and why the solver draws noise."""
OTHERS = 100
"""Steps of a solver that is asked for by name."""
ADVICE = "advice.json"


def choose(
    model: Diffusion,
    advised: Callable[[int], Choice | None],
    quality: str | None = None,
    calls: int | None = None,
    solver: str | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    spacing: str | None = None,
) -> Choice:
    """The walk that is asked for; ``advised`` is what was found to be best for so many calls, if anything was.

    ``steps`` are at most the chain's own. Raises `ConfigError`.
    """
    given = [flag for flag, value in (("--quality", quality), ("--calls", calls), ("--steps", steps)) if value]
    if len(given) > 1:
        raise ConfigError("USAGE", ", ".join(given), "each says how long the walk is", "Give one of them")
    if quality is not None and quality not in QUALITIES:
        raise ConfigError("QUALITY", f"--quality {quality}", "unknown", f"Use one of {', '.join(QUALITIES)}")
    named = QUALITIES[quality or "good"]
    if solver is not None:
        named = Choice(solver, OTHERS if quality is None else named.steps)
    named = replace(named, settings={**named.settings, **dict(map(_setting, settings))})
    named = replace(named, spacing=spacing or named.spacing, steps=min(steps or named.steps, model.steps))
    built = model.solver(named.solver, **named.settings)
    if calls is None:
        return named
    if isinstance(built, solvers.Adaptive):
        cause = f"{named.solver} takes as many calls as its tolerances ask for"
        raise ConfigError("CALLS", f"--calls {calls}", cause, "Give --steps and --set rtol=..., or another --solver")
    found = advised(calls) if (solver, spacing, *settings) == (None, None) else None
    if found := found or advise.most(named, model.schedule, calls):
        return found
    cause = f"a step of {named.solver} takes {built.calls}"
    raise ConfigError("CALLS", f"--calls {calls}", cause, "Give more calls, or another --solver")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ConfigError("USAGE", f"--set {text}", "no setting", "Write name=value, such as eta=0.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_advice(
    folder: Path, weights: str, calls: int, say: Callable[[str], None], asked: Mapping[str, Any] | None = None
) -> Choice | None:
    """The choice for ``calls`` in the folder's advice, if it is of these ``weights``; ``say`` is told if not.

    And where what the samples are ``asked`` to be (``label`` and what guides; None: nothing) is not what it is for.
    """
    path = folder / ADVICE
    try:
        told = json.loads(path.read_text())
        found = told["advice"].get(str(calls))
        if told["weights"] != weights:
            say(f"{path} is not used: the weights have changed since. Run advise again")
            return None
        if found is None:
            say(f"{path} says nothing of {calls} calls, but of {', '.join(told['advice'])}")
            return None
        times = found["times"] and tuple(map(float, found["times"]))
        if other := [name for name, value in (asked or {}).items() if value != found.get(name)]:
            made = f"label {', '.join(found['label'])}" if found.get("label") else "samples that are told nothing"
            say(f"{path} was measured for {made}, unguided: other {', '.join(other)} may want another walk")
        return Choice(found["solver"], int(found["steps"]), found["spacing"], found["settings"], times)
    except FileNotFoundError:
        say(f"no advice for this model yet: 'undiffuse advise RUN --calls {calls}' would measure what is best")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        say(f"{path} is not used: it is damaged")
    return None


def write_advice(folder: Path, weights: str, calls: int, choice: Choice, measured: dict[str, Any]) -> Path:
    """Adds the ``choice`` for so many ``calls`` to the folder's advice, which is begun anew for other ``weights``."""
    path = folder / ADVICE
    try:
        told = json.loads(path.read_text())
        known = dict(told["advice"]) if told["weights"] == weights else {}
    except (OSError, ValueError, LookupError, TypeError):
        known = {}
    known[str(calls)] = {**asdict(choice), **measured}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"weights": weights, "advice": known}, indent=1))
    partial.replace(path)
    return path


def unit(model: Diffusion) -> tuple[float, str]:
    """How many units of the data one of x is, and their name; for codecs of several scales the geometric mean."""
    levels = model.info.get("levels")
    if levels:
        return (levels - 1) / 2, "levels"
    return math.exp(-model.codec.log_abs_det(model.item_shape) / model.dims), "units of the data"

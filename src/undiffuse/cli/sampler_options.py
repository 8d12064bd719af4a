"""The `Sampler` of the ``sample`` command: from its options, or from the stored result of ``advise``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undiffuse.cli.options import as_argument, limit_steps, run_folder
from undiffuse.errors import CheckpointError, ConfigError, counted
from undiffuse.runtime.side_files import read_record, set_aside, write_record
from undiffuse.sampling.sampler import DEFAULT_NUM_STEPS, DEFAULT_SAMPLER, Sampler, guidance_changes

if TYPE_CHECKING:
    from undiffuse.model.cascade import AnyModel

QUALITIES = {
    "draft": Sampler("dpm++2m_sde", 10),
    "good": DEFAULT_SAMPLER,
    "best": Sampler("dpm++2m_sde", 100),
}
"""More steps come closer to the distribution of the whole chain; docs/choosing.md has the distances, and why the solver
draws noise."""
DEFAULT_QUALITY = "good"
ADVICE_FILE = "advice.json"
FLAG_OF_KIND = {"captions": "prompt", "vectors": "cond", "tokens": "cond"}
"""The option of ``sample`` for each kind of condition of the data that has more values than can be listed."""


def parse_sampler(
    quality: str | None = None,
    solver: str | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
    spacing: str | None = None,
    **guidance: Any,
) -> Sampler:
    """The sampler of the options; ``guidance`` are fields of `Sampler`. Raises `ConfigError`."""
    if quality is not None and quality not in QUALITIES:
        raise ConfigError("QUALITY", f"--quality {quality}", "unknown", f"Use one of {', '.join(QUALITIES)}")
    sampler = QUALITIES[quality or DEFAULT_QUALITY]
    if solver is not None:
        sampler = Sampler(solver, DEFAULT_NUM_STEPS if quality is None else sampler.num_steps)
    return replace(
        sampler,
        settings={**sampler.settings, **dict(map(parse_setting, settings))},
        num_steps=steps or sampler.num_steps,
        spacing=spacing or sampler.spacing,
        **guidance,
    )


@dataclass(frozen=True)
class SamplerOptions:
    """The options of ``sample`` that determine the sampler, None if not given; ``guidance`` are fields of `Sampler`."""

    quality: str | None
    calls: int | None
    solver: str | None
    settings: Sequence[str]
    steps: int | None
    spacing: str | None
    guidance: Mapping[str, Any]

    def choose(
        self, model: AnyModel, log: Callable[[str], None], advised: Callable[[Sampler, int], Sampler | None]
    ) -> Sampler:
        """The sampler for ``model``, of at most the steps of its chain. Raises `ConfigError` for a wrong setting.

        For ``calls`` it is the one that ``advised`` returns for the sampler of the other options and these calls, else
        that sampler in fewer steps. A distilled model has its own sampler unless other options than ``calls`` are
        given. ``log`` gets a line about steps that the chain does not have.
        """
        distilled = self._distilled_sampler(model, log)
        sampler = distilled or self._parse(model, log)
        sampler = replace(sampler, num_steps=min(sampler.num_steps or model.chain_length, model.chain_length))
        model.build_solver(sampler)  # raises before any work if a setting is wrong
        if self._few_call_solver(model) == "consistency" != sampler.solver:
            cause = f"a consistency model predicts a sample, and {sampler.solver} needs the mean of the data"
            log(f"note: {cause}. --calls K alone draws as the model was distilled")
        if self.calls is None or (distilled and self._few_call_solver(model) == "consistency"):
            return sampler
        return advised(sampler, self.calls) or (sampler if distilled else within_calls(model, sampler, self.calls))

    def _few_call_solver(self, model: AnyModel) -> str:
        """The solver of a distilled model, else ""."""
        from undiffuse.model.cascade import Cascade

        return "" if isinstance(model, Cascade) else model.config.few_call_solver

    def _distilled_sampler(self, model: AnyModel, log: Callable[[str], None]) -> Sampler | None:
        from undiffuse.model.cascade import Cascade
        from undiffuse.model.consistency import few_call_sampler

        if isinstance(model, Cascade) or not model.config.calls:
            return None
        if self.quality or self.solver or self.settings or self.steps or self.spacing:
            return None
        calls = limit_steps(self.calls or model.config.calls, model.chain_length, log, "calls")
        return replace(few_call_sampler(model.schedule, calls, model.config.few_call_solver), **self.guidance)

    def _parse(self, model: AnyModel, log: Callable[[str], None]) -> Sampler:
        steps = self.steps and limit_steps(self.steps, model.chain_length, log)
        return parse_sampler(self.quality, self.solver, self.settings, steps, self.spacing, **self.guidance)


def parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ConfigError("USAGE", f"--set {text}", "not a setting", "Write name=value, such as eta=0.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def check_one_length(quality: str | None, calls: int | None, steps: int | None) -> None:
    """Raises `ConfigError` if more than one of the options that determine the number of steps is given."""
    given = [flag for flag, value in (("--quality", quality), ("--calls", calls), ("--steps", steps)) if value]
    if len(given) > 1:
        raise ConfigError("USAGE", ", ".join(given), "each determines the number of steps", "Give one of them")


def within_calls(model: AnyModel, sampler: Sampler, calls: int) -> Sampler:
    """``sampler`` with as many steps as ``calls`` network calls allow. Raises `ConfigError` if not even one."""
    from undiffuse.sampling.sampler_search import fit_to_budget
    from undiffuse.sampling.solvers.adaptive import Adaptive

    solver = sampler.build_solver()
    if isinstance(solver, Adaptive):
        cause = f"the number of calls of {sampler.solver} depends on its tolerances"
        raise ConfigError("CALLS", f"--calls {calls}", cause, "Give --steps and --set rtol=..., or another --solver")
    if fitted := fit_to_budget(sampler, model.schedule, calls, max_steps=model.chain_length):
        return fitted
    cause = f"a step of {sampler.solver} takes {solver.calls}"
    raise ConfigError("CALLS", f"--calls {calls}", cause, "Give more calls, or another --solver")


def read_advice(
    run: Path,
    weights: str,
    calls: int,
    log: Callable[[str], None],
    sampler: Sampler | None = None,
    conditions: Mapping[str, Any] | None = None,
    network: str = "",
) -> Sampler | None:
    """The sampler advised for ``run`` and ``calls``, with the guidance of ``sampler``; None without advice.

    ``log`` gets a line if there is none for these ``weights``, and if the guidance or the ``conditions`` (option ->
    value, None if not given) differ from those of the measurement. ``network`` is an option of ``advise``.
    """
    path, sampler = run_folder(run) / ADVICE_FILE, sampler or Sampler()
    command = f"undiffuse advise {as_argument(run)} --calls {calls}{network}"
    none_yet = f"no advice for this model yet; to measure which sampler is best: {command}"
    if not path.exists():
        log(none_yet)
        return None
    try:
        stored: Any = read_record(path)
        of_model = stored["advice"].get(weights)
        if of_model is None:
            if stored["advice"].keys() <= _weights_in(path.parent):
                log(none_yet)
            else:
                log(f"{path} is not used: the weights have changed since. Run advise again")
            return None
        if (advice := of_model.get(str(calls))) is None:
            log(f"{path} has no advice for {counted(calls, 'call')}, only for {', '.join(of_model)}")
            return None
        advised = Sampler.from_dict(advice["sampler"])
        of_data = {flag for kind, flag in FLAG_OF_KIND.items() if kind in advice.get("conditions", "")}
        different = [
            f"--{name}"
            for name, value in (conditions or {}).items()
            if (not value if name in of_data else value != advice.get(name))
        ]
        different += ["--guidance"] if guidance_changes(sampler) else []
        if different:
            given = [f"{name} {', '.join(advice[name])}" for name in ("label", "prompt") if advice.get(name)]
            given = [f"the {advice['conditions']} of the data"] if of_data and not given else given
            measured = f"for {' and '.join(given)}" if given else "without labels"
            flags = ", ".join(different)
            log(f"{path} was measured {measured} and without guidance; with other {flags} the best sampler may differ")
        return replace(advised, **guidance_changes(sampler))
    except OSError as error:
        log(f"{path} is not used: it cannot be read ({error.strerror})")
    except (ConfigError, LookupError, TypeError, AttributeError):
        log(f"{path} is not used: it is damaged. Run advise again")
    return None


def write_advice(folder: Path, weights: str, calls: int, sampler: Sampler, measured: dict[str, Any]) -> Path:
    """Adds the ``sampler`` for ``calls`` to the folder's advice for ``weights``.

    Advice for weights of other model files in the folder stays, that for weights of no file is dropped. A file of its
    name that is damaged or not ours is renamed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ADVICE_FILE
    stored = read_record(path)
    if stored is None and path.exists():
        set_aside(path)
    kept = {weights, *_weights_in(folder)}
    advice = {key: of_model for key, of_model in (stored or {}).get("advice", {}).items() if key in kept}
    advice.setdefault(weights, {})[str(calls)] = {"sampler": sampler.to_dict(), **measured}
    write_record(path, {"advice": advice})
    return path


def _weights_in(folder: Path) -> set[str]:
    """The fingerprints of the model files in ``folder``."""
    from undiffuse.runtime.tensor_file import read_metadata

    found = set[str]()
    for path in filter(Path.is_file, folder.glob("*.safetensors")):
        with suppress(CheckpointError):
            found.add(read_metadata(path).get("sha256", ""))
    return found

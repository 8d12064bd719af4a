"""Estimates of −log p over a data set, by one process or several, in batches that can be kept on disk.

A batch is a function of the plan, the seed and its first item, whichever process computes it, and which batches count
is a function of the batches that are finished. So results are the same for any number of processes, also where that
number changes when an evaluation is resumed. A GPU with too little memory computes a batch in parts, which changes
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from undiffuse import __version__
from undiffuse.data.dataset import Dataset, describe_constant_channels
from undiffuse.data.transform import IntegerLevels, values_transform
from undiffuse.errors import ConfigError, DataError, UndiffuseError
from undiffuse.evaluation import batches, resumable, summary
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation.batches import FinishedBatch, ReadItems
from undiffuse.likelihood.nll import NLL, concatenate
from undiffuse.model.cascade import AnyModel, Cascade, weights_of
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.runtime.distributed_group import ProcessGroup, single_process
from undiffuse.runtime.part_store import Log, PartStore


class Progress(NamedTuple):
    """How far an evaluation is: the current ``estimate``, and in seconds what is ``spent``, in ``total`` and ``left``.

    ``spent`` and ``total`` add up all processes; ``left`` is by the clock.
    """

    estimate: str
    spent: float
    total: float
    left: float


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Estimates of −log p of items of a data set.

    ``nll`` and ``seconds`` (over all processes) have a row for each estimate. ``items`` are the indices of the items in
    the data set, in the order in which they were measured; an estimate may have fewer items than others, always the
    first ones. ``mc_samples`` are those of each estimate, None where all steps were computed, and for "ode" the
    importance samples. ``facts`` is plain data: data, fingerprint, part, condition, seed, digest (of the model),
    chain_length, version, options (of `evaluate`).
    """

    model: AnyModel
    facts: dict[str, Any]
    items: np.ndarray
    nll: dict[str, NLL] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    mc_samples: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def bits_per_dim(self, estimate: str) -> tuple[float, float]:
        """The mean over the items in bits per dimension and its standard error, NaN for a single item."""
        return summary.mean_bits(self.model, self.nll[estimate].total)

    def summary(self) -> dict[str, Any]:
        """All numbers as plain data: the facts, each estimate with its parts, paired differences, and bits by log-SNR.

        The bits of a bound are those between the rising edges of log-SNR, without its prior and decoder.
        """
        estimates = {
            name: summary.summarize(self.model, name, nll, self.seconds[name], self.mc_samples[name])
            for name, nll in self.nll.items()
        }
        curves = summary.bits_by_log_snr(self.model, self.nll) if isinstance(self.model, Diffusion) else {}
        plain = {name: {"edges": edges.tolist(), "bits": bits.tolist()} for name, (edges, bits) in curves.items()}
        return self.facts | {
            "estimates": estimates,
            "minus_discrete": summary.differences(self.model, self.nll),
            "bits_by_log_snr": plain,
        }

    def explanations(self) -> list[str]:
        """What the numbers mean, as sentences."""
        stages = ()
        if isinstance(self.model, Cascade):
            stages = [f"{name}: {summary.stage_lines(self.model, nll)}" for name, nll in self.nll.items()]
        meanings = summary.explanations(self.model, self.nll, self.mc_samples.get("ode") or 1)
        return [*self.notes, *stages, *meanings, *summary.few_call_error(self.model, self.nll)]


def evaluate(
    model: AnyModel,
    data: Dataset,
    *,
    part: str | None = None,
    estimates: Sequence[str] = (),
    items: int | None = None,
    mc_samples: int | None = None,
    exact: bool = False,
    iw_samples: int = 1,
    seed: int = 0,
    compat: str | None = None,
    minutes: float = 5.0,
    unconditional: bool = False,
    folder: Path | None = None,
    group: ProcessGroup | None = None,
    on_message: Log | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> EvaluationResult:
    """Estimates of −log p of the items of ``data``, a bound or the likelihood itself for each of ``estimates``.

    ``part`` is test, validation, train or all; ``estimates`` are some of discrete, continuous and ode, and flow_map of
    a distilled model with two times, by default all. What ``items``, ``mc_samples``, ``exact`` and ``iw_samples`` leave
    open is chosen so that everything takes about ``minutes``. A conditional model gets the condition that the data
    have. With ``unconditional``, or where the data have another condition, the result is −log p(x) without one.
    ``compat="openai"`` adds the bound as improved-diffusion's script computes it. Item i in `bit_reversed_order` has
    noise that depends on (seed, i) alone.

    With ``folder``, finished batches are written there, and an interrupted evaluation with the same arguments resumes
    from them on the same kind of device; `resumable.remove` deletes them. `resumable.locked` keeps other evaluations
    out of the folder; without it, one whose plan another has replaced raises `CheckpointError` at the end. The
    processes of a ``group`` call this together, with a ``folder`` in common, and share the batches; only the first
    process gets the estimates and calls ``on_message`` and ``on_progress``. An estimate that fails (for example where
    the ODE diverges) raises if it is named in ``estimates``; otherwise it is skipped with a message.

    Raises `ConfigError` for arguments that do not fit, `DataError` for data that do not fit the model.
    """
    group = group or single_process()
    folder = None if folder is None else Path(folder)
    if group.world_size > 1 and folder is None:
        raise ConfigError("FOLDER", "evaluate", "several processes need a folder in common", "Give folder")
    log: Log = on_message if on_message and group.rank == 0 else lambda message: None
    names = planning.check_request(model, data, estimates, iw_samples, compat, minutes, mc_samples)
    chosen, description = planning.select_items(model, data, part)
    if len(chosen) == 0:
        cause, fix = f"no items in this part ({description})", "Use --part all, or other data"
        if model.info.get("held_out") == 0 and data.fingerprint == model.info.get("fingerprint"):
            cause, fix = "nothing was held out when the model was trained", "Use --part train, or other data"
        raise DataError("EMPTY", data.name, cause, fix)
    chosen = chosen[planning.bit_reversed_order(len(chosen))][:items]
    condition, reason = ("none", None) if unconditional else planning.shared_condition(model, data)

    def read_items(here: slice) -> tuple[Tensor, Condition | None]:  # of a batch: all items may be too many
        return data.tensor(chosen[here]), data.given_condition(chosen[here], condition != "none")

    given = {"items": items, "mc_samples": mc_samples, "exact": exact, "iw_samples": iw_samples, "minutes": minutes}
    options = {"estimate": list(estimates), **given, "unconditional": unconditional, "compat": compat}
    facts = _facts(model, data, description, condition, seed)
    request = facts | {"device": model.device.type, "estimates": names} | given
    sizes = (items, mc_samples, exact, iw_samples, minutes * group.world_size)

    measured: dict[str, FinishedBatch] = {}

    def choose() -> resumable.Plan:
        planned, seconds = names, None
        if "ode" in names and items is None and not exact:  # its first batch measures its cost
            first = slice(min(planning.first_flow_items(model), len(chosen)))
            try:
                batch, _ = batches.measure(model, "ode", first, seed, iw_samples, read_items, log)
                measured[batches.batch_name("ode", 0)], seconds = batch, batch[1] / first.stop
            except UndiffuseError as error:
                _skip("ode", error, bool(estimates), log)
                planned = [name for name in names if name != "ode"]
        speed_items = read_items(slice(planning.SPEED_ITEMS))
        plan = planning.plan_evaluation(model, len(chosen), *speed_items, planned, *sizes, seconds)
        for line in planning.slow_starts(plan):
            log(line)
        return plan

    plan, store = choose() if folder is None else {}, None
    if folder is not None:
        failure = None
        try:
            if group.rank == 0:
                plan, store = resumable.open_plan(folder, request, choose, log)
        except UndiffuseError as error:
            failure = error
        batches.raise_in_all(failure, group)
        plan, key = group.gather([plan, store and store.key])[0]
        store = resumable.batch_store(folder, key)
        for batch, finished in measured.items():
            resumable.write(store, batch, *finished)
    computed = _compute(
        model,
        plan,
        seed,
        store,
        measured,
        group,
        bool(estimates),
        read_items,
        log,
        on_progress or (lambda progress: None),
    )
    if store is not None and group.rank == 0:
        resumable.check_plan(store.folder, store.key)
    return EvaluationResult(
        model,
        facts | {"options": options},
        chosen,
        {name: nll for name, (nll, _) in computed.items()},
        {name: seconds for name, (_, seconds) in computed.items()},
        {name: plan[name]["mc_samples"] for name in computed},
        tuple(note for note in (reason, density_warning(model, data)) if note),
    )


def _facts(model: AnyModel, data: Dataset, part: str, condition: str, seed: int) -> dict[str, Any]:
    """The `EvaluationResult.facts` of the ``part`` of ``data`` that is measured with a ``condition`` or "none"."""
    has_image = isinstance(model, Diffusion) and "image" in model.condition_sizes
    words = [*([condition] * (condition != "none")), *(["the low resolution"] * has_image)]
    return {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "part": part,
        "condition": " and ".join(words) or "none",
        "seed": seed,
        "precision": model.precision,
        "digest": weights_of(model),
        "chain_length": model.chain_length,
        "version": __version__,
    }


def density_warning(model: AnyModel, data: Dataset) -> str | None:
    """A sentence if ``data`` have constant channels of which ``model`` gives a density, else None.

    A model that learns the value puts a Gaussian of ever smaller variance v around it, whose −log p at the value,
    ½ log 2πv, has no lower bound.
    """
    constant = describe_constant_channels(data)
    if not constant or len(data) == 1 or isinstance(values_transform(model.transform), IntegerLevels):
        return None
    shares = f"{len(data.constant_channels)} of {data.item_shape[0]} channels"
    return (
        f"channel {constant} ({shares}) has the same value in all items, so its density has no upper bound: these "
        "numbers fall as the noise of the cleanest level falls, regardless of the other channels. Leave constant "
        "channels out"
    )


def _compute(
    model: AnyModel,
    plan: resumable.Plan,
    seed: int,
    store: PartStore | None,
    measured: Mapping[str, FinishedBatch],
    group: ProcessGroup,
    strict: bool,
    read_items: ReadItems,
    log: Log,
    on_progress: Callable[[Progress], None],
) -> dict[str, FinishedBatch]:
    """Each estimate of ``plan`` and its seconds, in the first process; an empty dict in the others.

    A batch is read from ``store``, or ``measured`` without one, if it is there, otherwise one process computes it from
    the values and conditions of ``read_items`` and writes it. If an estimate fails, raise when ``strict``, or if its
    data cannot be read, otherwise log a line and go on.
    """
    computed: dict[str, FinishedBatch] = {}
    sizes: dict[str, Any] = {name: job["batch"] for name, job in plan.items()}  # halved if GPU memory is short
    later = sum(job["expected"] for job in plan.values())
    for name, job in plan.items():
        later -= job["expected"]
        before = sum(seconds for _, seconds in computed.values())

        def update(spent: float, left: float, name: str = name, before: float = before, later: float = later) -> None:
            if group.rank == 0:
                total, by_clock = before + spent + left + later, (left + later) / group.world_size
                on_progress(Progress(name, before + spent, total, by_clock))

        def read(start: int, name: str = name) -> FinishedBatch | None:
            batch = batches.batch_name(name, start)
            return measured.get(batch) if store is None else resumable.read(store, batch, log)

        def compute(start: int, stop: int, name: str = name, job: dict[str, Any] = job) -> FinishedBatch:
            here, mc_samples = slice(start, stop), job["mc_samples"]
            done, sizes[name] = batches.measure(model, name, here, seed, mc_samples, read_items, log, sizes[name])
            if store is not None:
                resumable.write(store, batches.batch_name(name, start), *done)
            return done

        try:
            finished = batches.compute_batches(job, read, compute, group, update)
        except UndiffuseError as error:
            _skip(name, error, strict, log)
            continue
        if group.rank == 0:
            computed[name] = concatenate([nll for nll, _ in finished]), sum(seconds for _, seconds in finished)
    return computed


def _skip(name: str, error: UndiffuseError, strict: bool, log: Log) -> None:
    """Log that an estimate failed; raise when ``strict``, for the first bound, and where data cannot be read."""
    if strict or name == "discrete" or isinstance(error, DataError):
        raise error
    log(f"{summary.NAMES[name]} ({name}) is skipped: {error.where}: {error.cause}")

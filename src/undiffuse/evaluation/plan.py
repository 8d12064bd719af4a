"""What an evaluation measures: which items, how many of them, and with how many Monte Carlo samples in a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

import numpy as np
import torch

from undiffuse.data.dataset import Dataset
from undiffuse.data.transform import is_latent
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.evaluation.batches import MIN_FLOW_ITEMS
from undiffuse.evaluation.resumable import Plan
from undiffuse.evaluation.summary import NAMES, flow_map_calls
from undiffuse.model.cascade import AnyModel, Cascade
from undiffuse.model.text_conditions import encoder_identity
from undiffuse.networks.condition import CONDITION_NAMES, Condition

TIME_SHARES = {"discrete": 5, "openai": 5, "continuous": 4, "ode": 4, "flow_map": 4}
"""The order of the estimates, and the shares in which they divide the time."""
DEFAULT_ESTIMATES = ("discrete", "continuous", "ode")
MAX_MINUTES = 1e9
"""Longer times are planned like this one, whose numbers of calls do not overflow."""
PLANNED_FRACTION = 0.85
"""The fraction of the time that is planned; loading, the measurement of speed and figures take the rest."""
MIN_ITEMS = 16
"""Fewest items of a whole chain and fewest Monte Carlo samples of a bound, at any speed; of the flow, if they fit."""
SPEED_ITEMS = 64
"""Items that the speed is measured with."""
MAX_POINTS = 256
"""Most points of log-SNR of the continuous bound that are chosen automatically."""
ODE_COST_GUESS = 400
"""Network calls that take as long as an item of the flow with its divergence, where its time is not limited."""
PARTS = {"test": "held out for testing", "validation": "held out for validation", "train": "trained on"}
"""Parts of a data set and their descriptions."""
CHANGED = " of data with the name, but not the content, of the training data"
"""Describes data that may be the training data, changed since."""


def select_items(model: AnyModel, data: Dataset, part: str | None) -> tuple[np.ndarray, str]:
    """The indices of a part and its description; by default the test part of the data of training, else all items.

    Data that may be the training data count as such, see `Dataset.may_be_of`.
    """
    own = data.fingerprint == model.info.get("fingerprint")
    changed = not own and data.may_be_of(model.info)
    part = part or ("test" if own or changed else "all")
    if part == "all":
        return np.arange(len(data)), f"all{', including training items' if own else CHANGED if changed else ''}"
    if part not in PARTS:
        raise ConfigError("PART", f"--part {part}", "no such part", "Use test, validation, train or all")
    items = getattr(data.split(float(model.info.get("held_out", 0.1))), part)
    if own:
        return items, PARTS[part]
    return items, f"{part} part{CHANGED if changed else ' of other data than the training data'}"


def shared_condition(model: AnyModel, data: Dataset) -> tuple[str, str | None]:
    """The condition that ``model`` accepts and ``data`` have, or "none"; and the reason where they differ.

    The image of a super-resolution model is none of these: it is always given.
    """
    if not (accepted := model.trained_condition_sizes):
        return "none", None

    def in_words(names: Collection[str]) -> str:
        words = " and ".join(CONDITION_NAMES[name] for name in names)
        return "captions" if model.info.get("text_encoder") and "classes" not in names else words

    encoder = encoder_identity(model.info.get("text_encoder"))
    if data.embeddings is not None and encoder_identity(data.embeddings.encoder) != encoder:
        return "none", "the captions of these data were embedded by another text encoder: no condition is used"
    sizes = {name: size for name, size in data.condition_sizes.items() if name != "image"}
    own = data.fingerprint == model.info.get("fingerprint")  # training gave null for a condition that they lack
    fits = bool(sizes) and (sizes.keys() <= accepted.keys() if own else sizes.keys() == accepted.keys())
    fits = fits and all(size <= accepted[name] for name, size in sizes.items())
    fits = fits and all(size == accepted[name] for name, size in sizes.items() if name != "text")
    if fits and list(data.classes) == list(model.info.get("classes", [])):
        return in_words(sizes), None
    cause = f"the model accepts {in_words(accepted)}, which these data lack or define differently"
    return "none", f"{cause}: no condition is used"


def bit_reversed_order(n: int) -> np.ndarray:
    """0 to n − 1 sorted by their reversed binary digits: for every k the first k are spread evenly over all."""
    bits = max(n - 1, 1).bit_length()
    reversed_bits = np.zeros(1 << bits, np.int64)
    for bit in range(bits):
        reversed_bits |= (np.arange(1 << bits) >> bit & 1) << (bits - 1 - bit)
    return reversed_bits[reversed_bits < n]


def plan_evaluation(
    model: AnyModel,
    num_items: int,
    values: torch.Tensor,
    cond: Condition | None,
    names: Sequence[str],
    items: int | None,
    mc_samples: int | None,
    exact: bool,
    iw_samples: int,
    minutes: float,
    flow_seconds: float | None = None,
) -> Plan:
    """For each estimate a job: items, mc_samples (None: every step), first, batch, expected (seconds), fit, fewest.

    Sizes that are not given are chosen so that at most ``num_items`` fit into ``minutes`` of one process on this
    machine, by a short measurement of its speed with the ``values`` and conditions ``cond`` of `SPEED_ITEMS` items.
    Where "fit" is true, "items" is only an upper limit: while the job runs, the pace of its batches decides how many
    fit into the expected seconds.
    "mc_samples" of the flow is ``iw_samples``; the map of few calls has none. "first" and "batch" are the items of the
    first and the largest batch, see `batches.batch_stops`; "fewest" are [items, seconds] of what always counts.
    ``flow_seconds`` are those of an item of the flow, from its first batch; None: `ODE_COST_GUESS`.
    """
    rate = calls_per_second(model, values, cond)
    if flow_seconds is None:
        flow_seconds = ODE_COST_GUESS * iw_samples / rate
    total = PLANNED_FRACTION * 60 * min(minutes, MAX_MINUTES)
    seconds = {n: total * TIME_SHARES[n] / sum(TIME_SHARES[n] for n in names) for n in names}
    if len(names) > 1 and "ode" in names:  # its first items may take longer than its share
        flow = min(total / 2, max(seconds["ode"], MIN_ITEMS * flow_seconds))
        seconds = {n: s * (total - flow) / (total - seconds["ode"]) for n, s in seconds.items()} | {"ode": flow}
    calls = {n: max(1, int(rate * s)) for n, s in seconds.items()}
    fixed_items = items is not None or exact
    bounds = [n for n in names if n == "continuous" or (n == "discrete" and "openai" not in names)]

    bound_items = num_items
    if bounds and not fixed_items and mc_samples is None:
        bound_items = min(bound_items, max(64, min(calls[n] for n in bounds) // MIN_ITEMS))
    chain_items = num_items
    if "openai" in names and not fixed_items:
        chain_items = min(chain_items, max(MIN_ITEMS, min(calls["discrete"], calls["openai"]) // model.chain_length))

    plan: Plan = {}
    for name in names:
        n, each, fit = bound_items, None, False
        if name in ("ode", "flow_map"):
            n, each, fit = num_items, iw_samples if name == "ode" else None, not fixed_items
        elif name not in bounds:
            n = chain_items
        elif exact:
            each = None if name == "discrete" else model.chain_length
        else:
            most = model.chain_length if name == "discrete" else MAX_POINTS
            each = mc_samples or max(MIN_ITEMS, min(most, calls[name] // n))
            fit = not fixed_items
        if name == "discrete" and each is not None and each >= model.chain_length:
            each = None
        few_calls = flow_map_calls(model) if name == "flow_map" else 0
        cost = flow_seconds if name == "ode" else (few_calls or each or model.chain_length) / rate
        batch = batch_size(model, name == "ode" or few_calls > 0 or (each or model.chain_length) > 128)
        first = first_flow_items(model) if name == "ode" and fit else batch
        fewest = min(max(first, MIN_FLOW_ITEMS), n)
        plan[name] = {"items": n, "mc_samples": each, "first": first, "batch": batch, "fit": fit}
        plan[name] |= {"expected": seconds[name] if fit else n * cost, "fewest": [fewest, fewest * cost]}
    return plan


def slow_starts(plan: Plan) -> list[str]:
    """A line for each estimate whose fewest items take much longer than the estimate may."""
    lines = []
    for name, job in plan.items():
        items, seconds = job["fewest"]
        if job["fit"] and seconds > max(2 * job["expected"], job["expected"] + 60):
            others = "".join(f" --estimate {other}" for other in plan if other not in (name, "openai"))
            lines.append(
                f"{NAMES[name]} ({name}): {items} items, the fewest that are measured, take about "
                f"{counted(math.ceil(seconds / 60), 'minute')}, longer than --minutes allows"
                + (f"; 'undiffuse evaluate' with{others} leaves it out" if others else "")
            )
    return lines


def first_flow_items(model: AnyModel) -> int:
    """Items of the flow's first batch, few where each may take a minute. It depends on no clock."""
    return 16 if model.device.type == "cuda" else max(1, batch_size(model, True) // 64)


def calls_per_second(model: AnyModel, values: torch.Tensor, cond: Condition | None) -> float:
    """Network calls for single items per second, measured; of a cascade, calls of all stages together."""
    model.nll(values, mc_samples=2, cond=cond)
    start = time.perf_counter()
    calls = model.nll(values, mc_samples=4, cond=cond).calls
    stages = len(model.models) if isinstance(model, Cascade) else 1
    return calls / stages * len(values) / (time.perf_counter() - start)


def batch_size(model: AnyModel, slow: bool) -> int:
    """Items in a batch: few where each is ``slow``, so that an interruption loses little. It depends on no clock."""
    return (16 if slow else 64) * (16 if model.dims <= 256 or model.device.type == "cuda" else 1)


def check_request(
    model: AnyModel,
    data: Dataset,
    estimates: Sequence[str],
    iw_samples: int,
    compat: str | None,
    minutes: float,
    mc_samples: int | None = None,
) -> list[str]:
    """The names of the estimates to compute, in order. Raises `DataError` and `ConfigError` before any computation."""
    check_data(model, data)
    few_calls = ("flow_map",) if flow_map_calls(model) else ()
    known = (*DEFAULT_ESTIMATES, *few_calls)
    for name in estimates:
        if name not in known:
            cause = "the model is not a flow map trained --both-ways" if name == "flow_map" else "no such estimate"
            raise ConfigError("ESTIMATE", f"--estimate {name}", cause, f"Use one of {', '.join(known)}")
    if compat not in (None, "openai"):
        raise ConfigError("COMPAT", f"--compat {compat}", "no such script", "Use openai, or leave it out")
    if compat and (data.num_values != 256 or is_latent(model.transform)):
        cause = "the script handles images of 256 grey levels only, not latents"
        raise ConfigError("COMPAT", f"--compat {compat}", cause, "Leave it out")
    if iw_samples > 1 and data.num_values is None and not is_latent(model.transform):
        cause = "the likelihood of continuous data by the flow has no importance samples"
        raise ConfigError("IW_SAMPLES", f"--iw-samples {iw_samples}", cause, "Leave it out")
    if not 0 < minutes < math.inf:
        raise ConfigError("MINUTES", f"--minutes {minutes:g}", "not a duration", "Give a number above 0")
    wanted = {*(estimates or known), *(("discrete", "openai") if compat else ())}
    for flag, given, in_use in (
        ("--iw-samples", iw_samples > 1, {"ode"}),
        ("--mc-samples", mc_samples is not None, {"continuous"} if compat else {"continuous", "discrete"}),
    ):
        if given and not wanted & in_use:
            cause = f"none of the estimates {', '.join(sorted(wanted))} uses it"
            raise ConfigError("USAGE", flag, cause, "Leave it out")
    return sorted(wanted, key=list(TIME_SHARES).index)


def check_data(model: AnyModel, data: Dataset) -> None:
    """Raise `DataError` unless the items of ``data`` have the shape and the number of values of those of ``model``."""
    num_values = model.info.get("num_values")
    if data.item_shape != model.item_shape or data.num_values != num_values:
        theirs, ours = describe_items(data.item_shape, data.num_values), describe_items(model.item_shape, num_values)
        cause = f"its items are {theirs}, those of the model {ours}"
        raise DataError("SHAPE", data.name, cause, "Give data of the kind that the model was trained on")


def describe_items(shape: Sequence[int], num_values: int | None) -> str:
    """An item's shape and kind of values, such as 1×28×28 with 256 possible values."""
    kind = "continuous" if num_values is None else f"{num_values} possible"
    return f"{describe_shape(shape)} with {kind} values"


def describe_shape(shape: Sequence[int]) -> str:
    """The shape of an item, such as 1×28×28, or 2 columns of a vector."""
    return counted(shape[0], "column") if len(shape) == 1 else "×".join(map(str, shape))

"""An array in memory as a data set: what its type and shape mean, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from undiffuse.data.dataset import Dataset, chunks
from undiffuse.data.problems import Refused
from undiffuse.data.rows import Rows, as_array
from undiffuse.errors import ConfigError

Arrays = Mapping[str, np.ndarray | None]
"""What stands beside the values, by role: labels, cond, mask."""

Range = tuple[float, float]

COPIED = 1 << 28
"""Bytes up to which values on disk that have to be converted are, once and in memory; others as they are read."""

LAYOUTS = ("ND", "NHW", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC")


def from_array(
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    cond: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    name: str = "array",
    layout: str | None = None,
    levels: int | None = None,
    value_range: Range | None = None,
) -> Dataset:
    """``values`` as a data set, checked.

    Integers have levels: 2 for bool, 256 for uint8, 65536 for uint16, else the largest value + 1, unless
    ``levels`` says how many. Floats are continuous and become float32; ``value_range`` (low, high) is where they are
    meant to lie, and samples then do. ``layout`` is one of LAYOUTS; without
    it two dimensions are ND, three of uint8, uint16 or bool NHW, four NCHW, five NCDHW. ``cond`` are vectors (N, D)
    or sequences of tokens (N, L, D), of which those count that ``mask`` (N, L) says, or all. DataError with code
    DTYPE, RANGE, NON_FINITE, SHAPE, LABELS or CONDITION; ConfigError for an unknown layout, number of levels or range.
    """
    check_options(layout, levels, value_range)
    beside = {"labels": labels, "cond": cond, "mask": mask}
    try:
        return dataset_from(name, np.asarray(values), beside, layout, levels, [], value_range)
    except Refused as refused:
        raise refused.at(name) from None


def check_options(layout: str | None, levels: int | None, value_range: Range | None = None) -> None:
    """Raise ConfigError for an unknown layout or number of levels, and for a range that is none."""
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError("OPTION", "layout", f"{layout!r} is unknown", f"Give one of {', '.join(LAYOUTS)}")
    if levels is not None and (type(levels) is not int or not 2 <= levels <= 65536):
        raise ConfigError("OPTION", "levels", f"{levels!r} is no number of levels", "Give a number from 2 to 65536")
    if value_range is not None and not -math.inf < value_range[0] < value_range[1] < math.inf:
        low, high = value_range
        raise ConfigError("OPTION", "value_range", f"{low:g} to {high:g} is no range", "Give two rising finite numbers")


def dataset_from(
    name: str,
    values: np.ndarray,
    beside: Arrays,
    layout: str | None,
    levels: int | None,
    notes: list[str],
    value_range: Range | None = None,
) -> Dataset:
    """``from_array`` after ``check_options``, with Refused in place of DataError and ``notes`` to begin with."""
    labels, cond, mask = (beside.get(role) for role in ("labels", "cond", "mask"))
    values = _channels_first(values, layout, notes)
    if values.dtype.kind in "biu":
        if value_range is not None:
            fix = "Leave the range out, or save them as floats"
            raise Refused("DTYPE", f"{values.dtype} values have levels, not a range", fix)
        values, levels = _whole(values, levels, notes)
    elif values.dtype.kind == "f" and values.dtype.itemsize <= 8:
        if levels is not None:
            raise Refused("DTYPE", f"{values.dtype} values have no levels", "Save whole numbers as integers")
        values = _continuous(values, notes, value_range)
    else:
        raise Refused("DTYPE", f"values of type {values.dtype} are not taken")
    labels, classes = _labels(labels, len(values)) if labels is not None else (None, ())
    if cond is not None:
        cond, mask = conditions(cond, mask, len(values))
    elif mask is not None:
        raise Refused("CONDITION", "a mask is given, but no tokens that it could be of")
    return Dataset(name, values, levels, labels, classes, tuple(notes), cond=cond, mask=mask, value_range=value_range)


def conditions(cond: np.ndarray, mask: np.ndarray | None, count: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(N, D) float32 vectors, or (N, L, D) tokens with their mask (N, L) bool; Refused unless there are ``count``."""
    cond = np.asarray(cond)
    if cond.dtype.kind not in "biuf" or cond.dtype.itemsize > 8:
        raise Refused("CONDITION", f"they are {cond.dtype}, not numbers")
    if cond.ndim not in (2, 3) or not cond.size or (count is not None and len(cond) != count):
        there = "" if count is None else f", for {count} items"
        raise Refused("CONDITION", f"their shape is {cond.shape}{there}")
    with np.errstate(over="ignore"):
        cond = _packed(cond, np.dtype(np.float32))
    if len(bad := np.argwhere(~np.isfinite(cond))):
        raise Refused("CONDITION", f"the value at {tuple(map(int, bad[0]))} is {cond[tuple(bad[0])]} (in float32)")
    if cond.ndim == 2 and mask is not None:
        raise Refused("CONDITION", "a mask is of tokens (N, L, D), and these are vectors (N, D)")
    if cond.ndim == 3:
        mask = np.ones(cond.shape[:2], bool) if mask is None else np.asarray(mask)
        if mask.shape != cond.shape[:2] or mask.dtype != bool:
            raise Refused("CONDITION", f"the mask is {mask.dtype} {mask.shape}, not bool {cond.shape[:2]}")
    return cond, mask


def _channels_first(values: np.ndarray, layout: str | None, notes: list[str]) -> np.ndarray:
    """(N, D) or (N, C, *size), a view; notes what was moved or added."""
    shape = "x".join(map(str, values.shape))
    if layout is None:
        small = values.dtype.kind == "b" or values.dtype.name in ("uint8", "uint16")
        layout = {2: "ND", 3: "NHW" if small else None, 4: "NCHW", 5: "NCDHW"}.get(values.ndim)
        if values.ndim == 3 and layout is None:
            fix = "Give layout NHW (grey images), NCL or NLC (sequences)"
            raise Refused("SHAPE", f"{shape} could be images without channels or sequences with them", fix)
        if values.ndim == 4 and values.shape[3] <= 4 < values.shape[1]:
            fix = "Give layout NHWC (or NCHW if it is that)"
            raise Refused("SHAPE", f"{shape} looks like NHWC, channels last", fix)
    if layout is None or len(layout) != values.ndim:
        raise Refused("SHAPE", f"{shape} has {values.ndim} dimensions" + (f", {layout} not" if layout else ""))
    if not values.size:
        raise Refused("SHAPE", f"{shape} holds no values", "Give at least one item")
    if layout.endswith("C"):
        notes.append("channels moved from last to first")
        return _changed(values, lambda items: np.moveaxis(items, -1, 1))
    if layout == "NHW":
        notes.append("one channel added")
        return _changed(values, lambda items: items[:, None])
    return values


def _changed(values: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return as_array(values.then(change)) if isinstance(values, Rows) else change(values)


def _whole(values: np.ndarray, levels: int | None, notes: list[str]) -> tuple[np.ndarray, int]:
    """(values as uint8 or uint16, levels)."""
    most = {"bool": 2, "uint8": 256, "uint16": 65536}.get(values.dtype.name)
    if most is None or levels not in (None, most):
        ends = [(int(chunk.min()), int(chunk.max())) for chunk in chunks(values)]
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        seen = f"values run from {low} to {high}"
        if levels is None:
            levels = high + 1
            notes.append(f"{seen}: {levels} levels")
        if low < 0 or high >= levels or not 2 <= levels <= 65536:
            raise Refused("RANGE", f"{seen}; whole numbers must lie in 0 .. levels - 1, with 2 to 65536 levels")
    levels = levels or most
    assert levels is not None
    packed = np.dtype(np.uint8 if levels <= 256 else np.uint16)
    if values.dtype.newbyteorder("=") != packed:
        notes.append(f"stored as {packed}, from {values.dtype.name}")
    return _packed(values, packed), levels


def _continuous(values: np.ndarray, notes: list[str], value_range: Range | None) -> np.ndarray:
    """Finite float32 values, in ``value_range``."""
    whole, start, low, high = True, 0, math.inf, -math.inf
    if values.dtype.itemsize != 4:
        notes.append(
            f"stored as float32, {'rounded' if values.dtype.itemsize == 8 else 'exactly'}, from {values.dtype.name}"
        )
    with np.errstate(over="ignore"):
        values = _packed(values, np.dtype(np.float32))
    for chunk in chunks(values):
        if len(bad := np.argwhere(~np.isfinite(chunk))):
            index = (start + int(bad[0, 0]), *map(int, bad[0, 1:]))
            raise Refused("NON_FINITE", f"the value at {index} is {chunk[tuple(bad[0])]} (in float32, channels first)")
        start += len(chunk)
        whole = whole and bool((chunk == np.rint(chunk)).all())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if value_range is not None and not (np.float32(value_range[0]) <= low and high <= np.float32(value_range[1])):
        said = "{:g} to {:g}".format(*value_range)
        fix = "Give a range that holds them all, or none"
        raise Refused("RANGE", f"values run from {low:g} to {high:g}, outside of the range {said} that was given", fix)
    if whole:
        notes.append(
            f"all values are whole numbers from {low:g} to {high:g}, taken as continuous because stored as floats"
        )
    return values


def _packed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-contiguous and of ``dtype``: copied only if it is not so already, and converted bit by bit if it is large."""
    rows = isinstance(values, Rows)
    if values.dtype == dtype and (rows or values.flags.c_contiguous):
        return values
    if values.nbytes > COPIED and (rows or _on_disk(values)):
        return as_array(Rows(values.shape, dtype, values.__getitem__, beside=True))
    return np.ascontiguousarray(values, dtype)


def _on_disk(values: np.ndarray) -> bool:
    base: object = values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def _labels(labels: np.ndarray, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 labels and the numbers as names; Refused unless they are 0 .. K − 1 without a gap."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        hint = "; it looks like one-hot, take its argmax" if labels.ndim == 2 and len(labels) == count else ""
        raise Refused("LABELS", f"their shape is {labels.shape}, for {count} items{hint}")
    if labels.dtype.kind not in "biu":
        first = ", ".join(map(str, labels[:5].tolist()))
        raise Refused("LABELS", f"they are {labels.dtype}, not whole numbers: {first}, ...")
    if len(bad := np.flatnonzero(labels < 0)):
        raise Refused("LABELS", f"{len(bad)} are negative, first at {', '.join(map(str, bad[:5]))}")
    used = np.unique(labels)
    if int(used[-1]) != len(used) - 1:
        free = np.setdiff1d(np.arange(len(used) + 6), used)
        first = ", ".join(map(str, free[free < used[-1]][:5]))
        more = ", ... have" if used[-1] >= len(used) + 5 else " have" if "," in first else " has"
        raise Refused("LABELS", f"they go up to {used[-1]}, but {first}{more} no item")
    return labels.astype(np.int64), tuple(str(k) for k in range(len(used)))

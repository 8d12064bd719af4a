"""`from_array`: an array in memory as a `Dataset`, after its dtype, shape and values are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from undiffuse.data.dataset import Dataset, chunks
from undiffuse.data.lazy_array import LazyArray, cast_to_array
from undiffuse.errors import ConfigError, counted
from undiffuse.runtime.file_errors import FileError, file_errors_at

SideArrays = Mapping[str, np.ndarray | None]
"""Arrays that accompany the values: labels, cond, mask."""

ValueRange = tuple[float, float]

MAX_CONVERTED_BYTES = 1 << 28
"""Values on disk that need another dtype are converted once in memory up to this size, and at each access above it."""

LAYOUTS = ("ND", "NHW", "NCL", "NLC", "NCHW", "NHWC", "NDHW", "NCDHW", "NDHWC")
CHANNELS_FIRST = {2: "ND", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
"""The layouts of `Dataset.values`, by their number of dimensions."""
MAX_CHANNELS = 4
"""With more channels than this, an array could as well be one of volumes, or one with channels last."""


def from_array(
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    cond: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    name: str = "array",
    layout: str | None = None,
    num_values: int | None = None,
    value_range: ValueRange | None = None,
) -> Dataset:
    """``values`` as a data set.

    - ``values``: (N, D) vectors, (N, C, *size) images, series or volumes, or as ``layout`` says: integers (bool
      included) or floats, which are continuous data and become float32
    - ``labels``: (N,) integers 0 .. K − 1, each of which occurs
    - ``cond``, ``mask``: vectors (N, D), or tokens (N, L, D) with a bool mask (N, L) of those that count; all without
    - ``layout``: one of LAYOUTS. Without it two dimensions are ND, three are NHW for uint8, uint16 and bool, four are
      NCHW and five NCDHW where they have at most MAX_CHANNELS channels
    - ``num_values``: of integers; without it 2 for bool, 256 for uint8, 65536 for uint16, otherwise the maximum + 1
    - ``value_range``: (low, high) of floats; samples then lie in it too

    Raises `DataError` (DTYPE, RANGE, NON_FINITE, SHAPE, LABELS, CONDITION) for the arrays, `ConfigError` for an invalid
    layout, num_values or value_range.
    """
    check_options(layout, num_values, value_range)
    with file_errors_at(name):
        side_arrays = {"labels": _as_array(labels), "cond": _as_array(cond), "mask": _as_array(mask)}
        return build_dataset(name, _as_array(values), side_arrays, layout, num_values, [], value_range)


def _as_array(values: Any) -> Any:
    """``values`` as an array, a tensor without its gradient; None as it is. Raises `FileError`."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    if np.ma.is_masked(values):
        raise FileError("DTYPE", "some values are masked", "Fill them, or remove their items")
    try:
        return None if values is None else np.asarray(values)
    except ValueError as error:
        raise FileError("SHAPE", f"it cannot become an array ({error})", "Give items of equal shapes") from None


def check_options(layout: str | None, num_values: int | None, value_range: ValueRange | None = None) -> None:
    """Raise `ConfigError` for an unknown layout and for an invalid num_values or value_range."""
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError("OPTION", "layout", f"{layout!r} is unknown", f"Give one of {', '.join(LAYOUTS)}")
    if num_values is not None and (type(num_values) is not int or not 2 <= num_values <= 65536):
        cause = f"{num_values!r} is not an integer from 2 to 65536"
        raise ConfigError("OPTION", "num_values", cause, "Give the number of values of the data")
    if value_range is None:
        return
    try:
        is_range = -math.inf < float(value_range[0]) < float(value_range[1]) < math.inf
    except OverflowError:  # an integer
        is_range = False
    if not is_range:
        cause = "{} to {} is not a range".format(*value_range)[:200]
        raise ConfigError("OPTION", "value_range", cause, "Give two finite numbers, the smaller first")


def build_dataset(
    name: str,
    values: np.ndarray,
    side_arrays: SideArrays,
    layout: str | None,
    num_values: int | None,
    notes: list[str],
    value_range: ValueRange | None = None,
) -> Dataset:
    """`from_array` after `check_options`: raises `FileError`, and adds to ``notes``."""
    labels, cond, mask = (side_arrays.get(role) for role in ("labels", "cond", "mask"))
    values = _channels_first(values, layout, notes)
    if values.dtype.kind in "biu":
        if value_range is not None:
            fix = "Leave the range out, or save the values as floats"
            raise FileError("DTYPE", f"{values.dtype} values are integers and have no range", fix)
        values, num_values = _integers(values, num_values, notes)
    elif values.dtype.kind == "f" and values.dtype.itemsize <= 8:
        if num_values is not None:
            raise FileError("DTYPE", f"num_values is for integers, not {values.dtype}", "Save the values as integers")
        values = _floats(values, notes, value_range)
    else:
        raise FileError("DTYPE", f"values of dtype {values.dtype} are not supported")
    labels, classes = _labels(labels, len(values)) if labels is not None else (None, ())
    if cond is not None:
        cond, mask = conditions(cond, mask, len(values))
    elif mask is not None:
        raise FileError("CONDITION", "a mask is given, but no tokens")
    return Dataset(
        name, values, num_values, labels, classes, tuple(notes), cond=cond, mask=mask, value_range=value_range
    )


def conditions(cond: np.ndarray, mask: np.ndarray | None, count: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(vectors (N, D) float32, None), or (tokens (N, L, D) float32, mask (N, L) bool).

    Raises `FileError` (CONDITION), also unless N is ``count``, if that is given.
    """
    cond = np.asarray(cond)
    if cond.dtype.kind not in "biuf" or cond.dtype.itemsize > 8:
        raise FileError("CONDITION", f"conditions are {cond.dtype}, not numbers")
    if cond.ndim not in (2, 3) or not cond.size or (count is not None and len(cond) != count):
        items = "" if count is None else f", for {count} items"
        raise FileError("CONDITION", f"conditions have shape {cond.shape}{items}")
    with np.errstate(over="ignore"):
        cond = _packed(cond, np.dtype(np.float32))
    if len(bad := np.argwhere(~np.isfinite(cond))):
        raise FileError("CONDITION", f"the value at {tuple(map(int, bad[0]))} is {cond[tuple(bad[0])]} (in float32)")
    if cond.ndim == 2 and mask is not None:
        raise FileError("CONDITION", "a mask needs tokens (N, L, D), and these are vectors (N, D)")
    if cond.ndim == 3:
        mask = np.ones(cond.shape[:2], bool) if mask is None else np.asarray(mask)
        if mask.shape != cond.shape[:2] or mask.dtype != bool:
            raise FileError("CONDITION", f"the mask is {mask.dtype} {mask.shape}, not bool {cond.shape[:2]}")
    return cond, mask


def _channels_first(values: np.ndarray, layout: str | None, notes: list[str]) -> np.ndarray:
    """A view (N, D) or (N, C, *size); notes record a moved or added dimension."""
    shape = "x".join(map(str, values.shape))
    if values.ndim and not values.size:
        raise FileError("SHAPE", f"{shape} contains no values", "Give at least one item")
    if layout is None:
        is_grey = values.dtype.kind == "b" or values.dtype.name in ("uint8", "uint16")
        layout = {2: "ND", 3: "NHW" if is_grey else None, 4: "NCHW", 5: "NCDHW"}.get(values.ndim)
        if values.ndim == 3 and layout is None:
            fix = "Give layout=NHW (grey images), layout=NCL or layout=NLC (sequences)"
            raise FileError("SHAPE", f"{shape} could be images without channels or sequences with channels", fix)
        if values.ndim in (4, 5) and values.shape[1] > MAX_CHANNELS:
            last = "NHWC" if values.ndim == 4 else "NDHWC"
            if values.shape[-1] <= MAX_CHANNELS:
                fix = f"Give layout={last} (or layout={layout} if that is right)"
                raise FileError("SHAPE", f"{shape} looks like {last}, channels last", fix)
            if values.ndim == 4:
                cause = f"{shape} could be images of {values.shape[1]} channels, or volumes without channels"
                raise FileError("SHAPE", cause, "Give layout=NCHW (images) or layout=NDHW (volumes)")
    if layout is None or len(layout) != values.ndim:
        cause = f"{shape or 'a single number'} has {counted(values.ndim, 'dimension')}"
        cause += f", {layout} has {len(layout)}" if layout else ""
        raise FileError("SHAPE", cause, "Give items of one or more dimensions in an array: (N, D), (N, C, H, W) ...")
    if layout.endswith("C"):
        notes.append("channels moved from last to first")
        return _map_items(values, lambda items: np.moveaxis(items, -1, 1))
    if layout in ("NHW", "NDHW"):
        notes.append("one channel added")
        return _map_items(values, lambda items: items[:, None])
    return values


def _map_items(values: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return cast_to_array(values.map(function)) if isinstance(values, LazyArray) else function(values)


def _integers(values: np.ndarray, num_values: int | None, notes: list[str]) -> tuple[np.ndarray, int]:
    """(values as uint8 or uint16, num_values)."""
    of_dtype = {"bool": 2, "uint8": 256, "uint16": 65536}.get(values.dtype.name)
    if of_dtype is None or num_values not in (None, of_dtype):
        extremes = [(int(chunk.min()), int(chunk.max())) for chunk in chunks(values)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        extent = f"values run from {low} to {high}"
        if num_values is None:
            num_values = high + 1
            notes.append(f"{extent}: num_values is {num_values}")
        if low < 0 or high >= num_values or not 2 <= num_values <= 65536:
            cause = f"{extent}; integers must lie in 0 .. N - 1 for N values, at most 65536"
            cause = "all values are 0, and num_values is not given" if low == high == 0 else cause
            raise FileError("RANGE", cause)
    num_values = num_values or of_dtype
    assert num_values is not None
    packed = np.dtype(np.uint8 if num_values <= 256 else np.uint16)
    if values.dtype.newbyteorder("=") != packed:
        notes.append(f"stored as {packed}, from {values.dtype.name}")
    return _packed(values, packed), num_values


def _floats(values: np.ndarray, notes: list[str], value_range: ValueRange | None) -> np.ndarray:
    """Finite float32 values, in ``value_range`` if that is given."""
    all_integers, start, low, high = True, 0, math.inf, -math.inf
    if values.dtype.itemsize != 4:
        precision = "rounded" if values.dtype.itemsize == 8 else "exactly"
        notes.append(f"stored as float32, {precision}, from {values.dtype.name}")
    with np.errstate(over="ignore"):
        values = _packed(values, np.dtype(np.float32))
    for chunk in chunks(values):
        if len(bad := np.argwhere(~np.isfinite(chunk))):
            index = (start + int(bad[0, 0]), *map(int, bad[0, 1:]))
            cause = f"the value at {index} is {chunk[tuple(bad[0])]} (in float32, channels first)"
            raise FileError("NON_FINITE", cause)
        start += len(chunk)
        all_integers = all_integers and bool((chunk == np.rint(chunk)).all())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    if value_range is not None and not (np.float32(value_range[0]) <= low and high <= np.float32(value_range[1])):
        cause = f"values run from {low:g} to {high:g}, outside of the given range {{:g}} to {{:g}}".format(*value_range)
        raise FileError("RANGE", cause, "Give a range that contains all values, or none")
    if all_integers:
        notes.append(f"all values are integers from {low:g} to {high:g}, but continuous because stored as floats")
    return values


def _packed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-contiguous values of ``dtype``, copied only if necessary, and converted at each access if large and on disk."""
    is_lazy = isinstance(values, LazyArray)
    if values.dtype == dtype and (is_lazy or values.flags.c_contiguous):
        return values
    if values.nbytes > MAX_CONVERTED_BYTES and (is_lazy or _is_mapped(values)):
        return cast_to_array(LazyArray(values.shape, dtype, values.__getitem__, thread_safe=True))
    return np.ascontiguousarray(values, dtype)


def _is_mapped(values: np.ndarray) -> bool:
    base: object = values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def _labels(labels: np.ndarray, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """((N,) int64 labels, the names "0" .. "K − 1"); raises `FileError` unless 0 .. K − 1 all occur."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        hint = "; this looks like one-hot, take its argmax" if labels.ndim == 2 and len(labels) == count else ""
        raise FileError("LABELS", f"labels have shape {labels.shape}, for {count} items{hint}")
    if labels.dtype.kind not in "biu":
        first = ", ".join(map(str, labels[:5].tolist()))
        raise FileError("LABELS", f"labels are {labels.dtype}, not integers: {first}, ...")
    if len(negative := np.flatnonzero(labels < 0)):
        first = ", ".join(map(str, negative[:5]))
        raise FileError("LABELS", f"{len(negative)} labels are negative, the first at {first}")
    used = np.unique(labels)
    if int(used[-1]) != len(used) - 1:
        unused = np.setdiff1d(np.arange(len(used) + 6), used)
        first = ", ".join(map(str, unused[unused < used[-1]][:5]))
        more = ", ... have" if used[-1] >= len(used) + 5 else " have" if "," in first else " has"
        raise FileError("LABELS", f"labels go up to {used[-1]}, but {first}{more} no item")
    return labels.astype(np.int64), tuple(str(k) for k in range(len(used)))

"""Many images decoded on all cores, in order: Pillow lets other threads run while it decodes."""

from __future__ import annotations

import math
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_ITEMS, CHUNK_BYTES = 32, 1 << 18
"""Limits of the encoded images that a thread decodes at a time: handing one over costs as much as a small image."""
CHUNKS_AHEAD = 2
"""Chunks, apart from one for each thread, that are decoded or waiting at a time, which bounds memory."""

_lock = threading.Lock()
_inside = 0
_filters = warnings.catch_warnings()


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    """Warnings, but for deprecations, are exceptions until the last thread has left this context.

    The filters of warnings belong to the process: the first thread sets them, and the last one restores them.
    """
    global _inside, _filters
    with _lock:
        if not _inside:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _filters.__exit__(None, None, None)


def map_in_order(
    function: Callable[[Item], Result], items: Sequence[Item], size: Callable[[Item], int] = lambda item: 0
) -> Generator[Result]:
    """``function`` of each item, in order, computed by as many threads as torch computes with; by none if that is one.

    ``size``: bytes of an encoded item. An exception of ``function`` is raised here and ends the threads, as closing the
    generator does.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        yield from map(function, items)
        return
    pending: deque[Future[list[Result]]] = deque()
    with warnings_as_errors(), ThreadPoolExecutor(threads, "decoding") as pool:
        try:
            for chunk in _chunks(items, size, math.ceil(len(items) / threads)):
                pending.append(pool.submit(lambda chunk: [function(item) for item in chunk], chunk))
                if len(pending) >= threads + CHUNKS_AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _chunks(items: Sequence[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """The items in order, at most ``most`` at a time, within CHUNK_ITEMS and, but for single ones, CHUNK_BYTES."""
    chunk, total = [], 0
    for item in items:
        total += size(item)
        if chunk and (len(chunk) == min(most, CHUNK_ITEMS) or total > CHUNK_BYTES):
            yield chunk
            chunk, total = [], size(item)
        chunk.append(item)
    if chunk:
        yield chunk

"""What a step of training takes past one process: memory exactly, time from three measured numbers."""

from __future__ import annotations

FLOAT = 4
"""Bytes of a float32."""


def memory(parameters: int, processes: int = 1, shard: bool = False, averages: int = 2) -> int:
    """Bytes that one process holds all the time: float32 weights, gradient, two moments, averages, and the model shown.

    In shares all but the last are divided by the ``processes``. ``averages``: the model's own and that of length 0.1;
    3 where the model's is neither 0.05 nor 0.1, 1 without snapshots. Activations come on top: see `room.activations`.
    """
    divided = FLOAT * parameters * (4 + averages)
    return FLOAT * parameters + (-(-divided // processes) if shard else divided)


def seconds(
    parameters: int, batch: int, processes: int, item: float, bandwidth: float, start: float = 0.0, shard: bool = False
) -> float:
    """Of a step: batch/N · item + n · (start + (N−1)/N · bytes/bandwidth), with N processes and no overlap of the two.

    ``item``: seconds that one process takes for one item of a large batch; ``bandwidth``: bytes a second between the
    slowest pair; ``start``: seconds before a collective moves anything. n is 2 for replicas (a reduction and its
    return) and 3 for shares (weights forward, weights backward, gradients). With overlap it is less: an upper bound.
    """
    passes = 3 if shard else 2
    moved = (processes - 1) / processes * FLOAT * parameters / bandwidth
    return batch / processes * item + (passes * (start + moved) if processes > 1 else 0.0)

"""The parts of the benchmark by name. The table is read without torch; a module is imported when its part runs."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """``module`` of this package with a function ``run(options) -> Result``."""

    title: str
    module: str


PARTS: dict[str, Part] = {
    "same-network": Part("The same network in other packages: a training step, a sampling step", "same_network"),
    "same-calls": Part("The same network and calls: our solvers and those of other packages", "same_calls"),
    "limits": Part("Operations of a training step, and the fraction of this machine's rate", "limits"),
    "growth": Part("How times grow: exponents", "growth"),
    "clock": Part("Fashion-MNIST after some minutes of training", "clock"),
    "gpu": Part("Training on a GPU: fraction of its rate, profile, diffusers' example, a training", "gpu"),
}
"""All but ``gpu`` run without a name."""

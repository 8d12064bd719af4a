"""The parts of the benchmark by name. The table is read without torch; a module is imported when its part runs."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """``module`` of this package with a function ``run(options) -> Result``; ``peers``: it needs the extra `peers`."""

    title: str
    module: str
    peers: bool


PARTS: dict[str, Part] = {
    "same-network": Part("The same network in other packages: a training step, a sampling step", "same_network", True),
    "limits": Part("Operations of a training step, and the fraction of this machine's rate", "limits", False),
    "growth": Part("How times grow: exponents", "growth", False),
    "clock": Part("Fashion-MNIST after some minutes of training", "clock", True),
}

"""What a solver is: one pure step between two noise levels."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.process.level import NoiseLevel

State = tuple[Any, ...]
"""What a solver remembers: tensors of x's shape and `NoiseLevel`s, never anything that changes."""


MANY = 10_000
"""Network calls in one step: what asks for more of them is a slip."""


class Solver(Protocol):
    """``order`` (declared; strong where ``draws`` is 0, else weak; None without one), network ``calls`` and
    noises (``draws``) a step. Branches on Python integers only, never on the values of tensors."""

    @property
    def order(self) -> int | None: ...
    @property
    def calls(self) -> int: ...
    @property
    def draws(self) -> int: ...

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """What the solver remembers before its first step. Raises `ConfigError` for levels that it cannot walk."""
        ...

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        """(x_s, state) from ``x_t`` (B, ...) with ``noise`` (draws, B, ...)."""
        ...

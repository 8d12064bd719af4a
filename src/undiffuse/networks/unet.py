"""Ho's U-Net for sequences, images and volumes, from one code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from undiffuse.conditioning import Condition
from undiffuse.networks.attention import Attention, CrossAttention, Tokens
from undiffuse.networks.check import DEEPEST, LEVELS, require, share, whole, wholes
from undiffuse.networks.embedding import Embedding
from undiffuse.networks.norm import NORMS


def conv(dims: int, inner: int, outer: int, kernel: int = 3, **settings) -> nn.Module:
    """A convolution of 1, 2 or 3 dimensions, padded to keep the size unless told otherwise."""
    return getattr(nn, f"Conv{dims}d")(inner, outer, kernel, **{"padding": kernel // 2, **settings})


def fold(x: Tensor, patch: int) -> Tensor:
    """Space to depth: (B, C, *size) to (B, C patch^dims, *size/patch); ``unfold`` is its inverse."""
    dims = x.ndim - 2
    for axis in range(2, 2 * dims + 2, 2):
        x = x.unflatten(axis, (-1, patch))
    order = [0, 1, *range(3, 2 * dims + 2, 2), *range(2, 2 * dims + 2, 2)]
    return x.permute(order).flatten(1, dims + 1)


def unfold(y: Tensor, patch: int) -> Tensor:
    """Depth to space: (B, C patch^dims, *size) to (B, C, *size patch)."""
    dims = y.ndim - 2
    y = y.unflatten(1, (-1, *[patch] * dims))
    order = [0, 1, *(axis for d in range(dims) for axis in (2 + dims + d, 2 + d))]
    y = y.permute(order)
    for axis in range(2, dims + 2):
        y = y.flatten(axis, axis + 1)
    return y


class Residual(nn.Module):
    """skip(h) + conv₂(dropout(SiLU(norm₂(conv₁(SiLU(norm₁(h))) + told)))) [Ho20].

    With ``scale_shift`` what is told scales and shifts the output of norm₂ instead.
    """

    def __init__(
        self, dims: int, inner: int, outer: int, told: int, dropout: float, scale_shift: bool, norm: str
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = NORMS[norm](inner)
        self.conv1 = conv(dims, inner, outer)
        self.told = nn.Linear(told, outer * (2 if scale_shift else 1))
        self.norm2 = NORMS[norm](outer)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(dims, outer, outer)
        self.skip = conv(dims, inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(h)))
        told = self.told(told).to(y.dtype)
        told = told.view(*told.shape, *[1] * (h.ndim - 2))
        if self.scale_shift:
            scale, shift = told.chunk(2, 1)
            y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        else:
            y = self.norm2(y + told)
        return self.skip(h) + self.conv2(self.dropout(F.silu(y)))


class Down(nn.Module):
    """(B, width, ...) at half the size: a convolution of stride 2 that begins at the first cell [Ho20], or a mean."""

    def __init__(self, dims: int, width: int, learned: bool) -> None:
        super().__init__()
        self.pad = [0, 1] * dims if learned else []
        self.layer = conv(dims, width, width, stride=2, padding=0) if learned else getattr(nn, f"AvgPool{dims}d")(2)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(F.pad(h, self.pad))


class Up(nn.Module):
    """(B, width, ...) at twice the size: every cell repeated, and then a convolution if it is learned [Ho20]."""

    def __init__(self, dims: int, width: int, learned: bool) -> None:
        super().__init__()
        self.layer = conv(dims, width, width) if learned else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Stage(nn.ModuleList):
    """Some layers one after another; what is told goes to the residual ones, tokens to those that attend to them.

    With ``recompute`` a backward pass computes again what is in between, which then takes no memory.
    """

    recompute = False

    def forward(self, h: Tensor, told: Tensor, tokens: Sequence[Tensor] = ()) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._through, h, told, tokens, use_reentrant=False)  # type: ignore[return-value]
        return self._through(h, told, tokens)

    def _through(self, h: Tensor, told: Tensor, tokens: Sequence[Tensor] = ()) -> Tensor:
        for layer in self:
            more = (told,) if isinstance(layer, Residual) else tokens if isinstance(layer, CrossAttention) else ()
            h = layer(h, *more)
        return h


class UNet(nn.Module):
    """y (B, out_channels, *size) in x's dtype, from x (B, channels, *size) of any size and time (B,) or () [Ho20].

    ``widths``: channels of each level, each half the size of the one before; ``blocks``: residual blocks a level
    (one more on the way up); ``attention``: levels with self-attention, 0 the finest (the middle always has it),
    of ``heads`` heads; ``patch``: cells of space to depth before level 0 and back at the end; ``time_width``: of
    the embedding, default four times the first width; ``classes``: labels 0 … classes − 1 beside the null label
    −1; ``scale_shift``: time scales and shifts the inner norm rather than being added; ``learned_resampling``:
    convolutions between levels (Ho) rather than means and repeats; ``fourier``: powers n for which sin and cos of
    2^n π x are further inputs [Kingma21]; ``norm``: ``group`` (Ho) or ``layer`` (faster on a processor); ``vector``:
    numbers of a vector that it is told; ``tokens``: numbers of each token of a sequence, to which it attends
    wherever it attends to itself (a token's place in the sequence is not told beside it). Zero at
    initialisation. ``ConfigError`` for settings that cannot work.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        dims: int = 2,
        widths: Sequence[int] = (64, 128),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        heads: int = 1,
        patch: int = 1,
        dropout: float = 0.0,
        time_width: int | None = None,
        classes: int = 0,
        scale_shift: bool = False,
        learned_resampling: bool = True,
        fourier: Sequence[int] = (),
        norm: str = "group",
        vector: int = 0,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        require(dims in (1, 2, 3), "dims", f"{dims!r} dimensions", "Give 1, 2 or 3")
        widths, attention = wholes("widths", widths), wholes("attention", attention, 0)
        require(len(widths) > 0, "widths", "there is no level", "Give one width a level, such as [64, 128]")
        require(len(widths) <= LEVELS, "widths", f"{len(widths)} levels are more than {LEVELS}", "Give fewer")
        top = len(widths) - 1
        last = max(attention, default=0)
        require(last <= top, "attention", f"level {last} is not one of 0 to {top}", "Name levels of widths")
        for level in {*attention, top}:
            odd = widths[level] % whole("heads", heads)
            require(
                not odd,
                "heads",
                f"{heads} does not divide the width {widths[level]} of level {level}",
                "Give a divisor",
            )
        require(norm in NORMS, "norm", f"there is no norm {norm!r}", f"Choose {' or '.join(NORMS)}")
        for name, value in {"channels": channels, "blocks": blocks, "patch": patch}.items():
            whole(name, value)
        layers = blocks * len(widths)
        require(layers <= DEEPEST, "blocks", f"{layers:,} layers are more than {DEEPEST:,}", "Give fewer")
        out_channels = channels if out_channels is None else whole("out_channels", out_channels)
        time_width = 4 * widths[0] if time_width is None else whole("time_width", time_width)
        dropout, classes = share("dropout", dropout), whole("classes", classes, 0)
        vector, tokens = whole("vector", vector, 0), whole("tokens", tokens, 0)

        self.channels, self.dims, self.patch, self.deepest = channels, dims, patch, widths[-1]
        self.fourier = wholes("fourier", fourier, 0)
        self.multiple = patch * 2**top  # sizes inside are multiples of this
        cells = patch**dims

        def attending(width: int) -> list[nn.Module]:
            return [Attention(width, heads), *([CrossAttention(width, tokens, heads)] if tokens else [])]

        def stage(inner: int, level: int, *more: nn.Module) -> Stage:
            residual = Residual(dims, inner, widths[level], time_width, dropout, scale_shift, norm)
            attend = attending(widths[level]) if level in attention else []
            return Stage([residual, *attend, *more])

        self.embed = Embedding(max(widths[0] + widths[0] % 2, 4), time_width, classes, vector)
        self.tokens = Tokens(tokens) if tokens else None
        self.enter = conv(dims, channels * cells * (1 + 2 * len(self.fourier)), widths[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(skips[-1], level))
                skips.append(width)
            if level < top:
                self.down.append(Stage([Down(dims, width, learned_resampling)]))
                skips.append(width)
        middle = [Residual(dims, widths[-1], widths[-1], time_width, dropout, scale_shift, norm) for _ in range(2)]
        self.middle = Stage([middle[0], *attending(widths[-1]), middle[1]])
        inner = widths[-1]
        for level in range(top, -1, -1):
            for block in range(blocks + 1):
                more = [Up(dims, widths[level], learned_resampling)] if level and block == blocks else []
                self.up.append(stage(inner + skips.pop(), level, *more))
                inner = widths[level]
        self.norm = NORMS[norm](inner)
        self.leave = conv(dims, inner, out_channels * cells)
        self._initialise()

    def _initialise(self) -> None:
        """Weights uniform with variance 2/(fan in + fan out), zero where a branch or the network ends [Ho20]."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        branches = [m for m in self.modules() if isinstance(m, Residual | Attention | CrossAttention)]
        for end in [self.leave, *(m.conv2 if isinstance(m, Residual) else m.proj for m in branches)]:
            nn.init.zeros_(end.weight)  # pyright: ignore[reportArgumentType]

    def encode(
        self, x: Tensor, time: Tensor, cond: Condition | None = None
    ) -> tuple[list[Tensor], Tensor, Sequence[Tensor]]:
        """What each block down says and, last, the middle; beside it what the blocks are told, and the tokens."""
        pad = [end for n in reversed(x.shape[2:]) for end in (0, -n % self.multiple)]
        h = F.pad(x, pad, mode="replicate") if any(pad) else x
        if self.fourier:
            waves = [wave(2**n * math.pi * h) for n in self.fourier for wave in (torch.sin, torch.cos)]
            h = torch.cat([h, *waves], 1)
        told = self.embed(time, cond)
        tokens = self.tokens(cond, x) if self.tokens is not None else ()
        said = [self.enter(fold(h, self.patch))]
        for stage in self.down:
            said.append(stage(said[-1], told, tokens))
        return [*said, self.middle(said[-1], told, tokens)], told, tokens

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        skips, told, tokens = self.encode(x, time, cond)
        h = skips.pop()
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), told, tokens)
        y = unfold(self.leave(F.silu(self.norm(h))), self.patch).to(x.dtype)
        return y[(..., *(slice(n) for n in x.shape[2:]))]

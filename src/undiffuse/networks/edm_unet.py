"""The U-Nets of EDM's code, of the layers of `UNet`: DDPM++, NCSN++ and ADM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.attention import Attention
from undiffuse.networks.condition import Condition
from undiffuse.networks.diffusers_unet import Divided, waves
from undiffuse.networks.embedding import ConditionEmbedding
from undiffuse.networks.norm import GroupNorm
from undiffuse.networks.patches import pad_to_multiple
from undiffuse.networks.settings import (
    check_depth,
    check_dropout,
    check_int,
    check_ints,
    check_layers,
    check_out_channels,
    require,
)
from undiffuse.networks.unet import Down, Residual, Stage, UNet, Up, conv


class Architecture(NamedTuple):
    """What EDM's classes of networks differ in.

    ``divisor`` of a layer's output, ``eps`` of norms, channels of a head (0: one head), whether the embedding scales
    and shifts, whether a resampling block projects its skip, whether every block on the way up at a level with
    attention has it (else the last one), and where labels enter: before the MLP of the embedding, or after it.
    """

    divisor: float
    eps: float
    head_width: int
    scale_shift: bool
    project: bool
    attends_always: bool
    label_first: bool
    ncsn: bool = False


ARCHITECTURES = {
    "ddpm++": Architecture(math.sqrt(2), 1e-6, 0, False, True, False, True),
    "ncsn++": Architecture(math.sqrt(2), 1e-6, 0, False, True, False, True, True),
    "adm": Architecture(1.0, 1e-5, 64, True, False, True, False),
}
"""SongUNet as DDPM++ and as NCSN++ [Song21; Karras22 app. F.1], and DhariwalUNet [Dhariwal21; Karras22 app. F.1]."""
FILTER = (0.125, 0.375, 0.375, 0.125)
"""Weights of the filter of NCSN++ along an axis."""


class RandomWaves(nn.Module):
    """(n, width) sin and cos of 2π f time, f ~ N(0, 16²), fixed and saved with the weights [Song21 app. G.3]."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, time: Tensor, width: int) -> Tensor:
        angle = time.reshape(-1, 1) * (2 * math.pi * self.freqs).to(torch.promote_types(time.dtype, torch.float32))
        return torch.cat([angle.sin(), angle.cos()], 1)


class Filtered(nn.Module):
    """h (B, C, H, W) at half the size, or with ``up`` at twice, filtered by `FILTER` along both axes; zero outside."""

    kernel: Tensor

    def __init__(self, up: bool = False, padding: int = 1) -> None:
        super().__init__()
        self.up, self.padding = up, padding
        kernel = torch.tensor(FILTER)
        self.register_buffer("kernel", kernel[:, None] * kernel, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        kernel = self.kernel.to(h.dtype).expand(h.shape[1], 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(h, 4 * kernel, stride=2, padding=self.padding, groups=h.shape[1])
        return F.conv2d(h, kernel, stride=2, padding=self.padding, groups=h.shape[1])


class InputDown(nn.Module):
    """A 3×3 convolution of the input of a level, then `Filtered`, with one more cell of padding for its filter."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, 3, padding=2)
        self.filter = Filtered(padding=0)

    def forward(self, h: Tensor) -> Tensor:
        bias = self.conv.bias
        assert bias is not None
        weight, bias = self.conv.weight.to(h.dtype), bias.to(h.dtype)
        return self.filter(F.conv2d(h, weight, padding=2)) + bias[:, None, None]


class EDMUNet(UNet):
    """y (B, out_channels, H, W) from x (B, channels, H, W), as SongUNet or DhariwalUNet of EDM's code has it.

    ``architecture`` is a row of `ARCHITECTURES`. ``widths`` are the channels of each level, ``start_width`` those of
    the first convolution (default: of level 0), ``blocks`` the residual blocks of a level, ``attention`` the levels
    with attention, 0 the finest; ``features`` and ``time_width`` are the sizes of the encoded time and of its
    embedding. ADM has no attention, also in the middle, where a level has fewer than 64 channels. Zero at
    initialization. Raises `ConfigError`.
    """

    item_dims = (2,)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        architecture: str = "ddpm++",
        widths: Sequence[int] = (128, 256, 256),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        start_width: int | None = None,
        features: int | None = None,
        time_width: int | None = None,
        dropout: float = 0.0,
        classes: int = 0,
        two_times: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        known = isinstance(architecture, str) and architecture in ARCHITECTURES
        require(known, "architecture", f"{architecture!r} is not known", f"Use {' or '.join(ARCHITECTURES)}")
        kind = ARCHITECTURES[architecture]
        widths, attention = check_ints("widths", widths), check_ints("attention", attention, 0)
        check_depth("widths", len(widths))
        top, blocks = len(widths) - 1, check_int("blocks", blocks)
        last = max(attention, default=0)
        require(last <= top, "attention", f"level {last} is not one of 0 to {top}", "Name levels of widths")
        check_layers("blocks", blocks * len(widths))
        channels, classes = check_int("channels", channels), check_int("classes", classes, 0)
        dropout = check_dropout(dropout)
        out_channels = check_out_channels(out_channels, channels)
        start = widths[0] if start_width is None else check_int("start_width", start_width)
        features = start * (2 if kind.ncsn else 1) if features is None else check_int("features", features)
        require(features % 2 == 0 and features >= 4, "features", f"{features}", "Give an even number from 4")
        time_width = 4 * start if time_width is None else check_int("time_width", time_width)
        norm = partial(GroupNorm, eps=kind.eps)

        def residual(in_width: int, width: int, resampling: nn.Module | None = None) -> list[nn.Module]:
            project = kind.project and resampling is not None
            layer = Residual(2, in_width, width, time_width, dropout, kind.scale_shift, norm, resampling, project)
            return [layer, *self._divide(kind)]

        def attend(width: int) -> list[nn.Module]:
            heads = width // kind.head_width if kind.head_width else 1
            require(
                heads == 0 or width % heads == 0, "widths", f"{heads} heads do not divide {width}", "Give a multiple"
            )
            return [Attention(width, heads, norm(width)), *self._divide(kind)] if heads else []

        self.condition_sizes = {"classes": classes}
        self.patch, self.fourier, self.image, self.tokens, self.text = 1, (), 0, None, None
        self.feature_channels, self.feature_norm, self.feature_heads = widths[-1], "group", 1
        self.multiple = 2**top
        encode_time = partial(waves, shift=int(kind.label_first), cosine_first=not kind.label_first)
        encode_time = RandomWaves(features) if kind.ncsn else encode_time
        down = Filtered if kind.ncsn else partial(Down, 2, 1, learned=False)
        up = partial(Filtered, up=True) if kind.ncsn else partial(Up, 2, 1, learned=False)
        self.embed = ConditionEmbedding(
            features, time_width, classes, two_times=two_times, waves=encode_time, label_first=kind.label_first
        )
        self.conv_in = conv(2, channels, start)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [start]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Stage([*residual(skips[-1], width), *(attend(width) if level in attention else [])]))
                skips.append(width)
            if level < top:
                self.down.append(Stage(residual(width, width, down())))
                skips.append(width)
        width = widths[-1]
        self.middle = Stage([*residual(width, width), *attend(width), *residual(width, width)])
        for level in range(top, -1, -1):
            for number in range(blocks + 1):
                is_last = number == blocks
                attends = level in attention and (is_last or kind.attends_always)
                resample = residual(widths[level], widths[level], up()) if level and is_last else []
                layers = residual(width + skips.pop(), widths[level])
                layers += attend(widths[level]) if attends else []
                self.up.append(Stage([*layers, *resample]))
                width = widths[level]
        self.norm = norm(width)
        self.conv_out = conv(2, width, out_channels)
        pairs = itertools.pairwise([channels, *widths[:-1]])
        self.inputs = nn.ModuleList(InputDown(*pair) for pair in pairs) if kind.ncsn else None
        if kind.ncsn:  # a classifier is the network itself: `UNetEncoder` has no inputs of lower levels
            self.encoder = None  # pyright: ignore[reportAttributeAccessIssue]
        self._initialize()

    @staticmethod
    def _divide(kind: Architecture) -> list[nn.Module]:
        return [Divided(kind.divisor)] if kind.divisor != 1 else []

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *(self.inputs or [])]

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        if self.inputs is None:
            return super().forward(x, time, cond)
        inner = pad_to_multiple(x, self.multiple)
        embedding, inputs = self.embed(time, cond), iter(self.inputs)
        skips = [self.conv_in(inner)]
        for stage in self.down:
            h = stage(skips[-1], embedding)
            if h.shape[2:] != skips[-1].shape[2:]:
                h = inner = (h + next(inputs)(inner)) / math.sqrt(2)
            skips.append(h)
        h = self.middle(skips[-1], embedding)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), embedding)
        y = self.conv_out(F.silu(self.norm(h))).to(x.dtype)
        return y[..., : x.shape[2], : x.shape[3]]

"""The U-Net of diffusers' UNet2DModel, of the layers of `UNet`: settings have the names of its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from undiffuse.networks.attention import Attention
from undiffuse.networks.embedding import ConditionEmbedding
from undiffuse.networks.norm import GroupNorm
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

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
"""Blocks without attention, with attention, and with a residual block in place of the resampling."""


def waves(time: Tensor, width: int, shift: float, cosine_first: bool) -> Tensor:
    """(n, width) sin and cos of f time, f = 10000^(−j/(width/2 − shift)), j = 0 … width/2 − 1.

    Rounded as in diffusers: the phase f time of a step is up to 999, so that one rounding of f changes it by 6e-5.
    """
    half = width // 2
    time = time if time.dtype == torch.float64 else time.float()
    rates = -math.log(10_000) * torch.arange(half, device=time.device, dtype=time.dtype) / (half - shift)
    angle = time.reshape(-1, 1) * torch.exp(rates)
    parts = [angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()]
    return torch.cat(parts, 1)


class Divided(nn.Module):
    """h divided by a fixed number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, h: Tensor) -> Tensor:
        return h / self.by


class DiffusersUNet(UNet):
    """y (B, out_channels, H, W) from x (B, channels, H, W), as UNet2DModel of diffusers 0.42 computes it.

    A setting has the name and the meaning of the field of ``unet/config.json``; ``classes`` are its num_class_embeds,
    beside which the label −1 has a row of its own, and ``num_heads``, if not 0, the heads of every layer with attention
    in place of ``attention_head_dim``, as in guided-diffusion. The names of the weights are those of `UNet`, and
    `undiffuse.interop.diffusers_names` has those of diffusers. Zero at initialization. Raises `ConfigError`.
    """

    item_dims = (2,)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        block_out_channels: Sequence[int] = (128, 256),
        layers_per_block: int = 2,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D"),
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "UpBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        add_attention: bool = True,
        mid_block_scale_factor: float = 1.0,
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        classes: int = 0,
        two_times: bool = False,
        num_heads: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        widths = check_ints("block_out_channels", block_out_channels)
        check_depth("block_out_channels", len(widths))
        blocks = check_int("layers_per_block", layers_per_block)
        check_layers("layers_per_block", blocks * len(widths))
        down, up = list(down_block_types), list(up_block_types)
        for name, types, known in (("down_block_types", down, DOWN_BLOCKS), ("up_block_types", up, UP_BLOCKS)):
            require(
                len(types) == len(widths), name, f"{len(types)} for {len(widths)} levels", "Give one for each level"
            )
            unknown = next((block for block in types if block not in known), None)
            require(unknown is None, name, f"the block {unknown!r} is not supported", f"Use {', '.join(known)}")
        choices = {
            "mid_block_type": (mid_block_type, ("UNetMidBlock2D", None)),
            "resnet_time_scale_shift": (resnet_time_scale_shift, ("default", "scale_shift")),
            "downsample_padding": (downsample_padding, (0, 1)),
            "downsample_type": (downsample_type, ("conv", "resnet")),
            "upsample_type": (upsample_type, ("conv", "resnet")),
        }
        for name, (value, values) in choices.items():
            require(value in values, name, f"{value!r} is not supported", f"Use {' or '.join(map(repr, values))}")
        groups = check_int("norm_num_groups", norm_num_groups)
        wrong = next((width for width in widths if width % groups), None)
        require(wrong is None, "norm_num_groups", f"{groups} does not divide the {wrong} channels", "Give a divisor")
        require(widths[0] % 2 == 0, "block_out_channels", f"the first, {widths[0]}, is odd", "Give an even number")
        shift = check_int("freq_shift", freq_shift, 0)
        require(widths[0] // 2 > shift, "freq_shift", f"{shift} with {widths[0]} channels", "Give a smaller number")
        head = None if attention_head_dim is None else check_int("attention_head_dim", attention_head_dim)
        for name, number in (("norm_eps", norm_eps), ("mid_block_scale_factor", mid_block_scale_factor)):
            holds = isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf
            require(holds, name, f"{number!r} is not a finite number above 0", "Give such a number")
        channels, dropout = check_int("channels", channels), check_dropout(dropout)
        out_channels = check_out_channels(out_channels, channels)
        default_width = 4 * widths[0]
        time_width = (
            default_width if time_embedding_dim is None else check_int("time_embedding_dim", time_embedding_dim)
        )
        classes, scale_shift = check_int("classes", classes, 0), resnet_time_scale_shift == "scale_shift"
        norm = partial(GroupNorm, groups=groups, eps=norm_eps)

        fixed_heads = check_int("num_heads", num_heads, 0)

        def heads_of(width: int) -> int:
            if fixed_heads:
                require(
                    width % fixed_heads == 0, "num_heads", f"{fixed_heads} does not divide {width}", "Give a divisor"
                )
                return fixed_heads
            cause = f"{head} does not divide the {width} channels of a block with attention"
            require(head is None or width % head == 0, "attention_head_dim", cause, "Give a divisor")
            return 1 if head is None else width // head

        def residual(in_width: int, width: int, resampling: nn.Module | None = None) -> Residual:
            return Residual(2, in_width, width, time_width, dropout, scale_shift, norm, resampling)

        def stage(in_width: int, width: int, block: str, *resampling: nn.Module) -> Stage:
            attend = [Attention(width, heads_of(width), norm(width))] if block.startswith("Attn") else []
            return Stage([residual(in_width, width), *attend, *resampling])

        def resample(block: str, width: int) -> nn.Module:
            going_down = "Down" in block
            kind = {"A": downsample_type if going_down else upsample_type, "R": "resnet"}.get(block[0], "conv")
            layer = partial(Down, before=downsample_padding) if going_down else Up
            return residual(width, width, layer(2, width, False)) if kind == "resnet" else layer(2, width, True)

        self.condition_sizes = {"classes": classes}
        self.patch, self.fourier, self.image, self.tokens, self.text = 1, (), 0, None, None
        self.feature_channels, self.feature_norm, self.feature_heads = widths[-1], "group", 1
        top = len(widths) - 1
        self.multiple = 2**top
        encode_time = partial(waves, shift=shift, cosine_first=bool(flip_sin_to_cos))
        self.embed = ConditionEmbedding(widths[0], time_width, classes, two_times=two_times, waves=encode_time)
        self.conv_in = conv(2, channels, widths[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(skips[-1], width, down[level]))
                skips.append(width)
            if level < top:
                self.down.append(Stage([resample(down[level], width)]))
                skips.append(width)
        width = widths[-1]
        self.middle = Stage()
        if mid_block_type is not None:
            attn_groups = attn_norm_num_groups or (0 if scale_shift else groups)
            attn_groups = check_int("attn_norm_num_groups", attn_groups, 0)
            require(
                attn_groups == 0 or width % attn_groups == 0, "attn_norm_num_groups", "no divisor", "Give a divisor"
            )
            attn_norm = GroupNorm(width, attn_groups, norm_eps) if attn_groups else nn.Identity()
            attend = [Attention(width, heads_of(width), attn_norm)] if add_attention else []
            for layer in [residual(width, width), *attend, residual(width, width)]:
                divide = [Divided(float(mid_block_scale_factor))] if mid_block_scale_factor != 1 else []
                self.middle.extend([layer, *divide])
        for level in range(top, -1, -1):
            block = up[top - level]
            for number in range(blocks + 1):
                last = [resample(block, widths[level])] if level and number == blocks else []
                self.up.append(stage(width + skips.pop(), widths[level], block, *last))
                width = widths[level]
        self.norm = norm(width)
        self.conv_out = conv(2, width, out_channels)
        self._initialize()

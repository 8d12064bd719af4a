"""The U-Net of the package denoising-diffusion-pytorch: settings have the names of its class ``Unet``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.attention import attend
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import ConditionEmbedding, sinusoids
from undiffuse.networks.norm import GroupNorm
from undiffuse.networks.patches import pad_to_multiple
from undiffuse.networks.settings import check_depth, check_dropout, check_int, check_ints, check_out_channels, require

THETA = 10_000.0
"""The longest wavelength of the time embedding, over 2π."""


class RMSNorm(nn.Module):
    """g √width h/‖h‖, the norm over the channels of each position, for h (B, width, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**0.5
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(h, dim=1) * self.g.to(h.dtype) * self.scale


class Block(nn.Module):
    """dropout(SiLU((1 + scale) norm(conv h) + shift)); without ``scale_shift`` dropout(SiLU(norm(conv h)))."""

    def __init__(self, in_width: int, width: int, norm: Callable[[int], nn.Module], dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm = norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        h = self.norm(self.proj(h))
        if scale_shift is not None:
            scale, shift = scale_shift.to(h.dtype)[..., None, None].chunk(2, 1)
            h = h * (scale + 1) + shift
        return self.dropout(F.silu(h))


class ResidualBlock(nn.Module):
    """skip(h) + block2(block1(h, W cond)); dropout is in the first block only."""

    def __init__(
        self, in_width: int, width: int, cond_width: int, norm: Callable[[int], nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.cond = nn.Linear(cond_width, 2 * width)
        self.block1 = Block(in_width, width, norm, dropout)
        self.block2 = Block(width, width, norm)
        self.res_conv = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        return self.block2(self.block1(h, self.cond(cond))) + self.res_conv(h)


class MemoryAttention(nn.Module):
    """h + proj(attention of the positions of h (B, width, H, W)), with ``memory`` learned keys and values beside them.

    ``full``: softmax(q kᵀ/√d) v. Else linear in the number of positions: (q softmaxed over channels, divided by √d)
    times (k softmaxed over positions)ᵀ v, with an `RMSNorm` after the projection.
    """

    def __init__(self, width: int, heads: int, head_width: int, memory: int, full: bool) -> None:
        super().__init__()
        self.heads, self.full, inner = heads, full, heads * head_width
        self.norm = RMSNorm(width)
        shape = (memory, head_width) if full else (head_width, memory)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, *shape)) if memory else None
        self.to_qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        proj = nn.Conv2d(inner, width, 1)
        self.to_out = proj if full else nn.Sequential(proj, RMSNorm(width))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, heads, d, N)
        if self.full:
            q, k, v = (part.transpose(2, 3) for part in (q, k, v))
        if self.mem_kv is not None:
            mk, mv = (part.to(q.dtype).expand(h.shape[0], -1, -1, -1) for part in self.mem_kv)
            axis = 2 if self.full else 3
            k, v = torch.cat([mk, k], axis), torch.cat([mv, v], axis)
        if self.full:
            mixed = attend(q, k, v).transpose(2, 3)
        else:
            q = q.softmax(2) * q.shape[2] ** -0.5
            mixed = (k.softmax(3) @ v.transpose(2, 3)).transpose(2, 3) @ q
        return h + self.to_out(mixed.to(h.dtype).flatten(1, 2).unflatten(2, h.shape[2:]))


class DownLevel(nn.ModuleList):
    """(output, first skip, second skip) of residual, residual with attention, and resampling."""

    def forward(self, h: Tensor, cond: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self[0](h, cond)
        second = self[2](self[1](first, cond))
        return self[3](second), first, second


class UpLevel(nn.ModuleList):
    """The same layers on the way up, each residual block with one more input."""

    def forward(self, h: Tensor, cond: Tensor, first: Tensor, second: Tensor) -> Tensor:
        h = self[0](torch.cat([h, second], 1), cond)
        return self[3](self[2](self[1](torch.cat([h, first], 1), cond)))


class DenoisingDiffusionUNet(nn.Module):
    """y (B, out_channels, H, W) from x (B, channels, H, W), as Unet of denoising-diffusion-pytorch 1.8 to 2.3 has it.

    A setting has the name and the meaning of the argument of ``Unet``; ``full_attn``, ``attn_heads`` and
    ``attn_dim_head`` have one value for each level, ``full_attn`` by default true at the coarsest one alone.
    ``num_mem_kv`` is 0 before version 1.9, and ``resnet_block_groups`` are the groups of a group norm in residual
    blocks, as before version 2.0, in place of the `RMSNorm` (0). With ``self_condition`` the network has a second
    image as input, which here is zero. Beside that ``classes``, with a row of its own for the label −1. The names of
    the weights are those of the package but for `undiffuse.interop.denoising_diffusion.NAMES`. Sides that are no
    multiple of 2^(levels − 1) are padded. Zero at initialization. Raises `ConfigError`.
    """

    item_dims = (2,)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        dim: int = 64,
        init_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4),
        full_attn: Sequence[bool] | None = None,
        attn_heads: Sequence[int] | None = None,
        attn_dim_head: Sequence[int] | None = None,
        num_mem_kv: int = 4,
        resnet_block_groups: int = 0,
        sinusoidal_pos_emb_theta: float = THETA,
        self_condition: bool = False,
        dropout: float = 0.0,
        classes: int = 0,
        two_times: bool = False,
    ) -> None:
        super().__init__()
        dim, mults = check_int("dim", dim, 4), check_ints("dim_mults", dim_mults)
        require(dim % 2 == 0, "dim", f"{dim} is odd", "Give an even number")
        check_depth("dim_mults", len(mults))
        first = dim if init_dim is None else check_int("init_dim", init_dim)
        widths = [first, *(dim * mult for mult in mults)]
        top = len(mults) - 1
        heads = check_ints("attn_heads", [4] * len(mults) if attn_heads is None else attn_heads)
        head_widths = check_ints("attn_dim_head", [32] * len(mults) if attn_dim_head is None else attn_dim_head)
        full = [level == top for level in range(len(mults))] if full_attn is None else list(full_attn)
        for name, values in (("full_attn", full), ("attn_heads", heads), ("attn_dim_head", head_widths)):
            cause = f"{len(values)} values for {len(mults)} levels"
            require(len(values) == len(mults), name, cause, "Give one for each level")
        memory, groups = (
            check_int("num_mem_kv", num_mem_kv, 0),
            check_int("resnet_block_groups", resnet_block_groups, 0),
        )
        wrong = next((width for width in widths if groups and width % groups), None)
        cause = f"{groups} does not divide the {wrong} channels"
        require(wrong is None, "resnet_block_groups", cause, "Give a divisor")
        theta = float(sinusoidal_pos_emb_theta)
        require(1 < theta < float("inf"), "sinusoidal_pos_emb_theta", f"{theta} is not above 1", "Give a larger number")
        dropout, classes = check_dropout(dropout), check_int("classes", classes, 0)
        channels = check_int("channels", channels)
        out_channels = check_out_channels(out_channels, channels)
        self.condition_sizes, self.self_condition, self.multiple = {"classes": classes}, bool(self_condition), 2**top
        time_width = 4 * dim
        norm: Callable[[int], nn.Module] = partial(GroupNorm, groups=groups, eps=1e-5) if groups else RMSNorm

        def residual(in_width: int, width: int) -> ResidualBlock:
            return ResidualBlock(in_width, width, time_width, norm, dropout)

        def attention(level: int, width: int, is_full: bool) -> MemoryAttention:
            return MemoryAttention(width, heads[level], head_widths[level], memory, is_full)

        def down(level: int) -> DownLevel:
            width, out = widths[level], widths[level + 1]
            halved = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))
            last = halved if level < top else nn.Conv2d(width, out, 3, padding=1)
            return DownLevel(
                [residual(width, width), residual(width, width), attention(level, width, full[level]), last]
            )

        def up(level: int) -> UpLevel:
            width, out = widths[level + 1], widths[level]
            doubled = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, out, 3, padding=1))
            last = doubled if level else nn.Conv2d(width, out, 3, padding=1)
            both = width + out
            return UpLevel([residual(both, width), residual(both, width), attention(level, width, full[level]), last])

        waves = partial(sinusoids, longest=theta)
        self.embed = ConditionEmbedding(dim, time_width, classes, two_times=two_times, waves=waves, activation=F.gelu)
        self.init_conv = nn.Conv2d(channels * (2 if self_condition else 1), first, 7, padding=3)
        self.downs = nn.ModuleList(down(level) for level in range(len(mults)))
        self.mid_block1 = residual(widths[-1], widths[-1])
        self.mid_attn = attention(top, widths[-1], True)
        self.mid_block2 = residual(widths[-1], widths[-1])
        self.ups = nn.ModuleList(up(level) for level in range(top, -1, -1))
        self.final_res_block = residual(2 * first, first)
        self.final_conv = nn.Conv2d(first, out_channels, 1)
        nn.init.zeros_(self.final_conv.weight)
        nn.init.zeros_(self.final_conv.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        h = pad_to_multiple(x, self.multiple)
        if self.self_condition:
            h = torch.cat([torch.zeros_like(h), h], 1)
        embedding = self.embed(time, cond)
        start = h = self.init_conv(h)
        skips = []
        for level in self.downs:
            h, *two = level(h, embedding)
            skips.append(two)
        h = self.mid_block2(self.mid_attn(self.mid_block1(h, embedding)), embedding)
        for level in self.ups:
            h = level(h, embedding, *skips.pop())
        y = self.final_conv(self.final_res_block(torch.cat([h, start], 1), embedding)).to(x.dtype)
        return y[..., : x.shape[2], : x.shape[3]]

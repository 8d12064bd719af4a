"""A transformer on patches for sequences, images and volumes, from one code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.attention import CrossAttention, TokenEmbedding, attend
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import ConditionEmbedding, sinusoids
from undiffuse.networks.patches import fold, pad_to_multiple, unfold
from undiffuse.networks.settings import check_dropout, check_int, check_layers, check_out_channels, check_sizes, require
from undiffuse.networks.text_encoder import TEXT_WIDTH, TextEncoder, embed_condition
from undiffuse.networks.unet import conditioning_image

TIME_FEATURES = 64
"""Sinusoids of the time."""


def positions(size: Sequence[int], width: int, like: Tensor) -> Tensor:
    """(N, width): for each patch of a grid of ``size`` the sinusoids of its index along every axis [Peebles23 §3.2].

    Each axis has 2 ⌊width/(2 dims)⌋ features; zeros fill the rest. In the dtype and on the device of ``like``.
    """
    share = 2 * (width // (2 * len(size)))
    axes = torch.meshgrid(*(torch.arange(n, device=like.device) for n in size), indexing="ij")
    grid = torch.cat([sinusoids(axis, share) for axis in axes], 1)
    return F.pad(grid, (0, width - grid.shape[1])).to(like.dtype)


def normed(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(h − mean)/√(var + 1e-6) · (1 + scale) + shift, moments over the last axis of h (B, N, width), in h's dtype.

    ``scale`` and ``shift`` are (B or 1, width).
    """
    with torch.autocast(h.device.type, enabled=False):
        y = F.layer_norm(h, h.shape[-1:], eps=1e-6)
        return torch.addcmul(shift[:, None].to(y.dtype), y, 1 + scale[:, None].to(y.dtype))


class RMSNorm(nn.RMSNorm):
    """h/√(mean(h²) + 1e-6) · weight, the mean over the last axis, in h's dtype, also under autocast [Zhang19]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """proj(attend(norm(q), norm(k), v)), q, k, v linear in the tokens h (B, N, width).

    The norm is an `RMSNorm` of each head: without it the products q kᵀ grow in training [Henry20].
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(self.norm_q(q), self.norm_k(k), v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W₂ dropout(SiLU(a) b), (a, b) = W₁ h, with ``hidden`` numbers in a and in b [Shazeer20]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.fc1(h).chunk(2, -1)
        return self.fc2(self.dropout(F.silu(a) * b))


class Block(nn.Module):
    """h + g₁ attention(normed(h, s₁, b₁)), to which ``cross`` adds, then that + g₂ SwiGLU(normed(·, s₂, b₂)).

    h (B, N, width). b₁, s₁, g₁, b₂, s₂, g₂ are linear in the embedding and zero at initialization, when the block
    returns h: adaLN-zero [Peebles23 §3.2].
    """

    def __init__(
        self, width: int, heads: int, hidden: int, time_width: int, dropout: float, cross: CrossAttention | None
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(time_width, 6 * width)
        self.attention, self.feed_forward = SelfAttention(width, heads), SwiGLU(width, hidden, dropout)
        for layer in [self.attention.qkv, self.attention.proj, self.feed_forward.fc1, self.feed_forward.fc2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.cross = cross

    def forward(self, h: Tensor, embedding: Tensor, tokens: Sequence[Tensor] = ()) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, 1)
        h = h + gate1[:, None] * self.attention(normed(h, scale1, shift1))
        if self.cross is not None:
            h = self.cross(h.transpose(1, 2), *tokens).transpose(1, 2)
        return h + gate2[:, None] * self.feed_forward(normed(h, scale2, shift2))


class DiT(nn.Module):
    """y (B, out_channels, *size) in x's dtype, from x (B, channels, *size) of any size and time (B,) or ().

    The transformer of [Peebles23] with patches, SwiGLU and norms of q and k as in [Li25b]. ``patch``: cells of a patch
    along each axis, which is one token of ``width`` numbers; ``bottleneck``: numbers that a patch is first reduced to
    [Li25b], 0 for none; ``depth`` blocks with ``heads`` heads and SwiGLU of ``hidden`` numbers, default 8/3 of the
    width rounded up to a multiple of 8; ``time_width``: of the embedding, default the width. x is padded to whole
    patches by repeating its edge. Sizes of the conditions, 0 for one that it does not accept: ``classes`` (labels
    0 … classes − 1, −1 is null); ``vector``; ``tokens``, to which every block attends, without regard to their order;
    ``text``, prompts of up to so many bytes, by `TextEncoder`, pooled and as tokens; ``image``, the channels of an
    image that is brought to x's size by repeating its cells and joins the input channels (zeros without one). With
    ``two_times`` it accepts a condition's end time, as a flow map does. Zero at initialization. Raises `ConfigError`
    for settings that cannot work.
    """

    item_dims = (1, 2, 3)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        dims: int = 2,
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        bottleneck: int = 0,
        hidden: int | None = None,
        dropout: float = 0.0,
        time_width: int | None = None,
        classes: int = 0,
        vector: int = 0,
        tokens: int = 0,
        image: int = 0,
        two_times: bool = False,
        text: int = 0,
    ) -> None:
        super().__init__()
        require(dims in self.item_dims, "dims", f"{dims!r} dimensions", "Give 1, 2 or 3")
        channels, self.patch = check_int("channels", channels), check_int("patch", patch)
        width, depth, heads = check_int("width", width), check_int("depth", depth), check_int("heads", heads)
        check_layers("depth", depth)
        require(width % heads == 0, "heads", f"{heads} does not divide the width {width}", "Give a divisor")
        cause = f"{width} numbers cannot hold the position along {dims} axes"
        require(width >= 2 * dims, "width", cause, f"Give at least {2 * dims}")
        out_channels = check_out_channels(out_channels, channels)
        hidden = 8 * math.ceil(width / 3) if hidden is None else check_int("hidden", hidden)
        time_width = width if time_width is None else check_int("time_width", time_width)
        bottleneck, dropout = check_int("bottleneck", bottleneck, 0), check_dropout(dropout)
        self.condition_sizes = check_sizes(classes=classes, vector=vector, tokens=tokens, image=image, text=text)
        token_width = tokens or (TEXT_WIDTH if text else 0)
        self.width, self.dims, self.image = width, dims, image

        self.embed = ConditionEmbedding(TIME_FEATURES, time_width, classes, vector, image, two_times)
        self.tokens = TokenEmbedding(tokens) if tokens else None
        self.text = TextEncoder(time_width, token_width) if text else None
        cells = patch**dims
        self.reduce = nn.Linear((channels + image) * cells, bottleneck, bias=False) if bottleneck else nn.Identity()
        self.proj_in = nn.Linear(bottleneck or (channels + image) * cells, width)

        def block() -> Block:
            cross = CrossAttention(width, token_width, heads) if token_width else None
            return Block(width, heads, hidden, time_width, dropout, cross)

        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.modulation = nn.Linear(time_width, 2 * width)
        self.proj_out = nn.Linear(width, out_channels * cells)
        for end in (self.modulation, self.proj_out):
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)

    def adapt_weights(self, weights: Mapping[str, Tensor], label_rows: Sequence[int] | None) -> dict[str, Tensor]:
        """The first layer of a network without a conditioning image, with weights 0 for the channels of the image."""
        name, layer = ("proj_in", self.proj_in) if isinstance(self.reduce, nn.Identity) else ("reduce", self.reduce)
        given, own = weights.get(f"{name}.weight"), layer.weight
        assert isinstance(own, Tensor)
        cells = self.patch**self.dims
        more = self.image * cells
        if not more or given is None or given.shape != (len(own), own.shape[1] - more):
            return dict(weights)
        return {**weights, f"{name}.weight": F.pad(given, (0, more))}

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        size, (embedding, tokens) = x.shape[2:], embed_condition(self, x, time, cond)
        if self.image:
            x = torch.cat([x, conditioning_image(x, cond, self.image)], 1)
        patches = fold(pad_to_multiple(x, self.patch), self.patch)
        grid = patches.shape[2:]
        h = self.proj_in(self.reduce(patches.flatten(2).transpose(1, 2))) + positions(grid, self.width, x)
        for layer in self.layers:
            h = layer(h, embedding, tokens)
        shift, scale = self.modulation(embedding).chunk(2, 1)
        y = self.proj_out(normed(h, scale, shift)).transpose(1, 2).unflatten(2, grid)
        return unfold(y, self.patch).to(x.dtype)[(..., *(slice(n) for n in size))]

"""Ho's U-Net for sequences, images and volumes, from one code."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.errors import ConfigError
from undiffuse.networks.attention import Attention, CrossAttention, TokenEmbedding
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import ConditionEmbedding
from undiffuse.networks.norm import NORMS
from undiffuse.networks.patches import fold, pad_to_multiple, unfold
from undiffuse.networks.settings import (
    check_depth,
    check_dropout,
    check_int,
    check_ints,
    check_layers,
    check_out_channels,
    check_sizes,
    require,
)
from undiffuse.networks.text_encoder import TEXT_WIDTH, TextEncoder, embed_condition


def conv(dims: int, in_width: int, out_width: int, kernel: int = 3, **settings) -> nn.Module:
    """A convolution of 1, 2 or 3 dimensions, which keeps the size unless ``settings`` change the padding."""
    return getattr(nn, f"Conv{dims}d")(in_width, out_width, kernel, **{"padding": kernel // 2, **settings})


class Residual(nn.Module):
    """skip(R h) + conv₂(dropout(SiLU(norm₂(conv₁(R SiLU(norm₁(h))) + W cond)))) [Ho20].

    R is ``resampling``, `Down` or `Up` without weights [Brock18, Dhariwal21 §3], by default the identity. With
    ``scale_shift`` W cond scales and shifts the output of norm₂; with ``project`` skip is always a 1×1 convolution.
    """

    def __init__(
        self,
        dims: int,
        in_width: int,
        out_width: int,
        cond_width: int,
        dropout: float,
        scale_shift: bool,
        norm: Callable[[int], nn.Module],
        resampling: nn.Module | None = None,
        project: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resampling = nn.Identity() if resampling is None else resampling
        self.norm1 = norm(in_width)
        self.conv1 = conv(dims, in_width, out_width)
        self.cond = nn.Linear(cond_width, out_width * (2 if scale_shift else 1))
        self.norm2 = norm(out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(dims, out_width, out_width)
        self.skip = conv(dims, in_width, out_width, 1) if project or in_width != out_width else nn.Identity()

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        y = self.conv1(self.resampling(F.silu(self.norm1(h))))
        cond = self.cond(cond).to(y.dtype)[(..., *[None] * (h.ndim - 2))]
        if self.scale_shift:
            scale, shift = cond.chunk(2, 1)
            y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        else:
            y = self.norm2(y + cond)
        return self.skip(self.resampling(h)) + self.conv2(self.dropout(F.silu(y)))


class Down(nn.Module):
    """(B, width, ...) at half the size: a mean of cells, or a convolution [Ho20] that begins ``before``, 0 or 1, cells
    before the first one."""

    def __init__(self, dims: int, width: int, learned: bool, before: int = 0) -> None:
        super().__init__()
        self.pad = [0, 1] * dims if learned and not before else []  # a convolution pads both ends alone, and faster
        mean = getattr(nn, f"AvgPool{dims}d")(2)
        self.layer = conv(dims, width, width, stride=2, padding=before) if learned else mean

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(F.pad(h, self.pad) if self.pad else h)


class Up(nn.Module):
    """(B, width, ...) at twice the size: every cell repeated, followed by a convolution if ``learned`` [Ho20]."""

    def __init__(self, dims: int, width: int, learned: bool) -> None:
        super().__init__()
        self.layer = conv(dims, width, width) if learned else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers in sequence; the residual ones get the embedding ``cond``, those with cross-attention the tokens."""

    def forward(self, h: Tensor, cond: Tensor, tokens: Sequence[Tensor] = ()) -> Tensor:
        for layer in self:
            inputs = (cond,) if isinstance(layer, Residual) else tokens if isinstance(layer, CrossAttention) else ()
            h = layer(h, *inputs)
        return h

    def adapt_weights(self, weights: Mapping[str, Tensor], label_rows: Sequence[int] | None) -> dict[str, Tensor]:
        """Those of the other layers under their numbers here, where one of the two has cross-attention."""
        old = sorted({int(name.partition(".")[0]) for name in weights})
        crosses = [i for i in old if f"{i}.q.weight" in weights]
        own = [[i for i, m in enumerate(self) if m.state_dict() and isinstance(m, CrossAttention) == x] for x in (0, 1)]
        numbers = {i: f"crossed{i}" for i in old}  # what has no place here keeps a name that is none of a layer
        numbers |= dict(zip([i for i in old if i not in crosses], map(str, own[0]), strict=False))
        numbers |= dict(zip(crosses, map(str, own[1]), strict=False))
        split = [(*name.partition(".")[::2], tensor) for name, tensor in weights.items()]
        return {f"{numbers[int(i)]}.{rest}": tensor for i, rest, tensor in split}


class UNet(nn.Module):
    """y (B, out_channels, *size) in x's dtype, from x (B, channels, *size) of any size and time (B,) or () [Ho20].

    ``widths``: channels of each level, each half the size of the one before; ``blocks``: residual blocks a level
    (one more on the way up); ``attention``: levels with self-attention, 0 the finest (the middle always has it),
    of ``heads`` heads, or of heads of ``head_width`` channels if that is not 0; ``patch``: cells of space to depth
    before level 0 and back at the end; ``time_width``: of the embedding, default four times the first width;
    ``scale_shift``: the embedding scales and shifts the inner norm rather than being added; ``learned_resampling``:
    convolutions between levels (Ho) rather than means and repeats; ``residual_resampling``: residual blocks between
    levels, with means and repeats inside [Dhariwal21], instead of both; ``fourier``: powers n for which sin and cos
    of 2^n π x are further inputs [VDM21]; ``norm``: ``group`` (Ho) or ``layer`` (faster on a CPU). Sizes of the
    conditions, 0 for one that it does not accept: ``classes`` (labels 0 … classes − 1, −1 is null); ``vector``;
    ``tokens``, to which it attends wherever it attends to itself, without regard to their order; ``text``, prompts of
    up to so many bytes, by `TextEncoder`, pooled and as tokens; ``image``, the channels of an image that is brought to
    x's size by repeating its cells and joins the input channels (zeros without one). With ``two_times`` it accepts a
    condition's end time, as a flow map does. Zero at initialization. Raises `ConfigError` for settings that cannot
    work.
    """

    item_dims = (1, 2, 3)

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
        head_width: int = 0,
        patch: int = 1,
        dropout: float = 0.0,
        time_width: int | None = None,
        classes: int = 0,
        scale_shift: bool = False,
        learned_resampling: bool = True,
        residual_resampling: bool = False,
        fourier: Sequence[int] = (),
        norm: str = "group",
        vector: int = 0,
        tokens: int = 0,
        image: int = 0,
        two_times: bool = False,
        text: int = 0,
    ) -> None:
        super().__init__()
        require(dims in self.item_dims, "dims", f"{dims!r} dimensions", "Give 1, 2 or 3")
        widths, attention = check_ints("widths", widths), check_ints("attention", attention, 0)
        check_depth("widths", len(widths))
        top, last = len(widths) - 1, max(attention, default=0)
        require(last <= top, "attention", f"level {last} is not one of 0 to {top}", "Name levels of widths")
        heads, head_width = check_int("heads", heads), check_int("head_width", head_width, 0)
        both = heads > 1 and head_width > 0
        require(not both, "head_width", f"{head_width} beside {heads} heads", "Give one of heads and head_width")
        setting, divisor = ("head_width", head_width) if head_width else ("heads", heads)
        for level in {*attention, top}:
            cause = f"{divisor} does not divide the width {widths[level]} of level {level}"
            require(widths[level] % divisor == 0, setting, cause, "Give a divisor")
        require(norm in NORMS, "norm", f"there is no norm {norm!r}", f"Choose {' or '.join(NORMS)}")
        channels, patch = check_int("channels", channels), check_int("patch", patch)
        check_layers("blocks", check_int("blocks", blocks) * len(widths))
        out_channels = check_out_channels(out_channels, channels)

        def num_heads(width: int) -> int:
            return width // head_width if head_width else heads

        time_width = 4 * widths[0] if time_width is None else check_int("time_width", time_width)
        dropout, self.image = check_dropout(dropout), image
        self.condition_sizes = check_sizes(classes=classes, vector=vector, tokens=tokens, image=image, text=text)
        token_width = tokens or (TEXT_WIDTH if text else 0)
        self.patch, self.feature_channels, self.feature_norm = patch, widths[-1], norm
        self.feature_heads = num_heads(widths[-1])
        self.fourier = check_ints("fourier", fourier, 0)
        self.multiple = patch * 2**top  # x is padded to a multiple of this
        cells = patch**dims

        def residual(in_width: int, width: int, resampling: nn.Module | None = None) -> Residual:
            return Residual(dims, in_width, width, time_width, dropout, scale_shift, NORMS[norm], resampling)

        def attention_layers(width: int) -> list[nn.Module]:
            heads = num_heads(width)
            return [Attention(width, heads), *([CrossAttention(width, token_width, heads)] if token_width else [])]

        def resample(layer: type[Down | Up], width: int) -> nn.Module:
            if residual_resampling:
                return residual(width, width, layer(dims, width, learned=False))
            return layer(dims, width, learned_resampling)

        def stage(in_width: int, level: int, *resampling: nn.Module) -> Stage:
            attend = attention_layers(widths[level]) if level in attention else []
            return Stage([residual(in_width, widths[level]), *attend, *resampling])

        features = max(widths[0] + widths[0] % 2, 4)
        self.embed = ConditionEmbedding(features, time_width, classes, vector, image, two_times)
        self.tokens = TokenEmbedding(tokens) if tokens else None
        self.text = TextEncoder(time_width, token_width) if text else None
        self.conv_in = conv(dims, (channels + image) * cells * (1 + 2 * len(self.fourier)), widths[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(skips[-1], level))
                skips.append(width)
            if level < top:
                self.down.append(Stage([resample(Down, width)]))
                skips.append(width)
        middle = [residual(widths[-1], widths[-1]) for _ in range(2)]
        self.middle = Stage([middle[0], *attention_layers(widths[-1]), middle[1]])
        width = widths[-1]
        for level in range(top, -1, -1):
            for block in range(blocks + 1):
                up = [resample(Up, widths[level])] if level and block == blocks else []
                self.up.append(stage(width + skips.pop(), level, *up))
                width = widths[level]
        self.norm = NORMS[norm](width)
        self.conv_out = conv(dims, width, out_channels * cells)
        self._initialize()

    def _initialize(self) -> None:
        """Weights uniform with variance 2/(fan in + fan out), zero at the ends of branches and network [Ho20]."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        branches = [m for m in self.modules() if isinstance(m, Residual | Attention | CrossAttention)]
        for end in [self.conv_out, *(m.conv2 if isinstance(m, Residual) else m.proj for m in branches)]:
            nn.init.zeros_(end.weight)  # pyright: ignore[reportArgumentType]
        if self.embed.end is not None:
            nn.init.zeros_(self.embed.end.fc2.weight)
        if self.text is not None:
            self.text.initialize()

    def blocks(self) -> list[nn.Module]:
        return [*self.down, *self.up, self.middle]

    def adapt_weights(self, weights: Mapping[str, Tensor], label_rows: Sequence[int] | None) -> dict[str, Tensor]:
        """``conv_in`` of a network without a conditioning image, with weights 0 for the channels of the image."""
        own, given, copies = self.conv_in.weight, weights.get("conv_in.weight"), 1 + 2 * len(self.fourier)
        assert isinstance(own, Tensor)
        cells = self.patch ** (own.ndim - 2)
        channels = own.shape[1] // (copies * cells)
        expected = (own.shape[0], copies * (channels - self.image) * cells, *own.shape[2:])
        if not self.image or given is None or given.shape != expected:
            return dict(weights)
        weight = torch.zeros_like(own, device=given.device).unflatten(1, (copies, channels, cells))
        weight[:, :, : channels - self.image] = given.unflatten(1, (copies, -1, cells))
        return {**weights, "conv_in.weight": weight.flatten(1, 3)}

    def encoder(self) -> UNetEncoder:
        return UNetEncoder(self)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        skips, h, embedding, tokens = encode(self, x, time, cond)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], 1), embedding, tokens)
        y = unfold(self.conv_out(F.silu(self.norm(h))), self.patch).to(x.dtype)
        return y[(..., *(slice(n) for n in x.shape[2:]))]


class UNetEncoder(nn.Module):
    """(B, feature_channels, ...): the output of the middle of ``unet``, whose modules before its way up it holds."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.patch, self.fourier, self.multiple, self.image = unet.patch, unet.fourier, unet.multiple, unet.image
        self.feature_channels, self.feature_norm = unet.feature_channels, unet.feature_norm
        self.feature_heads = unet.feature_heads
        self.embed, self.tokens, self.text, self.conv_in = unet.embed, unet.tokens, unet.text, unet.conv_in
        self.down, self.middle = unet.down, unet.middle

    def feature_size(self, size: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.ceil(n / self.multiple) for n in size)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        return encode(self, x, time, cond)[1]


def conditioning_image(x: Tensor, cond: Condition | None, channels: int) -> Tensor:
    """(B, channels, *size of x): the image of ``cond``, its cells repeated to x's size; zeros without one.

    Raises `ConfigError` for an image of other dimensions than x.
    """
    if cond is None or cond.image is None:
        return x.new_zeros(len(x), channels, *x.shape[2:])
    if cond.image.ndim != x.ndim:
        cause = f"its shape is {tuple(cond.image.shape)}, and x has {x.ndim - 2} dimensions"
        raise ConfigError("CONDITION", "condition.image", cause, "Give an image of as many dimensions")
    return F.interpolate(cond.image.to(x.dtype), x.shape[2:], mode="nearest-exact")


def encode(
    network: UNet | UNetEncoder, x: Tensor, time: Tensor, cond: Condition | None
) -> tuple[list[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    """(outputs of conv_in and of every stage down, output of the middle, embedding, tokens)."""
    if network.image:
        x = torch.cat([x, conditioning_image(x, cond, network.image)], 1)
    h = pad_to_multiple(x, network.multiple)
    if network.fourier:
        waves = [wave(2**n * math.pi * h) for n in network.fourier for wave in (torch.sin, torch.cos)]
        h = torch.cat([h, *waves], 1)
    embedding, tokens = embed_condition(network, x, time, cond)
    skips = [network.conv_in(fold(h, network.patch))]
    for stage in network.down:
        skips.append(stage(skips[-1], embedding, tokens))
    return skips, network.middle(skips[-1], embedding, tokens), embedding, tokens

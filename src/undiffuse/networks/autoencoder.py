"""Autoencoders: convolutional encoders and decoders of sequences, images and volumes.

A network has ``encode(x)``, the mean and the log-variance of q(z given x) (None for a deterministic encoder),
``decode(z)``, x̂, ``latent_shape(item_shape)`` and ``is_deterministic``. It contains no distribution: that is
`undiffuse.model.autoencoder`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.errors import ConfigError
from undiffuse.networks.attention import attend
from undiffuse.networks.norm import GroupNorm
from undiffuse.networks.settings import MAX_DEPTH, MAX_LAYERS, check_int, check_ints, require
from undiffuse.networks.unet import conv

LOG_VAR_RANGE = (-30.0, 20.0)
"""The log-variance of an encoder is clamped to this range, as in [Rombach22]'s code."""


class ResidualBlock(nn.Module):
    """shortcut(h) + conv₂(SiLU(norm₂(conv₁(SiLU(norm₁(h)))))); the names of parameters are those of diffusers."""

    def __init__(self, dims: int, in_width: int, out_width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(in_width, groups), conv(dims, in_width, out_width)
        self.norm2, self.conv2 = GroupNorm(out_width, groups), conv(dims, out_width, out_width)
        if in_width != out_width:
            self.conv_shortcut = conv(dims, in_width, out_width, 1)

    def forward(self, h: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(h))))))
        return (self.conv_shortcut(h) if hasattr(self, "conv_shortcut") else h) + y


class PositionAttention(nn.Module):
    """h + to_out(attend(to_q, to_k, to_v)) of the normed positions of h (B, width, ...), with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(width, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.group_norm(h).flatten(2).transpose(1, 2)
        q, k, v = (to(tokens)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        return h + self.to_out[0](attend(q, k, v)[:, 0]).transpose(1, 2).reshape(h.shape)


class Middle(nn.Module):
    """A residual block, attention among all positions if ``attention``, and a residual block."""

    def __init__(self, dims: int, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dims, width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([PositionAttention(width, groups)] if attention else [])

    def forward(self, h: Tensor) -> Tensor:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Resampling(nn.Module):
    """A convolution: of stride 2 from the first cell on, or of twice as many cells where ``up``."""

    def __init__(self, dims: int, width: int, up: bool) -> None:
        super().__init__()
        self.up, self.pad = up, [0, 1] * dims
        self.conv = conv(dims, width, width) if up else conv(dims, width, width, stride=2, padding=0)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest") if self.up else F.pad(h, self.pad))


class AutoencoderStage(nn.Module):
    """Residual blocks at one size, and a resampling unless it is the ``last`` stage."""

    def __init__(self, dims: int, widths: tuple[int, int], blocks: int, groups: int, last: bool, up: bool) -> None:
        super().__init__()
        ins = [widths[0], *[widths[1]] * (blocks - 1)]
        self.resnets = nn.ModuleList([ResidualBlock(dims, width, widths[1], groups) for width in ins])
        name = "upsamplers" if up else "downsamplers"
        if not last:
            self.add_module(name, nn.ModuleList([Resampling(dims, widths[1], up)]))
        self.resampling = None if last else name

    def forward(self, h: Tensor) -> Tensor:
        for block in self.resnets:
            h = block(h)
        return h if self.resampling is None else self.get_submodule(self.resampling)[0](h)  # pyright: ignore[reportIndexIssue]


class Encoder(nn.Module):
    """x (B, channels, ...) ↦ (B, out_channels, ... / 2^(stages − 1))."""

    def __init__(
        self, dims: int, channels: int, out_channels: int, widths: Sequence[int], blocks: int, groups: int, mid: bool
    ) -> None:
        super().__init__()
        self.conv_in = conv(dims, channels, widths[0])
        pairs = list(zip([widths[0], *widths[:-1]], widths, strict=True))
        self.down_blocks = nn.ModuleList(
            [AutoencoderStage(dims, p, blocks, groups, i == len(pairs) - 1, False) for i, p in enumerate(pairs)]
        )
        self.mid_block = Middle(dims, widths[-1], groups, mid)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = conv(dims, widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class ConvolutionalDecoder(nn.Module):
    """z (B, latent_channels, ...) ↦ (B, channels, ... · 2^(stages − 1)), a block more a stage than the encoder."""

    def __init__(
        self, dims: int, channels: int, latent_channels: int, widths: Sequence[int], blocks: int, groups: int, mid: bool
    ) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = conv(dims, latent_channels, widths[0])
        self.mid_block = Middle(dims, widths[0], groups, mid)
        pairs = list(zip([widths[0], *widths[:-1]], widths, strict=True))
        self.up_blocks = nn.ModuleList(
            [AutoencoderStage(dims, p, blocks + 1, groups, i == len(pairs) - 1, True) for i, p in enumerate(pairs)]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = conv(dims, widths[-1], channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class KLAutoencoder(nn.Module):
    """The autoencoder of latent diffusion [Rombach22], with the layers and parameter names of diffusers' AutoencoderKL.

    Each of ``widths`` is a stage of ``blocks`` residual blocks (``blocks`` + 1 in the decoder), with half the side of
    the stage before it: the factor of downsampling is 2^(stages − 1). ``attention``: among all positions at the
    smallest size. ``groups`` of each group norm; 0 chooses by the width. ``quant`` are the 1×1 convolutions on
    both sides of z: (after the encoder, before the decoder).
    """

    is_deterministic = False

    def __init__(
        self,
        channels: int,
        dims: int = 2,
        latent_channels: int = 4,
        widths: Sequence[int] = (32, 64, 64),
        blocks: int = 1,
        attention: bool = False,
        groups: int = 0,
        quant: Sequence[bool] = (True, True),
    ) -> None:
        super().__init__()
        widths = check_ints("widths", widths)
        require(1 <= len(widths) <= MAX_DEPTH, "widths", f"{len(widths)} stages", f"Give 1 to {MAX_DEPTH} widths")
        check_int("latent_channels", latent_channels, 1)
        require(check_int("blocks", blocks) <= MAX_LAYERS, "blocks", f"{blocks} blocks", "Give fewer")
        require(len(quant) == 2, "quant", f"{quant!r} are not two", "Give true or false for each side")
        self.dims, self.channels, self.latent_channels = dims, channels, latent_channels
        self.factor = 2 ** (len(widths) - 1)
        out = 2 * latent_channels
        self.encoder = Encoder(dims, channels, out, widths, blocks, groups, attention)
        self.decoder = ConvolutionalDecoder(dims, channels, latent_channels, widths, blocks, groups, attention)
        self.quant_conv = conv(dims, out, out, 1) if quant[0] else nn.Identity()
        self.post_quant_conv = conv(dims, latent_channels, latent_channels, 1) if quant[1] else nn.Identity()

    def latent_shape(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        return latent_shape(item_shape, self.channels, self.latent_channels, self.dims, self.factor)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, log_var.clamp(*LOG_VAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x̂(z), mean, log_var) with z = mean + exp(log_var/2) eps."""
        mean, log_var = self.encode(x)
        return self.decode(mean + torch.exp(0.5 * log_var) * eps), mean, log_var


def latent_shape(
    item_shape: Sequence[int], channels: int, latent_channels: int, dims: int, factor: int
) -> tuple[int, ...]:
    """(latent_channels, *sides/factor). Raises `ConfigError` for items of other channels or of sides not divisible."""
    sides, name = item_shape[1:], "×".join(map(str, item_shape))
    if len(sides) != dims or not dims:
        cause = f"items of {name} have {len(sides)} sides, the autoencoder has {dims}"
        fix = "Give sequences, images or volumes; vectors need no autoencoder"
        raise ConfigError("SHAPE", "autoencoder", cause, fix)
    if item_shape[0] != channels:
        cause = f"items of {name} have {item_shape[0]} channels, the autoencoder has {channels}"
        raise ConfigError(
            "SHAPE", "autoencoder", cause, "Give one of as many channels as the data, or prepare the data"
        )
    if wrong := [side for side in sides if side % factor]:
        cause = f"a side of {wrong[0]} cannot be divided by the factor {factor}"
        raise ConfigError("SHAPE", "autoencoder", cause, "Give a smaller power of two, or data of another size")
    return (latent_channels, *(side // factor for side in sides))


class TinyBlock(nn.Module):
    """ReLU(conv(h') + h') with three convolutions, h' = h + pool(h) where the block has a ``pooled`` branch."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (conv(2, width, width), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        if pooled:
            narrow, wide = conv(2, width, pooled, 1, bias=False), conv(2, pooled, width, 1, bias=False)
            self.pool = nn.Sequential(narrow, nn.GroupNorm(4, pooled), nn.ReLU(), wide)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.pool(h) if hasattr(self, "pool") else h
        return F.relu(self.conv(h) + h)


class SoftClamp(nn.Module):
    """3 tanh(z/3)."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class TinyAutoencoder(nn.Module):
    """The stacks of TAESD, a small deterministic autoencoder of images; x̂ in [0, 1] there, in [−1, 1] here.

    ``blocks`` and ``decoder_blocks`` of each stage; stages are joined by a convolution of stride 2, and in the decoder
    by twice the cells and a convolution. ``pooled`` is the width of a further branch in the blocks of the smallest
    size, 0 without it. The names of parameters are those of TAESD's files, after ``encoder.`` and ``decoder.``.
    """

    is_deterministic = True

    def __init__(
        self,
        channels: int = 3,
        dims: int = 2,
        latent_channels: int = 4,
        width: int = 64,
        blocks: Sequence[int] = (1, 3, 3, 3),
        decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        pooled: int = 0,
    ) -> None:
        super().__init__()
        blocks, decoder_blocks = check_ints("blocks", blocks), check_ints("decoder_blocks", decoder_blocks)
        self.dims, self.channels, self.latent_channels = dims, channels, latent_channels
        self.factor = 2 ** (len(blocks) - 1)

        def stage(n: int, smallest: bool) -> list[nn.Module]:
            return [TinyBlock(width, pooled if smallest else 0) for _ in range(n)]

        layers: list[nn.Module] = [conv(2, channels, width)]
        for i, n in enumerate(blocks):
            layers += [conv(2, width, width, stride=2, bias=False)] * (i > 0) + stage(n, i == len(blocks) - 1)
        self.encoder = nn.Sequential(*layers, conv(2, width, latent_channels))
        layers = [SoftClamp(), conv(2, latent_channels, width), nn.ReLU()]
        for i, n in enumerate(decoder_blocks):
            joint = [nn.Upsample(scale_factor=2.0), conv(2, width, width, bias=False)] if i else []
            layers += joint + stage(n, i == 0)
        self.decoder = nn.Sequential(*layers, conv(2, width, channels))

    def latent_shape(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        return latent_shape(item_shape, self.channels, self.latent_channels, self.dims, self.factor)

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        return self.encoder((x + 1) / 2), None

    def decode(self, z: Tensor) -> Tensor:
        return 2 * self.decoder(z) - 1


AUTOENCODERS: dict[str, type[nn.Module]] = {"kl": KLAutoencoder, "taesd": TinyAutoencoder}
"""The kinds of autoencoder networks."""

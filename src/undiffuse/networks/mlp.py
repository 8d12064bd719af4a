"""A residual network for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.attention import CrossAttention, TokenEmbedding
from undiffuse.networks.condition import Condition
from undiffuse.networks.embedding import ConditionEmbedding
from undiffuse.networks.settings import check_dropout, check_int, check_layers, check_out_channels, check_sizes
from undiffuse.networks.text_encoder import TEXT_WIDTH, TextEncoder, embed_condition


class ResidualLayer(nn.Module):
    """h + W₂ dropout(SiLU(W₁ (norm(h) (1 + scale) + shift))), scale and shift linear in ``cond``."""

    def __init__(self, width: int, cond_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.cond = nn.Linear(cond_width, 2 * width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(2 * width, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.cond(cond).chunk(2, 1)
        y = torch.addcmul(shift, self.norm(h).to(shift.dtype), 1 + scale)
        return h + self.fc2(self.dropout(F.silu(self.fc1(y))))


class MLP(nn.Module):
    """y (B, out_channels) in x's dtype, from x (B, channels), time (B,) or () and a condition. 0 at initialization.

    ``depth`` residual layers of ``width`` features, each conditioned on the embedding of the time, of labels
    0 … ``classes`` − 1 (−1 is null) and of vectors of ``vector`` numbers. Before each layer it attends to tokens of
    ``tokens`` numbers, and to those of prompts of up to ``text`` bytes (`TextEncoder`). A size of 0 means that it does
    not accept that condition. With ``two_times`` it accepts a condition's end time, as a flow map does. Raises
    `ConfigError` for settings that cannot work.
    """

    item_dims = (0,)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        width: int = 256,
        depth: int = 4,
        dropout: float = 0.0,
        time_width: int | None = None,
        classes: int = 0,
        vector: int = 0,
        tokens: int = 0,
        two_times: bool = False,
        text: int = 0,
    ) -> None:
        super().__init__()
        channels, width, depth = check_int("channels", channels), check_int("width", width), check_int("depth", depth)
        check_layers("depth", depth)
        out_channels = check_out_channels(out_channels, channels)
        time_width = width if time_width is None else check_int("time_width", time_width)
        self.condition_sizes = check_sizes(classes=classes, vector=vector, tokens=tokens, text=text)
        self.embed = ConditionEmbedding(64, time_width, classes, vector, two_times=two_times)
        self.tokens = TokenEmbedding(tokens) if tokens else None
        token_width = tokens or (TEXT_WIDTH if text else 0)
        self.text = TextEncoder(time_width, token_width) if text else None
        self.attend = nn.ModuleList(CrossAttention(width, token_width) for _ in range(depth if token_width else 0))
        self.proj_in = nn.Linear(channels, width)
        self.layers = nn.ModuleList(ResidualLayer(width, time_width, check_dropout(dropout)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, out_channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        embedding, tokens = embed_condition(self, x, time, cond)
        h = self.proj_in(x)
        for i, layer in enumerate(self.layers):
            if tokens:
                h = self.attend[i](h[..., None], *tokens)[..., 0]
            h = layer(h, embedding)
        return self.proj_out(F.silu(self.norm(h))).to(x.dtype)

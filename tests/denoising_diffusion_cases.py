"""Trainer files of denoising-diffusion-pytorch: a forward pass of its Unet, written here, makes the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers_cases import noise
from torch import Tensor
from torch.nn import functional as F

T, SIDE = 20, 8
TIMES = (0, 7, 19)


class Reference:
    """Their Unet, layer by layer; weights are made as their names come up and kept in ``weights``."""

    def __init__(self, dim=8, mults=(1, 2), channels=1, out=1, full=None, heads=None, width=4, **more) -> None:
        self.dim, self.mults, self.channels, self.out, self.width = dim, mults, channels, out, width
        self.full = full or [False] * (len(mults) - 1) + [True]
        self.heads = heads or [2] * len(mults)
        self.init_dim, self.memory = more.get("init_dim", dim), more.get("memory", 4)
        self.groups, self.theta = more.get("groups", 0), more.get("theta", 10_000)
        self.self_condition = more.get("self_condition", False)
        self.weights: dict[str, Tensor] = {}

    def weight(self, name: str, *shape: int) -> Tensor:
        scale = 1.0 if "mem_kv" in name else 1.2 / math.sqrt(math.prod(shape[1:]))
        is_gain = len(shape) == 1 or name.endswith(".g")
        made = noise(name, *shape) / 3 + ("bias" not in name) if is_gain else noise(name, *shape) * scale
        return self.weights.setdefault(name, made)

    def conv(self, h: Tensor, name: str, out: int, kernel: int = 3, bias: bool = True) -> Tensor:
        weight = self.weight(f"{name}.weight", out, h.shape[1], kernel, kernel)
        return F.conv2d(h, weight, self.weight(f"{name}.bias", out) if bias else None, padding=kernel // 2)

    def linear(self, h: Tensor, name: str, out: int) -> Tensor:
        return h @ self.weight(f"{name}.weight", out, h.shape[1]).T + self.weight(f"{name}.bias", out)

    def rms(self, h: Tensor, name: str) -> Tensor:
        return h / h.square().mean(1, keepdim=True).sqrt() * self.weight(f"{name}.g", 1, h.shape[1], 1, 1)

    def norm(self, h: Tensor, name: str) -> Tensor:
        if not self.groups:
            return self.rms(h, name)
        grouped = h.unflatten(1, (self.groups, -1)).flatten(2)
        var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        h = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(h.shape)
        weight, bias = (self.weight(f"{name}.{part}", h.shape[1])[:, None, None] for part in ("weight", "bias"))
        return h * weight + bias

    def residual(self, h: Tensor, name: str, out: int, emb: Tensor) -> Tensor:
        scale, shift = self.linear(emb * torch.sigmoid(emb), f"{name}.mlp.1", 2 * out)[..., None, None].chunk(2, 1)
        y = self.norm(self.conv(h, f"{name}.block1.proj", out), f"{name}.block1.norm") * (1 + scale) + shift
        y = F.silu(self.norm(self.conv(F.silu(y), f"{name}.block2.proj", out), f"{name}.block2.norm"))
        return y + (h if h.shape[1] == out else self.conv(h, f"{name}.res_conv", out, 1))

    def attend(self, h: Tensor, name: str, full: bool, heads: int) -> Tensor:
        """Position by position in loops over items and heads."""
        d, qkv = self.width, self.conv(self.rms(h, f"{name}.norm"), f"{name}.to_qkv", 3 * heads * self.width, 1, False)
        q, k, v = qkv.flatten(2).chunk(3, 1)  # (B, heads d, N)
        shape = (2, heads, self.memory, d) if full else (2, heads, d, self.memory)
        memory = self.weight(f"{name}.mem_kv", *shape) if self.memory else None
        mixed = torch.zeros_like(q)
        for item in range(len(h)):
            for head in range(heads):
                rows = slice(head * d, (head + 1) * d)
                one, two, three = q[item, rows], k[item, rows], v[item, rows]
                if memory is not None:
                    more = [m[head].T if full else m[head] for m in memory]  # (d, memory)
                    two, three = torch.cat([more[0], two], 1), torch.cat([more[1], three], 1)
                if full:
                    mixed[item, rows] = three @ torch.softmax(two.T @ one / math.sqrt(d), 0)
                else:
                    context = torch.softmax(two, 1) @ three.T
                    mixed[item, rows] = context.T @ torch.softmax(one, 0) / math.sqrt(d)
        mixed = mixed.unflatten(2, h.shape[2:])
        if full:
            return h + self.conv(mixed, f"{name}.to_out", h.shape[1], 1)
        return h + self.rms(self.conv(mixed, f"{name}.to_out.0", h.shape[1], 1), f"{name}.to_out.1")

    @torch.no_grad()
    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x), x], 1)
        half, top = self.dim // 2, len(self.mults) - 1
        rates = torch.tensor([self.theta ** (-j / (half - 1)) for j in range(half)])
        angle = time[:, None] * rates
        emb = self.linear(torch.cat([angle.sin(), angle.cos()], 1), "time_mlp.1", 4 * self.dim)
        emb = self.linear(0.5 * emb * (1 + torch.erf(emb / math.sqrt(2))), "time_mlp.3", 4 * self.dim)
        widths = [self.init_dim, *(self.dim * mult for mult in self.mults)]
        start = h = self.conv(x, "init_conv", widths[0], 7)
        skips = []
        for level in range(top + 1):
            name = f"downs.{level}"
            h = self.residual(h, f"{name}.0", widths[level], emb)
            skips.append(h)
            h = self.attend(
                self.residual(h, f"{name}.1", widths[level], emb), f"{name}.2", self.full[level], self.heads[level]
            )
            skips.append(h)
            if level < top:
                parts = [h[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
                h = self.conv(torch.stack(parts, 2).flatten(1, 2), f"{name}.3.1", widths[level + 1], 1)
            else:
                h = self.conv(h, f"{name}.3", widths[level + 1])
        h = self.residual(h, "mid_block1", widths[-1], emb)
        h = self.residual(self.attend(h, "mid_attn", True, self.heads[-1]), "mid_block2", widths[-1], emb)
        for number, level in enumerate(range(top, -1, -1)):
            name, out = f"ups.{number}", widths[level + 1]
            h = self.residual(torch.cat([h, skips.pop()], 1), f"{name}.0", out, emb)
            h = self.residual(torch.cat([h, skips.pop()], 1), f"{name}.1", out, emb)
            h = self.attend(h, f"{name}.2", self.full[level], self.heads[level])
            if level:
                h = self.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.3.1", widths[level])
            else:
                h = self.conv(h, f"{name}.3", widths[0])
        h = self.residual(torch.cat([h, start], 1), "final_res_block", widths[0], emb)
        return self.conv(h, "final_conv", self.out, 1)


def betas(kind: str = "sigmoid", steps: int = T) -> Tensor:
    """beta of each step in float64, from ᾱ."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    if kind == "linear":
        return torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64).clamp(max=0.999)
    bar = (
        torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        if kind == "cosine"
        else torch.sigmoid(torch.tensor(3.0)).double() - torch.sigmoid(6 * t - 3)
    )
    return (1 - bar[1:] / bar[:-1]).clamp(0, 0.999)


def buffers(objective: str = "pred_v", kind: str = "sigmoid", limit: float | None = None, steps: int = T) -> dict:
    """The tables of a GaussianDiffusion that the import reads, and one that it does not."""
    beta = betas(kind, steps)
    bar = torch.cumprod(1 - beta, 0)
    snr = bar / (1 - bar)
    clipped = snr if limit is None else snr.clamp(max=limit)
    weight = {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}[objective]
    tables = {"betas": beta, "alphas_cumprod": bar, "loss_weight": weight, "sqrt_alphas_cumprod": bar.sqrt()}
    return {name: table.float() for name, table in tables.items()}


def inputs(channels: int = 1) -> tuple[Tensor, Tensor]:
    return noise("x", len(TIMES), channels, SIDE, SIDE), torch.tensor(TIMES, dtype=torch.float32)


def trainer_file(reference: Reference, tables: dict, last: float = 0.0) -> dict[str, Any]:
    """The content of ``model-1.pt``: averaged weights, and last ones that are ``last`` larger."""
    if not reference.weights:
        reference(*inputs(reference.channels))
    average = {f"model.{name}": tensor for name, tensor in reference.weights.items()} | tables
    online = {name: tensor + last * name.startswith("model.") for name, tensor in average.items()}
    ema = {f"ema_model.{name}": tensor for name, tensor in average.items()}
    ema |= {f"online_model.{name}": tensor for name, tensor in online.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(12)}
    moments = {0: {"step": torch.tensor(12.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3)}}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.99), "params": [0], "foreach": None}]
    opt = {"state": moments, "param_groups": groups}
    return {"step": 12, "model": online, "opt": opt, "ema": ema, "scaler": None, "version": "2.3.4"}


def write(path: Path, reference: Reference | None = None, tables: dict | None = None, last: float = 0.0) -> Path:
    torch.save(trainer_file(reference or Reference(), tables or buffers(), last), path)
    return path

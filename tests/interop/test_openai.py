"""State dicts of improved- and guided-diffusion: a forward pass of their network, written here, makes them."""

from __future__ import annotations

import hashlib
import math
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from undiffuse import load
from undiffuse.cli import main
from undiffuse.errors import UndiffuseError
from undiffuse.interop.openai import check_openai_flags, import_openai
from undiffuse.networks.condition import Condition

WIDTH, CLASSES = 32, 3


class Reference:
    """Their U-Net of grey images, level by level; weights are made as their names come up and kept in ``weights``."""

    def __init__(self, widths, blocks, attention, *, heads=0, head_width=0, new_order=False, **flags) -> None:
        self.widths, self.blocks, self.attention, self.new_order = widths, blocks, attention, new_order
        self.heads, self.head_width, self.flags = heads, head_width, flags
        self.weights: dict[str, Tensor] = {}

    def weight(self, name: str, *shape: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        made = made * 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else made / 2 + 0.5
        return self.weights.setdefault(name, made)

    def conv(self, h: Tensor, name: str, out: int, kernel: int = 3, stride: int = 1) -> Tensor:
        shape = (out, h.shape[1], *[kernel] * (h.ndim - 2))
        function = F.conv2d if h.ndim == 4 else F.conv1d
        weight, bias = self.weight(f"{name}.weight", *shape), self.weight(f"{name}.bias", out)
        return function(h, weight, bias, stride=stride, padding=kernel // 2)

    def linear(self, h: Tensor, name: str, out: int) -> Tensor:
        return F.linear(h, self.weight(f"{name}.weight", out, h.shape[1]), self.weight(f"{name}.bias", out))

    def norm(self, h: Tensor, name: str) -> Tensor:
        weight, bias = (self.weight(f"{name}.{part}", h.shape[1]) for part in ("weight", "bias"))
        return F.group_norm(h, 32, weight, bias, 1e-5)

    def residual(self, h: Tensor, name: str, out: int, emb: Tensor, resample=lambda h: h) -> Tensor:
        scaled = self.flags.get("use_scale_shift_norm", False)
        y = self.conv(resample(F.silu(self.norm(h, f"{name}.in_layers.0"))), f"{name}.in_layers.2", out)
        e = self.linear(F.silu(emb), f"{name}.emb_layers.1", 2 * out if scaled else out)[..., None, None]
        if scaled:
            scale, shift = e.chunk(2, 1)
            y = self.norm(y, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            y = self.norm(y + e, f"{name}.out_layers.0")
        y = self.conv(F.silu(y), f"{name}.out_layers.3", out)
        h = resample(h)
        return y + (h if h.shape[1] == out else self.conv(h, f"{name}.skip_connection", out, 1))

    def attend(self, h: Tensor, name: str) -> Tensor:
        B, C, heads = len(h), h.shape[1], self.heads or h.shape[1] // self.head_width
        qkv = self.conv(self.norm(h.flatten(2), f"{name}.norm"), f"{name}.qkv", 3 * C, 1)
        if self.new_order:
            q, k, v = (part.reshape(B * heads, C // heads, -1) for part in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(B * heads, 3 * C // heads, -1).split(C // heads, 1)
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(C // heads), -1)
        mixed = (v @ weights.transpose(1, 2)).reshape(B, C, -1)
        return h + self.conv(mixed, f"{name}.proj_out", C, 1).reshape(h.shape)

    def __call__(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        half, top, updown = WIDTH // 2, len(self.widths) - 1, self.flags.get("resblock_updown", False)
        angle = time[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
        emb = self.linear(torch.cat([angle.cos(), angle.sin()], 1), "time_embed.0", 4 * WIDTH)
        emb = self.linear(F.silu(emb), "time_embed.2", 4 * WIDTH)
        if label is not None:
            emb = emb + self.weight("label_emb.weight", CLASSES, 4 * WIDTH)[label]
        skips, number = [self.conv(x, "input_blocks.0.0", WIDTH)], 1
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                h = self.residual(skips[-1], f"input_blocks.{number}.0", width, emb)
                skips.append(self.attend(h, f"input_blocks.{number}.1") if level in self.attention else h)
                number += 1
            if level < top:
                name = f"input_blocks.{number}.0"
                if updown:
                    skips.append(self.residual(skips[-1], name, width, emb, lambda h: F.avg_pool2d(h, 2)))
                else:
                    skips.append(self.conv(skips[-1], f"{name}.op", width, 3, 2))
                number += 1
        h = self.residual(skips[-1], "middle_block.0", self.widths[-1], emb)
        h = self.residual(self.attend(h, "middle_block.1"), "middle_block.2", self.widths[-1], emb)
        for number, (level, block) in enumerate(product(range(top, -1, -1), range(self.blocks + 1))):
            h = self.residual(torch.cat([h, skips.pop()], 1), f"output_blocks.{number}.0", self.widths[level], emb)
            attends = level in self.attention
            h = self.attend(h, f"output_blocks.{number}.1") if attends else h
            if level and block == self.blocks:
                name = f"output_blocks.{number}.{1 + attends}"

                def double(h: Tensor) -> Tensor:
                    return F.interpolate(h, scale_factor=2)

                if updown:
                    h = self.residual(h, name, self.widths[level], emb, double)
                else:
                    h = self.conv(double(h), f"{name}.conv", self.widths[level])
        return self.conv(F.silu(self.norm(h, "out.0")), "out.2", self.flags.get("out", 1))


CASES = {
    "improved": (Reference((32, 64), 1, (0, 1), heads=2), {"num_heads": 2}),
    "new order": (
        Reference((32, 32), 2, (1,), heads=4, new_order=True),
        {"use_new_attention_order": True},
    ),
    "guided": (
        Reference((32, 64, 64), 1, (1,), head_width=16, use_scale_shift_norm=True, resblock_updown=True, out=2),
        {"num_head_channels": 16},
    ),
    "classes": (Reference((32,), 1, (), heads=1), {"num_heads": 1}),
}
X, TIME = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 40.0, 999.0])
LABEL = torch.tensor([2, 0, 1])


@torch.no_grad()
def write(name: str, path) -> Tensor:
    """The output of the case ``name``, whose weights are written to ``path``."""
    reference = CASES[name][0]
    output = reference(X, TIME, LABEL if name == "classes" else None)
    if path.suffix == ".safetensors":
        save_file(reference.weights, path)
    else:
        torch.save(reference.weights, path)
    return output


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_reference(name, tmp_path):
    expected = write(name, path := tmp_path / "ema.safetensors")
    flags = {"diffusion_steps": 20, "rescale_timesteps": False, **CASES[name][1]}
    model = import_openai(path, size=8, setting=flags).model
    cond = Condition(label=LABEL) if name == "classes" else None
    computed = model.network(X, TIME, cond)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert model.config.variance == ("learned" if name == "guided" else "large")
    if name == "improved":  # power: the other order of q, k and v is another network
        other = import_openai(path, size=8, setting={**flags, "use_new_attention_order": True}).model
        assert (other.network(X, TIME) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_process_is_that_of_the_flags(tmp_path):
    write("classes", path := tmp_path / "model.safetensors")
    flags = {"num_heads": 1, "diffusion_steps": 40, "noise_schedule": "cosine", "rescale_timesteps": True}
    model = import_openai(path, size=8, setting={**flags, "predict_xstart": True, "sigma_small": True}).model
    assert model.config.schedule == {"name": "cosine", "T": 40}
    assert (model.config.target["name"], model.config.variance, model.item_shape) == ("x", "small", (1, 8, 8))
    times = [float(model.denoiser().preconditioning.time_input(model.chain[k])) for k in (0, 38, 39)]
    assert times == [39 * 25, 25, 0]  # of 40 steps, counted from 0, in thousandths
    assert model.condition_sizes == {"classes": CLASSES}
    assert import_openai(path, size=8, setting={"num_heads": 1}).model.config.schedule["name"] == "linear_rescaled"


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ({"heads": 4}, "--set heads: no such flag"),
        ({"num_heads": "four"}, "'four' is not of the type int"),
        ({"predict_xstart": 1}, "1 is not of the type bool"),
        ({"noise_schedule": "sqrt"}, "'sqrt' is unknown. Use linear or cosine"),
        ({"diffusion_steps": 4000}, "rescale_timesteps: it is needed unless there are 1000 steps"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, cause):
    with pytest.raises(UndiffuseError) as raised:
        check_openai_flags(flags)
    assert cause in str(raised.value)


def test_files_that_are_no_such_weights_are_refused(tmp_path):
    write("improved", path := tmp_path / "model.safetensors")
    tensors = dict(CASES["improved"][0].weights)
    for changed, cause in (
        ({"x": torch.zeros(1)}, "not a state dict of improved- or guided-diffusion"),
        ({k: v for k, v in tensors.items() if k != "out.2.bias"}, "'conv_out.bias' is missing"),
        ({**tensors, "extra": torch.zeros(2)}, "'extra' does not belong to this model"),
        ({k: v for k, v in tensors.items() if not k.startswith("output_blocks.1.")}, "its levels have"),
    ):
        save_file(changed, path)
        with pytest.raises(UndiffuseError, match="error") as raised:
            import_openai(path, size=8, setting={"num_heads": 2, "diffusion_steps": 20, "rescale_timesteps": False})
        assert cause in str(raised.value)
    with pytest.raises(UndiffuseError, match="image_size is in no file"):
        import_openai(path)
    save_file(tensors, path)
    with pytest.raises(UndiffuseError, match="does not divide"):
        import_openai(path, size=8, setting={"num_heads": 5})


def test_the_command_reads_a_pickle_of_weights(tmp_path, capsys):
    write("classes", path := tmp_path / "ema_0.9999_000010.pt")
    command = ["import", str(path), str(tmp_path / "out"), "--size", "8", "--set", "num_heads=1", "--unpickle"]
    assert main([*command, "--set", "diffusion_steps=8", "--set", "rescale_timesteps=false"]) == 0
    printed = capsys.readouterr().out
    assert "note: flags: num_heads 1, num_head_channels -1, diffusion_steps 8" in printed
    assert "--solver ancestral --steps 8" in printed
    assert load(tmp_path / "out").info["imported"]["flags"]["diffusion_steps"] == 8

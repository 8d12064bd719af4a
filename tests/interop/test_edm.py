"""State dicts of EDM's networks: a forward pass and the preconditioning of [Karras22 table 1], written here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers_cases import noise
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from undiffuse.errors import UndiffuseError
from undiffuse.interop.edm import LABEL, MAP_LABEL, import_edm, tensor_names, to_own_names
from undiffuse.interop.importing import import_model
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import last_step, trajectory

SIZE, SIGMAS = 8, (0.002, 0.3, 5.0, 80.0)
LABELS = torch.tensor([2, 0, 1, -1])


class Reference:
    """SongUNet ("song": DDPM++, "ncsn": NCSN++) or DhariwalUNet of grey images; weights are made as names come up."""

    def __init__(self, kind="song", width=16, mults=(1, 2), blocks=1, attention=(4,), classes=0) -> None:
        self.song, self.ncsn = kind != "adm", kind == "ncsn"
        self.width, self.mults, self.blocks = width, mults, blocks
        self.attention, self.classes = attention, classes
        self.weights: dict[str, Tensor] = {}

    def weight(self, name: str, *shape: int) -> Tensor:
        if len(shape) > 1:
            made = noise(name, *shape) * 1.2 / math.sqrt(math.prod(shape[1:]))
        else:
            made = noise(name, *shape) / 3 + ("norm" in name and "weight" in name)
        return self.weights.setdefault(name, made)

    def conv(self, h: Tensor, name: str, out: int, kernel: int = 3) -> Tensor:
        weight = self.weight(f"{name}.weight", out, h.shape[1], kernel, kernel)
        return F.conv2d(h, weight, self.weight(f"{name}.bias", out), padding=kernel // 2)

    def linear(self, h: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
        y = h @ self.weight(f"{name}.weight", out, h.shape[1]).T
        return y + self.weight(f"{name}.bias", out) if bias else y

    def norm(self, h: Tensor, name: str) -> Tensor:
        weight, bias = (self.weight(f"{name}.{part}", h.shape[1]) for part in ("weight", "bias"))
        return F.group_norm(h, min(32, h.shape[1] // 4), weight, bias, 1e-6 if self.song else 1e-5)

    def resample(self, h: Tensor, name: str, way: str) -> Tensor:
        if self.ncsn:
            return self.filtered(h, name, way)
        self.weights[f"{name}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if way == "down":
            return sum(h[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def filtered(self, h: Tensor, name: str, way: str, pad: int = 1) -> Tensor:
        """Axis by axis: Σ_k f_k h[2i + k − pad] down, and h[i] of weight 2 f_k at 2i + k − 1 up."""
        f = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.weights[f"{name}.resample_filter"] = (f[:, None] * f)[None, None]
        for axis in (2, 3):
            h = h.movedim(axis, -1)
            if way == "down":
                wide = F.pad(h, (pad, pad))
                n = (wide.shape[-1] - 4) // 2 + 1
                h = sum(f[k] * wide[..., k : k + 2 * n - 1 : 2] for k in range(4))
            else:
                wide = h.new_zeros(*h.shape[:-1], 2 * h.shape[-1] + 2)
                for k in range(4):
                    wide[..., k : k + 2 * h.shape[-1] - 1 : 2] += 2 * f[k] * h
                h = wide[..., 1:-1]
            h = h.movedim(-1, axis)
        return h

    def block(self, h: Tensor, name: str, out: int, emb: Tensor, way: str = "", attends: bool = False) -> Tensor:
        scale = math.sqrt(0.5) if self.song else 1.0
        y = F.silu(self.norm(h, f"{name}.norm0"))
        y = self.conv(self.resample(y, f"{name}.conv0", way) if way else y, f"{name}.conv0", out)
        e = self.linear(emb, f"{name}.affine", out if self.song else 2 * out)[..., None, None]
        if self.song:
            y = self.norm(y + e, f"{name}.norm1")
        else:
            y = self.norm(y, f"{name}.norm1") * (1 + e[:, :out]) + e[:, out:]
        y = self.conv(F.silu(y), f"{name}.conv1", out)
        skip = self.resample(h, f"{name}.skip", way) if way else h
        if h.shape[1] != out or (way and self.song):
            skip = self.conv(skip, f"{name}.skip", out, 1)
        h = (y + skip) * scale
        heads = 1 if self.song else out // 64
        if not attends or not heads:
            return h
        qkv = self.conv(self.norm(h, f"{name}.norm2"), f"{name}.qkv", 3 * out, 1)
        qkv = qkv.reshape(len(h), heads, out // heads, 3, -1)  # q, k and v of a channel side by side
        q, k, v = qkv.unbind(3)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(out // heads), 3)
        mixed = (v @ weights.transpose(2, 3)).reshape(h.shape)
        return (h + self.conv(mixed, f"{name}.proj", out, 1)) * scale

    @torch.no_grad()
    def __call__(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        half, width = self.width // 2, 4 * self.width
        steps = half - 1 if self.song else half
        angle = c_noise[:, None] * torch.tensor([10_000 ** (-j / steps) for j in range(half)])
        if self.ncsn:
            angle = 2 * math.pi * c_noise[:, None] * self.weight("map_noise.freqs", self.width)
        parts = (angle.sin(), angle.cos()) if self.song else (angle.cos(), angle.sin())
        emb = torch.cat(parts, 1)
        one_hot = torch.zeros(len(x), max(self.classes, 1))
        if label is not None:
            one_hot[label >= 0] = F.one_hot(label[label >= 0], self.classes).float()
        if self.classes and self.song:
            emb = emb + self.linear(one_hot * math.sqrt(self.classes), "map_label", emb.shape[1])
        emb = F.silu(self.linear(emb, "map_layer0", width))
        emb = self.linear(emb, "map_layer1", width)
        if self.classes and not self.song:
            emb = emb + self.linear(one_hot, "map_label", width, bias=False)
        emb = F.silu(emb)
        start = self.width if self.song else self.width * self.mults[0]
        h = self.conv(x, f"enc.{SIZE}x{SIZE}_conv", start)
        skips, top, inner = [h], len(self.mults) - 1, x
        for level, mult in enumerate(self.mults):
            side = f"enc.{SIZE >> level}x{SIZE >> level}"
            if level:
                h = self.block(h, f"{side}_down", h.shape[1], emb, "down")
                if self.ncsn:
                    name, shape = f"{side}_aux_residual", (h.shape[1], inner.shape[1], 3, 3)
                    y = F.conv2d(inner, self.weight(f"{name}.weight", *shape), padding=2)
                    y = self.filtered(y, name, "down", 0) + self.weight(f"{name}.bias", h.shape[1])[:, None, None]
                    h = inner = (h + y) / math.sqrt(2)
                skips.append(h)
            for number in range(self.blocks):
                attends = SIZE >> level in self.attention
                h = self.block(h, f"{side}_block{number}", self.width * mult, emb, attends=attends)
                skips.append(h)
        for level in range(top, -1, -1):
            side = f"dec.{SIZE >> level}x{SIZE >> level}"
            if level == top:
                h = self.block(h, f"{side}_in0", h.shape[1], emb, attends=True)
                h = self.block(h, f"{side}_in1", h.shape[1], emb)
            else:
                h = self.block(h, f"{side}_up", h.shape[1], emb, "up")
            for number in range(self.blocks + 1):
                attends = SIZE >> level in self.attention and (not self.song or number == self.blocks)
                both = torch.cat([h, skips.pop()], 1)
                h = self.block(both, f"{side}_block{number}", self.width * self.mults[level], emb, attends=attends)
        end = f"dec.{SIZE}x{SIZE}_aux_" if self.song else "out_"
        return self.conv(F.silu(self.norm(h, f"{end}norm")), f"{end}conv", 1)


CASES = {
    "ddpm++": Reference(),
    "ddpm++ with classes, three levels": Reference(mults=(2, 1, 2), blocks=2, attention=(8, 2), classes=3),
    "ncsn++ with classes": Reference("ncsn", mults=(1, 2, 1), classes=3),
    "adm without attention": Reference("adm", width=32, mults=(1, 1)),
    "adm with heads and classes": Reference("adm", width=128, mults=(1,), attention=(8,), classes=3),
}


def x_of(seed: str = "x") -> Tensor:
    return noise(seed, len(SIGMAS), 1, SIZE, SIZE)


def write(name: str, path, prefix: str = "model.", **more: Tensor) -> dict[str, Tensor]:
    """The state dict of an EDMPrecond of the case ``name``, written to ``path``."""
    reference = CASES[name]
    if not reference.weights:
        reference(x_of(), torch.zeros(len(SIGMAS)), LABELS if reference.classes else None)
    tensors = {prefix + key: tensor.contiguous() for key, tensor in {**reference.weights, **more}.items()}
    save_file(tensors, path)
    return tensors


def denoise(function, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """D(x; σ) = c_skip x + c_out F(c_in x; c_noise) [Karras22 eq. 7, table 1]."""
    sigma = sigma[:, None, None, None]
    total = sigma**2 + sigma_data**2
    inside = function(x / total.sqrt(), sigma.flatten().log() / 4)
    return sigma_data**2 / total * x + sigma * sigma_data / total.sqrt() * inside


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_denoiser_is_that_of_the_reference(name, tmp_path):
    write(name, path := tmp_path / "model.safetensors")
    imported = import_edm(path)
    reference, model, x, sigma = CASES[name], imported.model, x_of(), torch.tensor(SIGMAS)
    label = LABELS if reference.classes else None
    cond = None if label is None else Condition(label=label)
    c_noise = sigma.log() / 4
    expected = reference(x, c_noise, label)
    computed = model.network(x, c_noise, cond)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    x_t = x * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    expected = denoise(lambda h, c: reference(h, c, label), x_t, sigma)
    level = model.schedule(model.schedule.inverse(-2 * sigma.double().log()))
    computed = model.denoiser()(x_t, level, cond).x
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    if label is not None:  # power: another label is another image
        assert (reference(x, c_noise, label.roll(1)) - reference(x, c_noise, label)).abs().max() > 1e-2
    assert model.item_shape == (1, SIZE, SIZE)
    assert imported.sampling == "--solver heun --set variable=ratio --spacing karras --steps 18"


@torch.no_grad()
def test_a_network_of_zero_predicts_the_skip_and_the_loss_is_that_of_f(tmp_path):
    """c_skip x, with sigma_data of the flag; and the loss of [Karras22 eq. 8] is that of F with weight 1."""
    write("ddpm++", path := tmp_path / "model.safetensors", prefix="")
    model = import_edm(path, setting={"sigma_data": 0.25}).model
    before = model.network.state_dict()
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    level = NoiseLevel(model.schedule.inverse(-2 * sigma.log()), torch.ones(4).double(), sigma, -2 * sigma.log())
    x = noise("data", 4, 1, SIZE, SIZE) / 4
    values = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    u, eps = torch.tensor([0.1, 0.4, 0.6, 0.9]), noise("eps", 4, 1, SIZE, SIZE)
    at = model.schedule(model.times.sample(u)).sigma
    reference = CASES["ddpm++"]
    clean = values.float() / 127.5 - 1
    predicted = denoise(reference, clean + at.float()[:, None, None, None] * eps, at.float(), 0.25)
    weight = (at**2 + 0.25**2) / (at * 0.25) ** 2
    expected = weight * (predicted - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(model.loss(values, u, eps).double(), expected, rtol=1e-3, atol=0)
    for name in ("conv_out.weight", "conv_out.bias"):
        before[name].zero_()
    x_t = x_of("noisy") * (1 + sigma.float())[:, None, None, None]
    skip = (0.25**2 / (0.25**2 + sigma**2)).float()[:, None, None, None] * x_t
    torch.testing.assert_close(model.denoiser()(x_t, level).x, skip, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_it_draws_as_the_sampler_of_edm_does(tmp_path):
    """Algorithm 1 of [Karras22] from 80 to 0.002 in 6 steps, without the last one to 0."""
    write("ddpm++", path := tmp_path / "model.safetensors")
    model, reference, steps = import_edm(path).model, CASES["ddpm++"], 6
    sampler = Sampler("heun", steps, spacing="karras", settings={"variable": "ratio"}, clip=False)
    start = 80 * x_of("start")
    states = trajectory(
        model.sampling_denoiser(sampler),
        model.build_solver(sampler),
        model.noise_levels(sampler),
        start,
        lambda n: start[None][:0],
    )
    drawn = last_step(states).x
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(ends[0] + i / steps * (ends[1] - ends[0])) ** 7 for i in range(steps + 1)]
    x = start.double()
    for now, then in itertools.pairwise(sigmas):
        d = [(x - denoise(reference, x.float(), torch.full((4,), now))) / now]
        moved = x + (then - now) * d[0]
        d.append((moved - denoise(reference, moved.float(), torch.full((4,), then))) / then)
        x = x + (then - now) * (d[0] + d[1]) / 2
    torch.testing.assert_close(drawn.double(), x, rtol=0, atol=1e-4 * float(x.abs().max()))


def to_their_names(network, tensors, size):
    """The weights ``tensors`` of ``network`` under EDM's names: the inverse of `to_own_names`."""
    named = {}
    for own, theirs, heads in tensor_names(network, size):
        tensor = tensors[own]
        if heads:
            if own.split(".")[-2] == "qkv":
                tensor = tensor.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)
            tensor = tensor[..., None, None] if tensor.ndim > 1 else tensor
        named[theirs] = tensor
    if LABEL in tensors:
        null, rows = tensors[LABEL][0], tensors[LABEL][1:] - tensors[LABEL][0]
        first = network.embed.label_first
        named[MAP_LABEL] = rows.T / (len(rows) ** 0.5 if first else 1)
        named |= {"map_label.bias": null} if first else {}
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


def test_names_go_both_ways(tmp_path):
    for name in CASES:
        tensors = write(name, tmp_path / "model.safetensors", prefix="")
        network = import_edm(tmp_path / "model.safetensors").model.network
        back = to_their_names(network, network.state_dict(), SIZE)
        kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("resample_filter")}
        assert back.keys() == kept.keys()
        for key, tensor in kept.items():
            torch.testing.assert_close(back[key], tensor, rtol=0, atol=2e-6)
        again = to_own_names(network, back, SIZE)
        assert again.keys() == network.state_dict().keys()


def test_augmentation_labels_and_other_networks_in_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = write("ddpm++", path, prefix="ema/model.", map_augment=torch.zeros(1))
    tensors["ema/model.map_augment.weight"] = tensors.pop("ema/model.map_augment")
    save_file({**tensors, "net/model.map_layer0.weight": torch.zeros(3)}, path)
    imported = import_model(path)  # recognized
    assert imported.model.info["imported"]["from"] == "edm"
    assert "augmentation labels are left out" in imported.notes[2]


@pytest.mark.parametrize(
    ("change", "options", "cause"),
    [
        ({"model.map_noise.freqs": torch.ones(8)}, {}, "it is neither DDPM++ nor NCSN++"),
        ({"model.enc.4x4_aux_residual.weight": torch.ones(1)}, {}, "it is neither DDPM++ nor NCSN++"),
        ({"model.enc.4x4_aux_skip.weight": torch.ones(1)}, {}, "its way down has input skips"),
        ({"model.enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)}, {}, "is not that of DDPM++ and ADM"),
        ({"model.enc.9x9_conv.weight": torch.ones(1)}, {}, "it has no first convolution"),
        ({"model.enc.8x8_block1.conv0.weight": torch.ones(16)}, {}, "its levels have [1, 2] blocks"),
        ({"model.dec.8x8_aux_conv.weight": torch.ones(2, 16, 3, 3)}, {}, "1 channels of input and 2 of output"),
        ({"model.dec.8x8_aux_conv.weight": torch.full((1, 16, 3, 3), math.nan)}, {}, "NaN or infinite"),
        ({"model.extra": torch.ones(1)}, {}, "'extra' does not belong to this model"),
        ({"model.map_layer1.bias": torch.ones(3)}, {}, "has the shape (3,), not (64,)"),
        ({}, {"size": 16}, "its images have the size 8, not 16"),
        ({}, {"setting": {"precond": "vp"}}, "Only models with EDMPrecond can be imported"),
        ({}, {"setting": {"sigma": 1.0}}, "--set sigma: no such flag"),
        ({}, {"setting": {"sigma_min": 90}}, "not a model that is supported"),
        ({}, {"setting": {"sigma_data": "half"}}, "'half' is not of the type float"),
    ],
)
def test_files_and_flags_that_cannot_be_are_one_line(change, options, cause, tmp_path):
    tensors = write("ddpm++", path := tmp_path / "model.safetensors")
    save_file({**tensors, **change}, path)
    with pytest.raises(UndiffuseError) as raised:
        import_edm(path, **options)
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


def test_edms_own_pickles_are_refused(tmp_path):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(UndiffuseError, match="it is a pickle, a format that can hold code"):
        import_edm(path)

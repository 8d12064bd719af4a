"""Autoencoders of other libraries: files that the test writes, and outputs that are computed beside ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latent_models import tiny_autoencoder
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from undiffuse.data.from_array import from_array
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop.autoencoders import load_autoencoder
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.autoencoder import Autoencoder
from undiffuse.networks.autoencoder import KLAutoencoder, PositionAttention, ResidualBlock, TinyAutoencoder, TinyBlock
from undiffuse.networks.settings import MAX_DEPTH, MAX_LAYERS

DATA = from_array(np.random.default_rng(0).integers(256, size=(6, 3, 16, 16)), num_values=256, name="pictures")
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.18215,
    "shift_factor": 0.1,
}


def write_diffusers(folder, rename=lambda name: name, drop=(), **changes):
    """A folder as diffusers writes it, of random weights, and our network with the same weights."""
    torch.manual_seed(0)
    network = KLAutoencoder(3, 2, 4, (8, 16), 1, True, 4)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    tensors = {rename(name): t for name, t in network.state_dict().items() if name not in drop}
    tensors = {
        name: t[..., None, None] if "attentions" in name and t.ndim == 2 and rename("to_q") == "query" else t
        for name, t in tensors.items()
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return network


@pytest.mark.parametrize("where", ["", "vae"])
def test_a_folder_of_diffusers(where, tmp_path):
    network = write_diffusers(tmp_path / where)
    autoencoder = load_autoencoder(tmp_path, DATA)
    mean, log_var = autoencoder.encode(X)
    assert torch.equal(mean, network.encode(X)[0])
    assert torch.equal(log_var, network.encode(X)[1])
    assert autoencoder.latent_shape == (4, 8, 8)
    assert autoencoder.config.distribution == "none"
    assert (autoencoder.info["scaling_factor"], autoencoder.info["shift_factor"]) == (0.18215, 0.1)


def test_continuous_data_have_no_influence_on_what_is_imported(tmp_path):
    write_diffusers(tmp_path)
    one, other = (from_array(DATA.values.astype(np.float32) * factor) for factor in (1, 2))
    assert len({autoencoders.fingerprint(load_autoencoder(tmp_path, data)) for data in (one, other)}) == 1


def test_the_old_names_of_attention(tmp_path):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name):
        for new, earlier in names.items():
            name = name.replace(new, earlier)
        return name

    network = write_diffusers(tmp_path, old)
    assert torch.equal(load_autoencoder(tmp_path, DATA).encode(X)[0], network.encode(X)[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"_class_name": "VQModel"}, CheckpointError, "not an AutoencoderKL"),
        ({"act_fn": "relu"}, CheckpointError, "act_fn is relu"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, CheckpointError, "down_block_types"),
        ({"block_out_channels": None}, CheckpointError, "not the configuration"),
        ({"layers_per_block": 2}, CheckpointError, "is missing"),
        ({"block_out_channels": [8, 8, 8, 8, 8, 8]}, ConfigError, "cannot be divided by the factor 32"),
        ({"norm_num_groups": 3}, ConfigError, "divisible"),
    ],
)
def test_other_configurations_are_refused(changes, error, message, tmp_path):
    write_diffusers(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_autoencoder(tmp_path, DATA)


def test_damaged_and_missing_files(tmp_path):
    write_diffusers(tmp_path / "a")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="DAMAGED"):
        load_autoencoder(tmp_path / "a", DATA)
    weights.unlink()
    with pytest.raises(CheckpointError, match="NOT_FOUND"):
        load_autoencoder(tmp_path / "a", DATA)
    with pytest.raises(CheckpointError, match="NOT_FOUND"):
        load_autoencoder(tmp_path / "nothing", DATA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="0 pairs"):
        load_autoencoder(tmp_path / "empty", DATA)
    grey = from_array(np.zeros((2, 1, 16, 16), np.uint8), num_values=256, name="grey")
    write_diffusers(tmp_path / "b")
    with pytest.raises((CheckpointError, ConfigError), match=r"channels|shape"):
        load_autoencoder(tmp_path / "b", grey)


class Block(nn.Module):
    """The block of TAESD, written from its description."""

    def __init__(self, n, pooled):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, n, 3, padding=1), nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1),
        )  # fmt: skip
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(n, pooled, 1, bias=False), nn.GroupNorm(4, pooled), nn.ReLU(),
                nn.Conv2d(pooled, n, 1, bias=False),
            )  # fmt: skip

    def forward(self, x):
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(self.conv(x) + x)


def pair(folder, pooled):
    torch.manual_seed(1)

    def down():
        return nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False)

    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8, 0), down(), Block(8, 0), Block(8, 0), down(), Block(8, pooled),
        nn.Conv2d(8, 5, 3, padding=1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), Block(8, pooled), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), Block(8, 0), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), Block(8, 0), Block(8, 0), nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip
    names = {f"{int(name.split('.')[0]) + 1}.{name.split('.', 1)[1]}": t for name, t in decoder.state_dict().items()}
    save_file({name: t.half() for name, t in encoder.state_dict().items()}, folder / "tiny_encoder.safetensors")
    save_file({name: t.half() for name, t in names.items()}, folder / "tiny_decoder.safetensors")
    return encoder.half().float(), decoder.half().float()


@pytest.mark.parametrize("pooled", [0, 16])
def test_a_pair_like_that_of_taesd(pooled, tmp_path):
    """The shapes say stages, widths and the further branch; x in [−1, 1] here is [0, 1] there."""
    encoder, decoder = pair(tmp_path, pooled)
    autoencoder = load_autoencoder(tmp_path / "tiny_encoder.safetensors", DATA)
    z, log_var = autoencoder.encode(X)
    assert log_var is None
    assert autoencoder.is_deterministic
    torch.testing.assert_close(z, encoder((X + 1) / 2), rtol=0, atol=1e-6)
    torch.testing.assert_close((autoencoder.decode(z) + 1) / 2, decoder(3 * torch.tanh(z / 3)), rtol=0, atol=1e-6)
    assert autoencoder.latent_shape == (5, 4, 4)
    assert isinstance(load_autoencoder(tmp_path, DATA), Autoencoder)
    (tmp_path / "tiny_decoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"NOT_FOUND.*tiny_decoder"):
        load_autoencoder(tmp_path / "tiny_encoder.safetensors", DATA)


def test_an_own_file_may_have_encoder_in_its_name(tmp_path):
    """Its content says that it is a whole autoencoder: no decoder's file is looked for beside it."""
    autoencoders.save(tiny_autoencoder(), tmp_path / "digits-autoencoder.safetensors")
    loaded = load_autoencoder(tmp_path / "digits-autoencoder.safetensors", DATA)
    assert autoencoders.fingerprint(loaded) == autoencoders.fingerprint(tiny_autoencoder())


def test_the_default_is_the_size_of_taesd_and_blocks_have_a_limit():
    """1,222,532 and 1,222,531 parameters, those of TAESD's two files; the most blocks are allowed, and no more."""
    with torch.device("meta"):
        taesd = TinyAutoencoder()
        assert [sum(p.numel() for p in part.parameters()) for part in (taesd.encoder, taesd.decoder)] == [
            1_222_532,
            1_222_531,
        ]
        assert (taesd.factor, taesd.latent_shape((3, 16, 16))) == (8, (4, 2, 2))
        blocks = KLAutoencoder(1, widths=[4], blocks=MAX_LAYERS).encoder.down_blocks[0].resnets
        assert len(blocks) == MAX_LAYERS
        with pytest.raises(ConfigError, match="Give fewer"):
            KLAutoencoder(1, widths=[4], blocks=MAX_LAYERS + 1)
        assert KLAutoencoder(1, widths=[4] * MAX_DEPTH).factor == 2 ** (MAX_DEPTH - 1)
        with pytest.raises(ConfigError, match=f"Give 1 to {MAX_DEPTH} widths"):
            KLAutoencoder(1, widths=[4] * (MAX_DEPTH + 1))


@pytest.mark.parametrize("attention", [False, True])
def test_both_parts_have_attention_or_neither(attention):
    network = KLAutoencoder(1, widths=[4], attention=attention)
    for part in (network.encoder, network.decoder):
        assert any(isinstance(module, PositionAttention) for module in part.modules()) == attention


def test_the_pooled_branch_by_hand():
    """ReLU(conv(h') + h'), h' = h + wide(ReLU(norm(narrow(h)))), the norm of four groups."""
    torch.manual_seed(0)
    block, h = TinyBlock(6, 20), torch.randn(2, 6, 4, 4)
    narrow, norm, _, wide = block.pool
    grouped = narrow(h).unflatten(1, (4, 5)).flatten(2)
    normed = (grouped - grouped.mean(2, True)) / (grouped.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    pooled = h + wide(torch.relu(normed.reshape(2, 20, 4, 4)))
    torch.testing.assert_close(block(h), torch.relu(block.conv(pooled) + pooled))


@pytest.mark.parametrize(("in_width", "out_width"), [(4, 4), (4, 8)])
def test_the_residual_block_by_hand(in_width, out_width):
    """h, or its 1×1 convolution where the width changes, + conv₂(SiLU(norm₂(conv₁(SiLU(norm₁(h))))))."""
    torch.manual_seed(0)
    block, h = ResidualBlock(2, in_width, out_width, 2), torch.randn(2, in_width, 4, 4)
    y = block.conv1(F.silu(F.group_norm(h, 2, block.norm1.weight, block.norm1.bias, block.norm1.eps)))
    y = block.conv2(F.silu(F.group_norm(y, 2, block.norm2.weight, block.norm2.bias, block.norm2.eps)))
    shortcut = h if in_width == out_width else F.conv2d(h, block.conv_shortcut.weight, block.conv_shortcut.bias)
    torch.testing.assert_close(block(h), shortcut + y)


@pytest.mark.parametrize("quant", [(True, False), (False, True)])
def test_each_side_of_the_latents_may_have_a_convolution(quant):
    names = {name.split(".")[0] for name in KLAutoencoder(1, widths=[4], quant=quant).state_dict()}
    assert (names & {"quant_conv", "post_quant_conv"}) == {"quant_conv" if quant[0] else "post_quant_conv"}


def test_all_stages_but_the_last_change_the_size():
    """With the names of diffusers, the encoder's from the finest stage on and the decoder's from the coarsest."""
    names = KLAutoencoder(1, widths=[4, 4, 4]).state_dict()
    for part, kind in (("encoder.down_blocks", "downsamplers"), ("decoder.up_blocks", "upsamplers")):
        changing = {name.split(".")[2] for name in names if name.startswith(part) and kind in name}
        assert changing == {"0", "1"}

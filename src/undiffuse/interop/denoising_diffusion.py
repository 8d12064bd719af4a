"""Files of the Trainer of denoising-diffusion-pytorch: its Unet and GaussianDiffusion as an undiffuse model.

A file has the weights, their average, and the tables of the process; the objective follows from the table of the
loss's weights, and the arguments of Unet from names and shapes. `FLAGS` are the arguments that neither tells.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.interop.building import build_model, load_weights
from undiffuse.interop.flags import check_flags
from undiffuse.interop.foreign_files import ForeignFile, read_weights
from undiffuse.interop.parity import LIMIT, Check, Imported, network_difference, steps_of
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.denoising_diffusion_unet import THETA, DenoisingDiffusionUNet
from undiffuse.process.discrete_schedule import Tabulated
from undiffuse.runtime.atomic_file import file_digest
from undiffuse.runtime.device import kept_random_state

VERSIONS = "1.8 to 2.3"
FLAGS: dict[str, Any] = {
    "objective": "",
    "ema": True,
    "auto_normalize": True,
    "sinusoidal_pos_emb_theta": THETA,
    "attn_heads": 4,
    "resnet_block_groups": 8,
    "dropout": 0.0,
}
"""Arguments of the classes that no tensor tells, with their defaults, and whether to take the averaged weights.

An empty objective is inferred; attn_heads matter before version 1.9, resnet_block_groups before 2.0."""
TARGETS = {"pred_noise": "eps", "pred_x0": "x", "pred_v": "v"}
PREFIXES = {True: ("ema/ema_model.", "ema_model."), False: ("model/", "")}
"""Where the averaged (True) and the last weights of a GaussianDiffusion are, in a Trainer's file or in one of them."""
MARK = "init_conv.weight"
NAMES = {
    "embed.fc1.": "time_mlp.1.",
    "embed.fc2.": "time_mlp.3.",
    ".cond.": ".mlp.1.",
}
"""Parts of our names of weights, and theirs; the others are the same."""
BUFFERS = ("betas", "alphas_cumprod", "loss_weight")
OBJECTIVE_LIMIT, TABLE_LIMIT = 1e-3, 1e-6
"""The largest relative difference of the loss's weights from those of an objective, and of the signal's variance."""


def import_denoising_diffusion(
    source: str | Path,
    size: int | None = None,
    values: int = 256,
    unpickle: bool = False,
    setting: Mapping[str, Any] | None = None,
) -> Imported:
    """The model of the Trainer's file ``source``, of square images of ``size``; ``setting`` has flags of `FLAGS`.

    Compared with the package itself if that is installed. Raises `CheckpointError` and `ConfigError`.
    """
    path, flags = Path(source), check_flags(FLAGS, setting or {})
    if not flags["auto_normalize"]:
        cause = "images in [0, 1] are not centred for the network, and a model here has x in [-1, 1]"
        raise ConfigError("FLAG", "--set auto_normalize", cause, "Only models with auto_normalize can be imported")
    if size is None:
        raise ConfigError("SIZE", path, "its image_size is in no file", "Give size=64, or the size it was trained on")
    content = read_weights(path, unpickle)
    tensors, tables = select(path, content.tensors, flags["ema"])
    try:
        settings = infer_network(tensors, flags)
    except (LookupError, ValueError, IndexError) as error:
        cause = f"not a file of denoising-diffusion-pytorch {VERSIONS} ({error})"[:300]
        fix = "Give model-N.pt of its Trainer, with a GaussianDiffusion of a Unet"
        raise CheckpointError("DESCRIPTION", path, cause, fix) from None
    in_, out = tensors[MARK].shape[1], len(tensors["final_conv.weight"])
    learned, channels = out == 2 * in_, min(in_, out)
    table = step_noise(path, tables)
    T, (objective, limit) = len(table), infer_objective(path, tables, flags["objective"], learned)
    info: dict[str, Any] = {"name": path.stem, "num_values": values}
    info["imported"] = {"from": "denoising-diffusion-pytorch", "weights": file_digest(path), "flags": flags}
    model_settings = {
        "network": {"kind": "denoising-diffusion-unet", **settings, "dropout": flags["dropout"]},
        "schedule": {"name": "tabulated", "beta": table.tolist()},
        "target": {"name": TARGETS[objective]},
        "weight": {"name": "simple"} if limit is None else {"name": "min_snr", "limit": limit},
        "times": {"name": "steps"},
        "preconditioning": {"scale": "none", "time": "step"},
        "chain_length": T,
        "loss": "hybrid" if learned else "weighted_mse",
        "variance": "learned" if learned else "small",
    }
    model = build_model(
        path, model_settings, (channels, size, size), values, info, "docs/formats.md lists what can be imported"
    )
    network = model.network
    assert isinstance(network, DenoisingDiffusionUNet)
    named = {own_name(name): tensor for name, tensor in tensors.items()}
    load_weights(path, model, named)
    checks = [compare_with_package(model, settings, tensors), compare_tables(model, tables)]
    sampling = f"--solver ancestral --steps {T}"
    return Imported(model, checks, notes_of(content, flags, objective, limit, settings), sampling)


def own_name(name: str) -> str:
    """Our name of a weight, of theirs."""
    for own, theirs in NAMES.items():
        name = name.replace(theirs, own)
    return name


def select(path: Path, tensors: Mapping[str, Tensor], averaged: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights of the Unet, tables of the GaussianDiffusion) in a file: ``averaged``, or the last ones.

    A file of one GaussianDiffusion alone has no averaged weights. Raises `CheckpointError`.
    """
    averaged = averaged and any("ema_model." in name for name in tensors)
    prefix = next((prefix for prefix in PREFIXES[averaged] if f"{prefix}model.{MARK}" in tensors), None)
    if prefix is None:
        cause = f"it has no {'averaged ' if averaged else ''}weights of a GaussianDiffusion (model.{MARK})"
        fix = "Give model-N.pt of its Trainer, or the state dict of a GaussianDiffusion"
        raise CheckpointError("DESCRIPTION", path, cause, fix)
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    weights = {name.removeprefix("model."): tensor for name, tensor in own.items() if name.startswith("model.")}
    tables = {name: own[name] for name in BUFFERS if name in own}
    for name, table in tables.items():
        if not torch.isfinite(table).all():
            cause = f"the table {name!r} holds values that are NaN or infinite"
            raise CheckpointError("NON_FINITE", path, cause, "Copy the file again")
    return weights, tables


def infer_network(tensors: Mapping[str, Tensor], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the network, from the names and shapes of its weights. Raises LookupError, ValueError."""
    if "time_mlp.0.weights" in tensors:
        raise ValueError("its embedding of the time is learned or random")
    dim, widths, full, heads, head_widths = tensors["time_mlp.1.weight"].shape[1], [], [], [], []
    memory = 0
    for level in itertools.count():
        if f"downs.{level}.0.block1.proj.weight" not in tensors:
            break
        out = next(tensors[n] for n in (f"downs.{level}.3.1.weight", f"downs.{level}.3.weight") if n in tensors)
        widths.append(len(out))
        full.append(f"downs.{level}.2.to_out.weight" in tensors)
        inner = len(tensors[f"downs.{level}.2.to_qkv.weight"]) // 3
        kept = tensors.get(f"downs.{level}.2.mem_kv")
        heads.append(flags["attn_heads"] if kept is None else kept.shape[1])
        memory = 0 if kept is None else kept.shape[2 if full[-1] else 3]
        if heads[-1] < 1:
            raise ValueError(f"attn_heads = {heads[-1]}")
        head_widths.append(inner // heads[-1])
    if not widths or any(width % dim for width in widths):
        raise ValueError(f"its levels have {widths} channels, with dim {dim}")
    in_, out = tensors[MARK].shape[1], len(tensors["final_conv.weight"])
    if in_ != out and in_ != 2 * out and out != 2 * in_:
        raise ValueError(f"it has {in_} channels of input and {out} of output")
    groups = 0 if "downs.0.0.block1.norm.g" in tensors else flags["resnet_block_groups"]
    first = len(tensors[MARK])
    return {
        "dim": dim,
        **({"init_dim": first} if first != dim else {}),
        "dim_mults": [width // dim for width in widths],
        "full_attn": full,
        "attn_heads": heads,
        "attn_dim_head": head_widths,
        "num_mem_kv": memory,
        "resnet_block_groups": groups,
        "sinusoidal_pos_emb_theta": float(flags["sinusoidal_pos_emb_theta"]),
        "self_condition": in_ == 2 * out,
    }


def step_noise(path: Path, tables: Mapping[str, Tensor]) -> Tensor:
    """beta of each step in float64, to the rounding of float32 in beta and in 1 − beta. Raises `CheckpointError`.

    Their tables are the float32 of a float64 computation: beta itself where it is small, else that of alphas_cumprod.
    """
    single, bar = tables.get("betas"), tables.get("alphas_cumprod")
    if single is None or bar is None or single.ndim != 1 or single.shape != bar.shape or not len(single):
        cause = "its tables betas and alphas_cumprod are missing or of different lengths"
        raise CheckpointError("DESCRIPTION", path, cause, "Give the state dict of a whole GaussianDiffusion")
    single, bar = single.double(), bar.double()
    ratio = 1 - bar / torch.cat([torch.ones_like(bar[:1]), bar[:-1]])
    table = torch.where(single < 0.5, single, ratio)
    if not bool(((table > 0) & (table < 1)).all()):
        raise CheckpointError("DESCRIPTION", path, "its betas are not all in (0, 1)", "Copy the file again")
    return table


def infer_objective(path: Path, tables: Mapping[str, Tensor], given: str, learned: bool) -> tuple[str, float | None]:
    """The objective, and the limit of the signal-to-noise ratio in its loss's weight (None without min-SNR).

    The weight is min(SNR, limit) times 1/SNR (pred_noise), 1 (pred_x0) or 1/(SNR + 1) (pred_v). A model of a learned
    variance (LearnedGaussianDiffusion) predicts noise without a weight. Raises `CheckpointError` and `ConfigError`.
    """
    if given and given not in TARGETS:
        raise ConfigError("FLAG", "--set objective", f"{given!r} is unknown", f"Use {', '.join(TARGETS)}")
    if learned:
        return "pred_noise", None
    weight = tables.get("loss_weight")
    if weight is None:
        if not given:
            cause = "its objective is not known without the table loss_weight"
            raise CheckpointError("DESCRIPTION", path, cause, "Give --set objective=pred_v, pred_noise or pred_x0")
        return given, None
    log_bar = torch.log1p(-step_noise(path, tables)).cumsum(0)
    snr = log_bar.exp() / -torch.expm1(log_bar)
    best: tuple[float, str, float] | None = None
    if weight.shape == snr.shape:
        for objective, scale in (("pred_noise", snr), ("pred_x0", torch.ones_like(snr)), ("pred_v", snr + 1)):
            clipped = weight.double() * scale
            limit = float(clipped.max())
            error = float(((clipped - snr.clamp(max=limit)).abs() / snr.clamp(max=limit)).max())
            if error == error and (best is None or error < best[0]):
                best = (error, objective, limit)
    if best is None or best[0] > OBJECTIVE_LIMIT:
        if given:
            return given, None
        cause = "its table loss_weight fits none of pred_noise, pred_x0 and pred_v"
        raise CheckpointError("DESCRIPTION", path, cause, "Give --set objective=pred_v, pred_noise or pred_x0")
    _, objective, limit = best
    if given and given != objective:
        cause = f"{given!r} with the loss_weight of {objective!r}"
        raise ConfigError("FLAG", "--set objective", cause, "Leave it out")
    is_clipped = limit < float(snr.max()) * (1 - OBJECTIVE_LIMIT)
    return objective, float(f"{limit:.5g}") if is_clipped else None


def compare_tables(model: Diffusion, tables: Mapping[str, Tensor]) -> Check:
    """The largest difference of our ᾱ from that of the file."""
    assert isinstance(model.schedule, Tabulated)
    squares = torch.stack([level.alpha**2 for level in model.chain[:-1]]).flip(0)
    difference = float((squares - tables["alphas_cumprod"].double()).abs().max())
    return Check("alphas_cumprod", "the file", difference, TABLE_LIMIT)


def compare_with_package(model: Diffusion, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Check:
    """The difference from the outputs of the package itself; not measured where it is not installed."""
    what = "outputs of the network"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from denoising_diffusion_pytorch import Unet  # pyright: ignore
            from denoising_diffusion_pytorch.version import __version__  # pyright: ignore
    except (ImportError, RuntimeError, OSError) as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not work here"
        return Check(what, f"nothing: denoising-diffusion-pytorch {found}", None, LIMIT)
    against = f"denoising-diffusion-pytorch {__version__}"
    if settings["resnet_block_groups"] or settings["num_mem_kv"] != 4:
        return Check(what, f"nothing: {against} has other layers than the version that wrote it", None, LIMIT)
    lists = ("dim_mults", "full_attn", "attn_heads", "attn_dim_head")
    same = {name: tuple(settings[name]) for name in lists}
    same |= {name: settings.get(name) for name in ("dim", "init_dim", "sinusoidal_pos_emb_theta", "self_condition")}
    with kept_random_state():
        theirs = Unet(**same, channels=model.item_shape[0], out_dim=len(tensors["final_conv.weight"])).eval()
    theirs.load_state_dict(dict(tensors))

    def outputs(x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        return theirs(x, time)

    difference = network_difference(model.network, outputs, model.x_shape, steps_of(model.chain_length))
    return Check(what, against, difference, LIMIT)


def notes_of(
    content: ForeignFile, flags: Mapping[str, Any], objective: str, limit: float | None, settings: Mapping[str, Any]
) -> list[str]:
    """What the user should know: the weights, the objective, and what sampling here does not do."""
    averaged = flags["ema"] and any("ema_model." in name for name in content.tensors)
    step, version = content.facts.get("step"), content.facts.get("version")
    where = f", step {step}" if step is not None else ""
    where += f", version {version}" if version is not None else ""
    kind = "averaged" if averaged else "last"
    clip = f", min-SNR weight with limit {limit:g}" if limit is not None else ""
    notes = [f"{kind} weights{where}; objective {objective}{clip}"]
    if settings["self_condition"]:
        notes.append(
            "self-conditioning: the network gets zeros, as in half of its training, not its previous prediction; "
            "images differ from those of the package"
        )
    return notes

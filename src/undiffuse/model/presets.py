"""Whole recipes by name: a network with the process and the training that suit it. Importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.model.config import Config, ModelConfig, Settings, TrainConfig
from undiffuse.process.clean_end import clean_end


def _unet(**settings: Any) -> Settings:
    return {"kind": "unet", **settings}


_CPU_SMALL = _unet(
    widths=(64, 96),
    blocks=1,
    attention=(),
    heads=3,
    patch=2,
    learned_resampling=False,
    fourier=(6, 7),
    norm="layer",
)

PRESETS: dict[str, Config] = {
    # 8×8 images of 17 values on two CPU cores, in seconds; the Fourier features have periods of four and two values.
    # Muon and dropout: the bound of test digits is 0.03 to 0.05 bits/dim lower after five minutes of processor time
    "digits": Config(
        ModelConfig(
            network=_unet(
                widths=(32, 64),
                blocks=1,
                attention=(),
                heads=2,
                dropout=0.1,
                learned_resampling=False,
                fourier=(2, 3),
            ),
            output="categorical",
        ),
        TrainConfig(batch=128, lr=6e-3, optimizer="muon", ema=0.05),
    ),
    # 8-bit images of 28 to 64 pixels on two CPU cores, in minutes; the Fourier features as for digits. Middle noise
    # levels are drawn more often: on Fashion-MNIST the Fréchet distance is lower after five minutes with 3 of 3 seeds
    "cpu-small": Config(
        ModelConfig(
            network=_CPU_SMALL,
            times={"name": "log_normal_sigma", "mean": -0.5, "std": 1.5},
            output="categorical",
        ),
        TrainConfig(batch=64, lr=3e-3, optimizer="muon", ema=0.05),
    ),
    # the bound as loss: where log-SNR is linear in t, its weight on eps is 1. Low noise levels are drawn more
    # often than others: on Fashion-MNIST the bound is 0.08 bits/dim lower after five minutes of processor time. The
    # chain's bound is above the continuous one by 0.025 bits/dim with 1,000 steps, by 0.005 with 4,000
    "likelihood": Config(
        ModelConfig(
            network=_CPU_SMALL,
            weight={"name": "simple"},
            times={"name": "log_normal_sigma", "mean": -1.2, "std": 1.8},
            chain_length=4000,
            output="categorical",
        ),
        TrainConfig(batch=64, lr=3e-3, optimizer="muon", ema=0.05),
    ),
    # images of 32 to 64 pixels on one GPU
    "gpu": Config(
        ModelConfig(
            network=_unet(widths=(128, 256, 256), blocks=3, attention=(1, 2), heads=4, dropout=0.1, scale_shift=True),
            output="categorical",
        ),
        TrainConfig(batch=256, lr=3e-4, warmup=1000, ema=0.05),
    ),
    # Ho et al. 2020, CIFAR-10: 35,746,307 parameters with 3 channels
    "ddpm-cifar10": Config(
        ModelConfig(
            network=_unet(widths=(128, 256, 256, 256), blocks=2, attention=(1,), heads=1, dropout=0.1),
            schedule={"name": "linear", "T": 1000},
            target={"name": "eps"},
            weight={"name": "simple"},
            times={"name": "steps"},
            preconditioning={"scale": "none", "time": "step"},
            variance="large",
        ),
        TrainConfig(
            batch=128, lr=2e-4, warmup=5000, decay=0.0, betas=(0.9, 0.999), ema=0.05, max_steps=800_000, flip=True
        ),
    ),
    # Dhariwal & Nichol 2021, ImageNet 64×64, with a third of the widths and two levels with attention of three:
    # 12.3 M parameters in place of 296 M. docs/recipes.md has the paper's own sizes
    "adm": Config(
        ModelConfig(
            network=_unet(
                widths=(64, 128, 192),
                blocks=2,
                attention=(1, 2),
                head_width=64,
                dropout=0.1,
                scale_shift=True,
                residual_resampling=True,
            ),
            schedule={"name": "cosine", "T": 1000},
            target={"name": "eps"},
            weight={"name": "simple"},
            times={"name": "steps"},
            preconditioning={"scale": "none", "time": "step"},
            loss="hybrid",
            variance="learned",
        ),
        TrainConfig(batch=128, lr=1e-3, ema=0.05),
    ),
    # Sohl-Dickstein et al. 2015: mean and variance of every step learned by the bound, one random step an item
    "sohl-dickstein": Config(
        ModelConfig(network=_CPU_SMALL, times={"name": "steps"}, loss="bound", variance="learned"),
        TrainConfig(batch=64, lr=1e-3, ema=0.05),
    ),
    # Song and Ermon 2019 in units of [−1, 1]: ten levels from 2 to 0.02 below the prior's, for "annealed_langevin"
    "ncsn": Config(
        ModelConfig(
            network=_CPU_SMALL,
            schedule={"name": "variance_exploding", "sigma_min": 0.02, "sigma_max": round(0.02 * 100 ** (10 / 9), 4)},
            target={"name": "score"},
            weight={"name": "simple"},
            times={"name": "uniform", "low": 0.0},
            preconditioning={"scale": "unit", "time": "log_sigma"},
            chain_length=10,
        ),
        TrainConfig(batch=64, lr=1.5e-3, ema=0.05),
    ),
    # Kingma et al. 2021: the bound in continuous time, its noise levels learned with the network
    "vdm": Config(
        ModelConfig(
            network=_CPU_SMALL,
            schedule={"name": "learned"},
            times={"name": "uniform", "low": 0.0},
            loss="continuous",
        ),
        TrainConfig(batch=64, lr=1e-3, ema=0.05),
    ),
    "vector": Config(
        ModelConfig(
            network={"kind": "mlp", "width": 256, "depth": 4},
            schedule={"name": "linear_log_snr", "high": 10.0, "low": -6.0},
        ),
        TrainConfig(batch=512, lr=1e-3, ema=0.05),
    ),
    # sequences of some hundred steps
    "series": Config(
        ModelConfig(network=_unet(dims=1, widths=(64, 128, 128), blocks=1, attention=(2,), heads=4)),
        TrainConfig(batch=64, lr=1e-3),
    ),
    # volumes of about 16 to 32 cells a side
    "volume": Config(
        ModelConfig(network=_unet(dims=3, widths=(32, 64), blocks=1, attention=(), heads=2, patch=2)),
        TrainConfig(batch=16, lr=1e-3),
    ),
}
"""The recipe of each preset. What the networks cost is in docs/networks-notes.md."""

CLASSIFIER_POOLING = {"adm": "attention"}
"""The pooling of the classifier of a preset where it is not the mean."""


def choose(item_shape: tuple[int, ...], device: str) -> str:
    """The name of the preset for data of ``item_shape`` on ``device``, as torch calls it."""
    match len(item_shape):
        case 1:
            return "vector"
        case 2:
            return "series"
        case 4:
            return "volume"
    if max(item_shape[1:]) <= 12:
        return "digits"
    return "cpu-small" if device == "cpu" else "gpu"


def get(name: str) -> Config:
    """The recipe called ``name``. Raises `ConfigError`."""
    if name not in PRESETS:
        raise unknown_name("PRESET", name, "preset", PRESETS)
    return PRESETS[name]


def of_latents(config: Config) -> Config:
    """The recipe without what serves integer data: a categorical output, and Fourier features of the values."""
    network = {name: value for name, value in config.model.network.items() if name != "fourier"}
    return replace(config, model=replace(config.model, network=network, output="values"))


def adapt_to_data(config: Config, num_values: int | None, condition_sizes: Mapping[str, int] | None = None) -> Config:
    """The recipe for data of ``num_values`` values (None: continuous) with conditions of ``condition_sizes``.

    A log-SNR schedule without a clean end of its own ends (a learned one starts) at `clean_end`, where three standard
    deviations of noise fill half a bin. Without discrete values, or with too many, the output is "values". The network
    of a conditional recipe accepts all conditions of the data, that of any recipe their images. Raises `ConfigError`
    where it has other sizes.
    """
    from undiffuse.denoising.categorical_head import MAX_VALUES  # the table above is read without torch

    model = config.model
    if model.output == "categorical" and (num_values is None or num_values > MAX_VALUES):
        model = replace(model, output="values")
    schedule = model.schedule
    if num_values is not None and schedule.get("name") in ("linear_log_snr", "learned") and "high" not in schedule:
        model = replace(model, schedule={**schedule, "high": clean_end(num_values)})
    for name, size in (condition_sizes or {}).items():
        if name != "image" and not config.train.conditional:
            continue
        own = model.network.get(name, size)
        if type(own) is not int or (own < size if name == "text" else own != size):
            where = f"model.network.{name} = {own!r}"
            raise ConfigError("CONFIG", where, f"the data make it {size}", "Leave it out")
        model = replace(model, network={**model.network, name: own})
    return replace(config, model=model)

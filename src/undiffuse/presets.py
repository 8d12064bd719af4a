"""Whole recipes by name: the network of `networks.presets` with the process and the training that suit it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from undiffuse.config import Config, ModelConfig, TrainConfig
from undiffuse.errors import ConfigError
from undiffuse.lattice import MANY
from undiffuse.networks.presets import PRESETS as NETWORKS


def _recipe(network: str, train: TrainConfig | None = None, **model: object) -> Config:
    kind, settings = NETWORKS[network]
    return Config(ModelConfig(network={"kind": kind, **settings}, **model), train or TrainConfig())  # type: ignore[arg-type]


PRESETS: dict[str, Config] = {
    "digits": _recipe(
        "digits",
        TrainConfig(batch=128, lr=2e-3, ema=0.05),
        output="levels",
    ),
    "cpu-small": _recipe("cpu-small", TrainConfig(batch=64, lr=1.5e-3, ema=0.05), output="levels"),
    # the bound itself: where log-SNR is linear in t, weight 1 on eps is its own
    "likelihood": _recipe(
        "cpu-small", TrainConfig(batch=64, lr=2e-3, ema=0.05), weight={"name": "simple"}, output="levels"
    ),
    "gpu": _recipe("gpu", TrainConfig(batch=256, lr=3e-4, warmup=1000, ema=0.05), output="levels"),
    "ddpm-cifar10": _recipe(
        "ddpm-cifar10",
        TrainConfig(batch=128, lr=2e-4, warmup=5000, decay=0.0, betas=(0.9, 0.999), ema=0.05, steps=800_000, flip=True),
        schedule={"name": "linear", "T": 1000},
        target={"name": "eps"},
        weight={"name": "simple"},
        times={"name": "steps"},
        preconditioning={"scale": "none", "time": "step"},
        variance="large",
    ),
    # Sohl-Dickstein et al. 2015: mean and variance of every step learned by the bound itself, a random step an item
    "sohl-dickstein": _recipe(
        "cpu-small",
        TrainConfig(batch=64, lr=1e-3, ema=0.05),
        times={"name": "steps"},
        loss="bound",
        variance="learned",
    ),
    # Song et al. 2019 in units of [−1, 1]: ten levels from 2 to 0.02 below the prior's, walked by "annealed_langevin"
    "ncsn": _recipe(
        "cpu-small",
        TrainConfig(batch=64, lr=1.5e-3, ema=0.05),
        schedule={"name": "variance_exploding", "sigma_min": 0.02, "sigma_max": round(0.02 * 100 ** (10 / 9), 4)},
        target={"name": "score"},
        weight={"name": "simple"},
        times={"name": "uniform", "low": 0.0},
        preconditioning={"scale": "unit", "time": "log_sigma"},
        steps=10,
    ),
    # Kingma et al. 2021: the bound in continuous time, its noise levels learned with the network
    "vdm": _recipe(
        "cpu-small",
        TrainConfig(batch=64, lr=1e-3, ema=0.05),
        schedule={"name": "learned"},
        times={"name": "uniform", "low": 0.0},
        loss="continuous",
    ),
    "vector": _recipe(
        "vector",
        TrainConfig(batch=512, lr=1e-3, ema=0.05),
        schedule={"name": "linear_log_snr", "high": 10.0, "low": -6.0},
    ),
    "series": _recipe("series", TrainConfig(batch=64, lr=1e-3)),
    "volume": _recipe("volume", TrainConfig(batch=16, lr=1e-3)),
}


def choose(item_shape: tuple[int, ...], levels: int | None, device: str) -> str:
    """The preset that suits data of ``item_shape`` on ``device``: by its dimensions and size."""
    match len(item_shape):
        case 1:
            return "vector"
        case 2:
            return "series"
        case 4:
            return "volume"
    if max(item_shape[1:]) <= 12:
        return "digits"
    return "gpu" if device == "cuda" else "cpu-small"


def get(name: str) -> Config:
    """The recipe called ``name``. Raises `ConfigError`."""
    if name not in PRESETS:
        raise ConfigError("PRESET", repr(name), "no such preset", f"Use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def fitted(config: Config, levels: int | None, hearing: Mapping[str, int] | None = None) -> Config:
    """The recipe fitted to data of so many ``levels`` (None: continuous).

    The clean end of a default log-SNR schedule goes, or of a learned one starts, where three standard deviations of
    noise fill half a bin (`clean_end`); where there are no levels, or too many to name one by one, the network says
    values. That of a conditional recipe gets the settings ``hearing``, so that it hears all that the data tell.
    """
    model = config.model
    if model.output == "levels" and (levels is None or levels > MANY):
        model = replace(model, output="values")
    schedule = model.schedule
    if levels is not None and schedule.get("name") in ("linear_log_snr", "learned") and "high" not in schedule:
        model = replace(model, schedule={**schedule, "high": clean_end(levels)})
    for name, size in (hearing or {}).items() if config.train.conditional else ():
        if model.network.get(name, size) != size:
            where = f"model.network.{name} = {model.network[name]!r}"
            raise ConfigError("CONFIG", where, f"the data make it {size}", "Leave it out")
        model = replace(model, network={**model.network, name: size})
    return replace(config, model=model)


def clean_end(levels: int) -> float:
    """log-SNR at which about three standard deviations of noise fill half a bin: 13.3 + 2 log(levels/256)."""
    return round(13.3 + 2 * math.log(levels / 256), 3)

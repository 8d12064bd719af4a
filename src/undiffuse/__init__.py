"""Diffusion models with a likelihood you can publish: train on your own data, sample, measure in bits per dimension.

Names are imported when they are first used, so that ``undiffuse --help`` starts without torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Waiting threads that spin for long starve each other on a busy machine; threads that sleep at once make a training
# step on two free cores 1.45 times as long (docs/log.md). A short spin avoids both. It has an effect only before torch
# is loaded, and never overrides the user's own choice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.data.from_array import from_array
    from undiffuse.data.sources.registry import load as load_data
    from undiffuse.data.transform import DataTransform
    from undiffuse.denoising.denoiser import Clipped, Denoiser, NetworkDenoiser, Preconditioning, Prediction
    from undiffuse.denoising.guidance import Guide
    from undiffuse.evaluation.run_evaluation import EvaluationResult, evaluate
    from undiffuse.likelihood.nll import NLL
    from undiffuse.likelihood.reverse_chain import ReverseChain
    from undiffuse.likelihood.vlb import vlb
    from undiffuse.model.checkpoint import load, save
    from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.model.presets import get as preset
    from undiffuse.networks.condition import Condition
    from undiffuse.networks.registry import register
    from undiffuse.process.gaussian import Gaussian, diffuse, forward, posterior, reverse
    from undiffuse.process.noise_level import NoiseLevel, transition_frac
    from undiffuse.process.schedule import Schedule
    from undiffuse.process.target import Target
    from undiffuse.sampling.sampler import Sampler
    from undiffuse.sampling.solvers.solver import Solver
    from undiffuse.sampling.time_grids import time_grid
    from undiffuse.sampling.trajectory import Step, forward_trajectory, trajectory
    from undiffuse.training.diffusion_task import fit_diffusion as fit

__version__ = "0.1.0"

_EXPORTS = {
    "data.dataset": ("Dataset",),
    "data.from_array": ("from_array",),
    "data.transform": ("DataTransform",),
    "denoising.denoiser": ("Clipped", "Denoiser", "NetworkDenoiser", "Preconditioning", "Prediction"),
    "denoising.guidance": ("Guide",),
    "evaluation.run_evaluation": ("EvaluationResult", "evaluate"),
    "likelihood.nll": ("NLL",),
    "likelihood.reverse_chain": ("ReverseChain",),
    "likelihood.vlb": ("vlb",),
    "model.checkpoint": ("load", "save"),
    "model.config": ("Config", "ModelConfig", "TrainConfig", "replace_train"),
    "model.diffusion": ("Diffusion",),
    "networks.condition": ("Condition",),
    "networks.registry": ("register",),
    "process.gaussian": ("Gaussian", "diffuse", "forward", "posterior", "reverse"),
    "process.noise_level": ("NoiseLevel", "transition_frac"),
    "process.schedule": ("Schedule",),
    "process.target": ("Target",),
    "sampling.sampler": ("Sampler",),
    "sampling.solvers.solver": ("Solver",),
    "sampling.time_grids": ("time_grid",),
    "sampling.trajectory": ("Step", "forward_trajectory", "trajectory"),
}
_SOURCE = {name: (module, name) for module, names in _EXPORTS.items() for name in names}
_SOURCE |= {"load_data": ("data.sources.registry", "load"), "preset": ("model.presets", "get")}
_SOURCE |= {"fit": ("training.diffusion_task", "fit_diffusion")}

__all__ = [*_SOURCE, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _SOURCE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SOURCE[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Diffusion models with a likelihood you can publish: train on your own data, sample, measure in bits per dimension."""

import os

# Threads that spin while they wait starve each other where cores are shared (docs/log.md): let them sleep.
# It counts only if torch is not loaded yet, and only if nobody has chosen.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from undiffuse.checkpoint import load, save
from undiffuse.codec import Codec
from undiffuse.conditioning import Condition
from undiffuse.config import Config, ModelConfig, TrainConfig
from undiffuse.denoiser import Clipped, Denoiser, NetworkDenoiser, Preconditioning, Prediction
from undiffuse.diffusion import Diffusion
from undiffuse.grids import grid
from undiffuse.likelihood import NLL, vlb
from undiffuse.process.gaussian import Gaussian, diffuse, forward, posterior, reverse
from undiffuse.process.level import NoiseLevel, frac
from undiffuse.process.schedule import Schedule
from undiffuse.process.target import Target
from undiffuse.sample import Step, forward_trajectory, trajectory
from undiffuse.solvers import Solver
from undiffuse.train import fit

__version__ = "0.1.0"

__all__ = [
    "NLL",
    "Clipped",
    "Codec",
    "Condition",
    "Config",
    "Denoiser",
    "Diffusion",
    "Gaussian",
    "ModelConfig",
    "NetworkDenoiser",
    "NoiseLevel",
    "Preconditioning",
    "Prediction",
    "Schedule",
    "Solver",
    "Step",
    "Target",
    "TrainConfig",
    "diffuse",
    "fit",
    "forward",
    "forward_trajectory",
    "frac",
    "grid",
    "load",
    "posterior",
    "reverse",
    "save",
    "trajectory",
    "vlb",
]

"""Likelihoods, in nats, with their parts."""

from undiffuse.likelihood.compat import openai_log_prob, openai_vlb
from undiffuse.likelihood.continuous import finite_ends, vlb_continuous
from undiffuse.likelihood.dequantise import Constant, Dequantiser, OwnNoise, Uniform, Variational
from undiffuse.likelihood.discrete import prior_kl, step_nll, stratify, vlb
from undiffuse.likelihood.importance import chain_nll, importance, importance_weighted, tighten
from undiffuse.likelihood.integrate import Integrator
from undiffuse.likelihood.nll import NLL, concatenate, nll
from undiffuse.likelihood.ode import carry, ode_nll

__all__ = [
    "NLL",
    "Constant",
    "Dequantiser",
    "Integrator",
    "OwnNoise",
    "Uniform",
    "Variational",
    "carry",
    "chain_nll",
    "concatenate",
    "finite_ends",
    "importance",
    "importance_weighted",
    "nll",
    "ode_nll",
    "openai_log_prob",
    "openai_vlb",
    "prior_kl",
    "step_nll",
    "stratify",
    "tighten",
    "vlb",
    "vlb_continuous",
]

"""Likelihoods, in nats, with their parts."""

from undiffuse.likelihood.discrete import prior_kl, step_nll, stratify, vlb
from undiffuse.likelihood.nll import NLL, concatenate, nll

__all__ = ["NLL", "concatenate", "nll", "prior_kl", "step_nll", "stratify", "vlb"]

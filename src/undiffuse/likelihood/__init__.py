"""Exact likelihoods and variational bounds, in nats, each with its parts."""

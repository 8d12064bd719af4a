"""Denoisers: what every sampler and every likelihood calls."""

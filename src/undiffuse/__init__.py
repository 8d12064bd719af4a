"""Diffusion models with a likelihood you can publish."""

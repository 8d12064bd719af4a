"""Kinds of networks of the package by name, see `LazyTable`; `registry` adds those of users."""

from __future__ import annotations

from undiffuse.runtime.lazy_table import LazyTable, row

BUILT_IN_NETWORKS = LazyTable(
    {
        "unet": row("networks.unet", "UNet"),
        "mlp": row("networks.mlp", "MLP"),
    }
)
"""The class of each kind."""

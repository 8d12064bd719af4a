"""Kinds of networks by name, see `LazyTable`; `registry` adds those of users."""

from __future__ import annotations

from undiffuse.runtime.lazy_table import LazyTable, row
from undiffuse.runtime.plugins import WithPlugins

BUILT_IN_NETWORKS = LazyTable(
    {
        "unet": row("networks.unet", "UNet"),
        "dit": row("networks.dit", "DiT"),
        "mlp": row("networks.mlp", "MLP"),
        "diffusers-unet": row("networks.diffusers_unet", "DiffusersUNet"),
        "denoising-diffusion-unet": row("networks.denoising_diffusion_unet", "DenoisingDiffusionUNet"),
        "edm-unet": row("networks.edm_unet", "EDMUNet"),
    }
)
"""The class of each kind."""
INSTALLED_NETWORKS = WithPlugins(BUILT_IN_NETWORKS, "undiffuse.networks")
"""Those and the kinds of plugins."""

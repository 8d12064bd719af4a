"""Spacings of noise levels and methods of restoration by name, see `LazyTable`."""

from __future__ import annotations

from undiffuse.runtime.lazy_table import LazyTable, row

SPACINGS = LazyTable(
    {
        "uniform": row("sampling.time_grids", "uniform"),
        "quadratic": row("sampling.time_grids", "quadratic"),
        "trailing": row("sampling.time_grids", "uniform"),
        "leading": row("sampling.time_grids", "leading"),
        "log_snr": row("sampling.time_grids", "log_snr"),
        "karras": row("sampling.time_grids", "karras"),
    }
)
"""Spacings of noise levels: (schedule, num_steps) -> rising times (num_steps + 1,) from 0."""

RESTORATION_METHODS = LazyTable(
    {
        "mmps": row("denoising.posterior_guidance", "MMPS", iterations=1),
        "pigdm": row("denoising.posterior_guidance", "PiGDM", data_std=0.5),
        "dps": row("denoising.posterior_guidance", "DPS", step=1.0),
        "repaint": row("sampling.solvers.repaint", "Repaint"),
        "product": row("sampling.solvers.product", "Product", repeats=4),
    }
)
"""Methods of `undiffuse.model.restoration`, with settings as measured in docs/inverse.md. ``repaint`` and ``product``
are solvers, the others are denoisers: (denoise, observation) -> denoiser."""
RESTORATION_STEPS = 100
"""Their steps, unless the model's chain is shorter or another number is given."""

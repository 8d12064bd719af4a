"""Schedules by name, see `LazyTable`."""

from __future__ import annotations

from undiffuse.runtime.lazy_table import LazyTable, row

SCHEDULES = LazyTable(
    {
        "linear": row("process.discrete_schedule", "linear"),
        "linear_rescaled": row("process.discrete_schedule", "linear_rescaled"),
        "quadratic": row("process.discrete_schedule", "quadratic"),
        "cosine": row("process.discrete_schedule", "cosine"),
        "diffusers": row("process.discrete_schedule", "diffusers"),
        "sigmoid": row("process.schedule", "Sigmoid"),
        "linear_log_snr": row("process.schedule", "LinearLogSNR"),
        "learned": row("process.learned_schedule", "LearnedSchedule"),
        "learned_chain": row("process.discrete_schedule", "LearnedChain"),
        "variance_exploding": row("process.schedule", "VarianceExploding"),
        "flow": row("process.schedule", "Flow"),
        "tabulated": row("process.discrete_schedule", "Tabulated"),
    }
)
"""Functions and classes that return a `Schedule` from its settings."""

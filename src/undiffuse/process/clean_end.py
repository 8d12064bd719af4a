"""The log-SNR at which a schedule for data with discrete values should start. Imports no torch: presets need it."""

from __future__ import annotations

import math


def clean_end(num_values: int) -> float:
    """log-SNR = 13.3 + 2 log(num_values/256): about three standard deviations of noise fill half a bin."""
    return round(13.3 + 2 * math.log(num_values / 256), 3)

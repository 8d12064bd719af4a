"""Training: `fit` and what it keeps in a run folder."""

from undiffuse.train.loop import Interrupted, fit
from undiffuse.train.run import Run

__all__ = ["Interrupted", "Run", "fit"]

"""Training: `fit` and what it keeps in a run folder."""

from undiffuse.train.loop import fit
from undiffuse.train.run import ChangedError, Run
from undiffuse.train.stop import Interrupted

__all__ = ["ChangedError", "Interrupted", "Run", "fit"]

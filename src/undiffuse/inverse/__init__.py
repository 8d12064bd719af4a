"""Inverse problems on a model of x: what x was, given y = A x + noise."""

from undiffuse.inverse.operators import Linear, blur, identity, mask, mean_pool, separable
from undiffuse.inverse.posterior import DPS, MMPS, Observation, PiGDM, Posterior
from undiffuse.inverse.repaint import Repaint, jumps

__all__ = ["DPS", "MMPS", "Linear", "Observation", "PiGDM", "Posterior", "Repaint", "blur", "identity", "jumps"]
__all__ += ["mask", "mean_pool", "separable"]

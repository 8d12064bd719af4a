"""Networks y(x, time, cond): functions of a tensor, a real number and a condition, independent of diffusion."""

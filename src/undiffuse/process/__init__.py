"""The mathematics of the diffusion process: noise levels, schedules, Gaussians, targets and weights. Torch only."""

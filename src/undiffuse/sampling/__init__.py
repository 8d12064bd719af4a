"""From noise to data: time grids, solvers, the loop over noise levels."""

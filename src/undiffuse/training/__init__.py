"""Training: one loop (`fit`), its tasks, and what a run folder holds."""

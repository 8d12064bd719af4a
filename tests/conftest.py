"""Shared by all tests: this folder is on the path (`import oracles`), examples are the same in every run."""

import torch
from hypothesis import settings

settings.register_profile("undiffuse", derandomize=True, deadline=None, database=None)
settings.load_profile("undiffuse")
torch.set_num_threads(1)

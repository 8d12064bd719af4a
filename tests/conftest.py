"""Shared by all tests: this folder is on the path (`import oracles`), examples never change; no network."""

import offline
import torch
from hypothesis import settings

settings.register_profile("undiffuse", derandomize=True, deadline=None, database=None)
settings.load_profile("undiffuse")
torch.set_num_threads(1)
offline.close()


def pytest_sessionfinish(session):
    if offline.attempts:
        session.exitstatus = 1
        print(f"\nreached out to the network: {offline.attempts}")

"""Shared by all tests: this folder is on the path (`import oracles`), examples never change; no network."""

import os
import shutil
import signal
from functools import cache
from pathlib import Path

import offline
import torch
import typer.main
from hypothesis import settings

from undiffuse.runtime import precision

settings.register_profile("undiffuse", derandomize=True, deadline=None, database=None)
settings.load_profile("undiffuse")
torch.set_num_threads(1)
for kind in (torch.cuda, torch.xpu, torch.mtia):
    if not kind.is_available():  # else each seed keeps the text of the stack for a device that is not there
        kind.manual_seed_all = lambda seed: None
typer.main.get_command = cache(typer.main.get_command)  # else each command line parses the options of all commands
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    signal.signal(number, usual)  # not ignored, as under nohup or in a background job: commands leave that as it is
offline.close()
precision.cpu_multiplies_bfloat16 = lambda: False  # the same numbers on every machine
if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 4e9:  # fsync takes most of a short run on disks
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


SLOWEST = (
    *("test_commands", "test_kill", "test_fit", "test_order", "test_processes", "test_default_grids"),
    *("test_sample_command", "test_bad_inputs", "test_golden_numbers", "test_library_use", "test_classifier"),
)
"""Files that take over ten seconds. They run first, so that two processes end at about the same time."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


def pytest_sessionfinish(session):
    if offline.attempts:
        session.exitstatus = 1
        print(f"\nreached out to the network: {offline.attempts}")

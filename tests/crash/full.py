"""Trains on small disks of its own: ``unshare --mount python full.py``, as root. Prints how many were full.

On a disk of each size a run trains until the disk is full, or to its end. Then the disk grows, and the run continues.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
from tiny_run import checkpoint_hashes, data, model_hashes, quick_looks, recipe, train

from undiffuse.errors import ResourceError
from undiffuse.training import train_state as state

ITEMS, RECIPE, STEPS = data(), recipe(8), 8
LARGE = "8m"


def mounted(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def outcome(run: Path) -> dict[str, str]:
    return checkpoint_hashes(run, STEPS) | model_hashes(run, ITEMS)


def fill(folder: Path, size: str, straight: dict[str, str]) -> bool:
    """Whether a disk of ``size`` was full before the end."""
    mounted(folder, f"size={size}")
    run, message = folder / "run", ""
    try:
        train(RECIPE, run, ITEMS)
    except ResourceError as error:
        message = str(error)
    if message:
        assert message.startswith(f"error[DISK] {run}"), message
        assert " bytes could not be written (No space left on device)" in message
    assert not list(folder.rglob("partial-*"))
    for step in (run / "checkpoints").glob("step-*"):
        state.verify_checkpoint(step)
    mounted(folder, "remount", f"size={LARGE}")
    train(RECIPE, run, ITEMS)
    assert outcome(run) == straight, size
    subprocess.run(["umount", str(folder)], check=True)
    return bool(message)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, quick_looks():
        straight = outcome(train(RECIPE, Path(place) / "straight", ITEMS))
        (disk := Path(place) / "disk").mkdir()
        sizes = [f"{4 * pages}k" for pages in (1, 2, 3, 5, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64)] + [LARGE]
        full = [fill(disk, size, straight) for size in sizes]
    assert full == sorted(full, reverse=True), full
    assert (full[0], full[-1]) == (True, False), full
    print(f"A4: disks of {', '.join(sizes)}: {sum(full)} of {len(full)} were full, 0 harm")


if __name__ == "__main__":
    main()

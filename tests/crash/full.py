"""Fills a disk of its own: ``unshare --mount python full.py FOLDER``, as root. Prints what came of each size.

In every size of the disk a run trains until there is no room, or to its end; then there is room, and it goes on.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch
from tiny_run import data, held, made, quick_looks, recipe, train

from undiffuse.errors import ResourceError
from undiffuse.train import state

ITEMS, RECIPE, STEPS = data(), recipe(8), 8
ROOM = "8m"


def mounted(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def outcome(run: Path) -> dict[str, str]:
    return held(run, STEPS) | made(run, ITEMS)


def fill(folder: Path, size: str, straight: dict[str, str]) -> bool:
    """Whether there was no room in ``size``."""
    mounted(folder, f"size={size}")
    run, said = folder / "run", ""
    try:
        train(RECIPE, run, ITEMS)
    except ResourceError as error:
        said = str(error)
    if said:
        assert said.startswith(f"error[DISK] {run}"), said
        assert " bytes could not be written (No space left on device)" in said
    assert not list(folder.rglob("partial-*"))
    for step in (run / "checkpoints").glob("step-*"):
        state._verify(step)
    mounted(folder, "remount", f"size={ROOM}")
    train(RECIPE, run, ITEMS)
    assert outcome(run) == straight, size
    subprocess.run(["umount", str(folder)], check=True)
    return bool(said)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, quick_looks():
        straight = outcome(train(RECIPE, Path(place) / "straight", ITEMS))
        (disk := Path(place) / "disk").mkdir()
        sizes = [f"{4 * pages}k" for pages in (1, 2, 3, 5, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64)] + [ROOM]
        full = [fill(disk, size, straight) for size in sizes]
    assert full == sorted(full, reverse=True), full
    assert (full[0], full[-1]) == (True, False), full
    print(f"A4: disks of {', '.join(sizes)}: {sum(full)} of {len(full)} were full, 0 harm")


if __name__ == "__main__":
    main()

"""A folder of photographs to try the command line on: square pieces of the two photographs in scikit-learn.

    python examples/photographs.py photos
    undiffuse train photos --size 32

600 PNG files of 96 by 96 pixels: temple roofs, trees, water, petals. Use a folder of your own photographs in its place.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE, PIECES, MIN_CONTRAST = 96, 600, 30


def main(folder: str | Path, pieces: int = PIECES) -> Path:
    """Write ``pieces`` squares, cut at random places, to ``folder``; it must not exist."""
    folder, random = Path(folder), np.random.default_rng(0)
    folder.mkdir(parents=True)
    photographs, done = load_sample_images().images, 0
    while done < pieces:
        photograph = photographs[done % len(photographs)]
        top, left = (int(random.integers(side - SIDE)) for side in photograph.shape[:2])
        piece = photograph[top : top + SIDE, left : left + SIDE]
        if piece.std() >= MIN_CONTRAST:  # neither empty sky nor dark background
            Image.fromarray(piece).save(folder / f"{done:03d}.png")
            done += 1
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/photographs.py FOLDER")
    print(f"{PIECES} pictures in {main(sys.argv[1])}")

"""Data sets by name: digits and Fashion-MNIST, which installed packages contain, and densities in the plane."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator

from undiffuse.data.dataset import Dataset
from undiffuse.data.sources.idx_files import parse_idx, read_content
from undiffuse.errors import ConfigError, DataError

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat")
FASHION_CLASSES += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_FILES = {  # name: sha256 of the decompressed file
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is a name in BUILTIN."""
    return isinstance(source, str) and source in BUILTIN


def load(source: str, *, folder: str | Path | None = None) -> Dataset:
    """The built-in data set called ``source``; ``folder`` contains the files of fashion-mnist."""
    if source == "fashion-mnist":
        return fashion_mnist(FASHION_FOLDER if folder is None else folder)
    if folder is not None:
        raise ConfigError("OPTION", "folder", f"{source} does not take this option", "Leave it out")
    return digits() if source == "digits" else toy(source)


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, (1797, 1, 8, 8), num_values 17; `DataError` without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        cause, fix = "scikit-learn, which contains the digits, is not installed", "pip install 'undiffuse[data]'"
        raise DataError("MISSING_PACKAGE", "digits", cause, fix) from None
    flat, labels = load_digits(return_X_y=True)
    values = np.asarray(flat).astype(np.uint8).reshape(-1, 1, 8, 8)
    classes = tuple(map(str, range(10)))
    return Dataset("digits", values, 17, np.asarray(labels).astype(np.int64), classes)


def fashion_mnist(folder: str | Path = FASHION_FOLDER) -> Dataset:
    """Fashion-MNIST, (70000, 1, 28, 28), num_values 256, from the four idx.gz files in ``folder``.

    The last 10,000 items are the official test part. Raises `DataError` for a file that is missing (MISSING_DATA),
    unreadable (CORRUPT) or not part of Fashion-MNIST (WRONG_DATA, by its sha256).
    """
    train, train_labels, test, test_labels = (_idx(Path(folder) / name, sha) for name, sha in FASHION_FILES.items())
    values = np.concatenate([train, test])[:, None]
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    return Dataset("fashion-mnist", values, 256, labels, FASHION_CLASSES, test_from=len(train))


def _idx(path: Path, sha256: str) -> np.ndarray:
    """The uint8 array in an idx.gz file with this sha256."""
    if not os.path.lexists(path):
        fix = "Install Debian's package dataset-fashion-mnist, or give a folder that contains the four files"
        raise DataError("MISSING_DATA", path, "no such file", fix)
    content = read_content(path)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            "WRONG_DATA", path, f"is not the file of Fashion-MNIST (sha256 {sha256[:8]}...)", "Fetch the file again"
        )
    return parse_idx(content)


Points = tuple[np.ndarray, np.ndarray | None]
"""Points (N, 2), and labels (N,) or None."""


def _two_moons(g: Generator, n: int) -> Points:
    """Half circles (cos θ, sin θ) and (1 − cos θ, 1/2 − sin θ), plus noise of standard deviation 0.06."""
    moon, angle = g.integers(2, size=n), np.pi * g.random(n)
    sign = 1 - 2 * moon
    arcs = np.stack([moon + sign * np.cos(angle), moon / 2 + sign * np.sin(angle)], 1)
    return arcs + 0.06 * g.standard_normal((n, 2)), moon


def _swiss_roll(g: Generator, n: int) -> Points:
    """The spiral r = θ/(3 π), θ from 3 π/2 to 9 π/2, plus noise of standard deviation 0.03."""
    angle = np.pi * (1.5 + 3 * g.random(n))
    spiral = (angle / (3 * np.pi))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return spiral + 0.03 * g.standard_normal((n, 2)), None


def _checkerboard(g: Generator, n: int) -> Points:
    """Uniform on the dark squares of a 4 × 4 board of unit squares around 0."""
    column, row = g.integers(4, size=n), 2 * g.integers(2, size=n)
    corner = np.stack([column, row + column % 2], 1) - 2.0
    return corner + g.random((n, 2)), None


def _eight_gaussians(g: Generator, n: int) -> Points:
    """Eight equal Gaussians of standard deviation 0.2 on the circle of radius 2."""
    component = g.integers(8, size=n)
    angle = np.pi / 4 * component
    return 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.2 * g.standard_normal((n, 2)), component


def _pinwheel(g: Generator, n: int) -> Points:
    """Five Gaussian arms at radius 1 (standard deviations 0.3 along, 0.1 across), each twisted by exp(radius)/4 rad."""
    arm = g.integers(5, size=n)
    along, across = 1 + 0.3 * g.standard_normal(n), 0.1 * g.standard_normal(n)
    angle = 2 * np.pi * arm / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([cos * along - sin * across, sin * along + cos * across], 1), arm


TOYS: dict[str, Callable[[Generator, int], Points]] = {
    "two-moons": _two_moons,
    "swiss-roll": _swiss_roll,
    "checkerboard": _checkerboard,
    "eight-gaussians": _eight_gaussians,
    "pinwheel": _pinwheel,
}


def toy(name: str, n: int = 10_000) -> Dataset:
    """``n`` points of the density called ``name``, (n, 2), continuous; the same points in every call."""
    points, part = TOYS[name](np.random.default_rng(0), n)
    classes = () if part is None else tuple(str(k) for k in range(int(part.max()) + 1))
    labels = None if part is None else part.astype(np.int64)
    return Dataset(name, points.astype(np.float32), None, labels, classes)


BUILTIN = ("digits", "fashion-mnist", *TOYS)

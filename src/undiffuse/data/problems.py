"""What can be wrong with a file, as a code, a reason and what to do about it."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from undiffuse.errors import DataError

FIXES = {
    "ANIMATED": "Give frames=first or frames=all, or one file for each frame",
    "ASPECT": "Give crop to cut the centre square out",
    "BAD_ARCHIVE": "Write the archive again with numpy.savez",
    "BAD_HEADER": "Write the file again",
    "BROKEN_LINK": "Mend or delete the link",
    "CHANGED_DURING_RUN": "Leave the data alone while they are used, and start again",
    "CONDITION": "Give finite numbers, vectors (N, D) or tokens (N, L, D), and a bool mask (N, L) with tokens only",
    "CORRUPT": "Fetch or export the file again, or delete it",
    "DTYPE": "Give bool, integers from 0, or floats of 16, 32 or 64 bits",
    "EMPTY_CLASS": "Put images into it, or delete the folder",
    "EMPTY_FILE": "Fetch or export the file again, or delete it",
    "FORMAT_NOT_ALLOWED": "Save it as PNG, JPEG, WebP, BMP, TIFF or GIF",
    "LABELS": "Give one whole number from 0 for each item, with no number left out",
    "LFS_POINTER": "Run git lfs pull",
    "MIXED_CHANNELS": "Give channels=1, 3 or 4 to convert them",
    "MIXED_DEPTH": "Save all with the same number of bits (channels=1 spreads 1-bit images to 8 bits)",
    "MIXED_SIZES": "Give size to resize them (and crop, where they are not square)",
    "MULTIPAGE": "Give frames=first or frames=all, or one file for each page",
    "NEEDS_RANGE": "Save the values as a float array in a .npy file",
    "NON_FINITE": "Mend or leave out the items that hold NaN or infinity",
    "NOT_AN_IMAGE": "Fetch the file again, or delete it",
    "NOT_A_REGULAR_FILE": "Take it out of the data",
    "NO_ARRAY": "Name the array images, x or data",
    "NO_IMAGES": "Give a folder that holds PNG, JPEG, WebP, BMP, TIFF or GIF files",
    "PATH_TOO_LONG": "Move the data to a shorter path",
    "PERMISSION": "Grant the right to read it",
    "PICKLE_REFUSED": "Pickles can run code; save the arrays as .npy, .npz or .safetensors",
    "RANGE": "Shift the values to start at 0, or save them as floats if they are continuous",
    "SHAPE": "Give the array as (N, D), (N, C, H, W), or say its layout",
    "SIZE_MISMATCH": "Write the file again",
    "TOO_LARGE": "Split or shrink the file",
    "TOO_LARGE_METADATA": "Save the image without its text or profile blocks",
    "TOO_MANY_PIXELS": "Cut the image into smaller ones",
    "TOO_SMALL": "Give a smaller size, allow upscaling, or delete the image",
    "TRUNCATED": "Fetch or export the file again, or delete it",
    "UNREADABLE": "Look at the disk, or copy the file anew",
    "UNSUPPORTED_COLOUR": "Save the image as grey or RGB",
    "UNSUPPORTED_DEPTH": "Save the image with 8 bits a channel, or as PNG of 16 bits, grey or RGB",
    "ZIP_BOMB": "Save the arrays as .npy or .safetensors",
}


class Refused(Exception):
    """One file's problem before its path is known: ``code`` of FIXES and ``reason`` without a full stop."""

    def __init__(self, code: str, reason: str, fix: str | None = None) -> None:
        self.code, self.reason, self.fix = code, reason, fix or FIXES[code]
        super().__init__(f"{code}: {reason}")

    def at(self, where: str | Path) -> DataError:
        """The one-line error that a person sees."""
        return DataError(self.code, where, self.reason, self.fix)


class Problem(NamedTuple):
    path: Path
    code: str
    reason: str


class BadFiles(DataError):
    """Every problem found in one pass: the line names the first and counts the rest, ``problems`` has all.

    ``summary`` replaces that count where the files are at odds with one another.
    """

    def __init__(self, problems: Sequence[Problem], summary: str | None = None) -> None:
        self.problems = list(problems)
        path, code, reason = self.problems[0]
        if summary:
            reason += f" ({summary})"
        elif more := Counter(problem.code for problem in self.problems[1:]):
            reason += f" (and {more.total()} more: {', '.join(f'{n} {c}' for c, n in more.most_common())})"
        super().__init__(code, path, reason, FIXES[code])


_ERRNO = {
    errno.ENOENT: ("BROKEN_LINK", "a link to nothing, or deleted since it was listed"),
    errno.ELOOP: ("BROKEN_LINK", "a link that leads back to itself"),
    errno.EACCES: ("PERMISSION", "may not be read"),
    errno.EPERM: ("PERMISSION", "may not be read"),
    errno.ENAMETOOLONG: ("PATH_TOO_LONG", "the path is longer than the system allows"),
}


def refusal(error: OSError) -> Refused:
    """What the operating system said, as a problem."""
    return Refused(*_ERRNO.get(error.errno or 0, ("UNREADABLE", f"cannot be read ({error.strerror or error})")))

"""Problems of data files: a code, a reason and a fix, and the errors made from them."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.errors import DataError

FIXES = {
    "ANIMATED": "Give frames=first or frames=all, or one file for each frame",
    "ASPECT": "Give crop=True to keep the centre square",
    "BAD_ARCHIVE": "Write the archive again with numpy.savez",
    "BAD_HEADER": "Write the file again",
    "BROKEN_LINK": "Repair or delete the link",
    "CAPTIONS": "Give each image a row file_name,text of metadata.csv or a text file of its name",
    "CHANGED_DURING_RUN": "Do not change the data during a run, and start again",
    "CONDITION": "Give finite vectors (N, D) or tokens (N, L, D), and a bool mask (N, L) with tokens only",
    "CORRUPT": "Fetch or export the file again",
    "DTYPE": "Give bool, integers from 0, or floats of 16, 32 or 64 bits",
    "EMPTY_CLASS": "Put images into it, or delete the folder",
    "EMPTY_FILE": "Fetch or export the file again",
    "FORMAT_NOT_ALLOWED": "Save it as PNG, JPEG, WebP, BMP, TIFF or GIF",
    "LABELS": "Give one whole number from 0 for each item, using every number up to the largest",
    "LFS_POINTER": "Run git lfs pull",
    "MIXED_CHANNELS": "Give channels=1, 3 or 4 to convert them",
    "MIXED_DEPTH": "Save all images with the same number of bits (channels=1 expands 1-bit images to 8 bits)",
    "MIXED_SIZES": "Give size=64 to resize them, and crop=True where they are not square",
    "MULTIPAGE": "Give frames=first or frames=all, or one file for each page",
    "NEEDS_RANGE": "Save the values as a float array in a .npy file",
    "NON_FINITE": "Repair or remove the items that hold NaN or infinity",
    "NOT_AN_IMAGE": "Give an image file in its place",
    "NOT_A_REGULAR_FILE": "Remove it from the data",
    "NO_ARRAY": "Name the array images, x or data",
    "NO_IMAGES": "Give a folder that holds PNG, JPEG, WebP, BMP, TIFF or GIF files",
    "PATH_TOO_LONG": "Move the data to a shorter path",
    "PERMISSION": "Grant permission to read it",
    "PICKLE_REFUSED": "Pickles can run code; save the arrays as .npy, .npz or .safetensors",
    "RANGE": "Shift the values to start at 0, or save them as floats if they are continuous",
    "SHAPE": "Give the array as (N, D) or (N, C, H, W), or name its order, such as layout=NHWC",
    "SIZE_MISMATCH": "Write the file again",
    "TOO_LARGE": "Split or shrink the file",
    "TOO_LARGE_METADATA": "Save the image without its text or profile blocks",
    "TOO_MANY_PIXELS": "Cut the image into smaller ones",
    "TOO_SMALL": "Give a smaller size, allow it with upscale=True, or delete the image",
    "TRUNCATED": "Fetch or export the file again",
    "UNREADABLE": "Check the disk, or copy the file again",
    "UNSUPPORTED_COLOUR": "Save the image as grey or RGB",
    "UNSUPPORTED_DEPTH": "Save the image with 8 bits per channel, or as PNG with 16 bits, grey or RGB",
    "ZIP_BOMB": "Save the arrays as .npy or .safetensors",
}


class FileError(Exception):
    """One problem of a file, without its path: a ``code`` of `FIXES` and a ``reason`` without full stop.

    `file_errors_at` turns it into the `DataError` that the user sees.
    """

    def __init__(self, code: str, reason: str, fix: str | None = None) -> None:
        self.code, self.reason, self.fix = code, reason, fix or FIXES[code]
        super().__init__(f"{code}: {reason}")

    def at(self, where: str | Path) -> DataError:
        """The same problem as an error of the file or source ``where``."""
        return DataError(self.code, where, self.reason, self.fix)


@contextmanager
def file_errors_at(where: str | Path) -> Iterator[None]:
    """Turn a FileError or an OSError of the block into a `DataError` of the file or source ``where``."""
    try:
        yield
    except FileError as error:
        raise error.at(where) from error.__cause__
    except OSError as error:
        raise os_error(error).at(where) from error


class FileProblem(NamedTuple):
    path: Path
    code: str
    reason: str


class BadFilesError(DataError):
    """All ``problems`` of one pass over the files; the message names the first and counts the others by code.

    ``summary`` replaces that count where the files contradict one another. ``remedy`` are the options of data with
    which all files can be read, if there are any. ``of_whole``: the only problem is one of all files together.
    ``skippable``: the other files can be read without these.
    """

    def __init__(
        self,
        problems: Sequence[FileProblem],
        summary: str | None = None,
        remedy: Mapping[str, Any] | None = None,
        of_whole: bool = False,
        skippable: bool = False,
    ) -> None:
        self.problems, self.of_whole = list(problems), of_whole
        self.remedy = dict(remedy or {})
        path, code, reason = self.problems[0]
        if summary:
            reason += f" ({summary})"
        elif more := Counter(problem.code for problem in self.problems[1:]):
            reason += f" (and {more.total()} more: {', '.join(f'{n} {c}' for c, n in more.most_common())})"
        fix = FIXES[code]
        if self.remedy:
            fix = f"Give {', '.join(f'{name}={value!r}' for name, value in self.remedy.items())}"
        elif skippable:
            fix += f", or give on_bad=skip to leave {'it' if len(self.problems) == 1 else 'these files'} out"
        super().__init__(code, path, reason, fix)


_ERRNO = {
    errno.ENOENT: ("BROKEN_LINK", "is a link to a missing file, or was deleted since it was listed"),
    errno.ELOOP: ("BROKEN_LINK", "is a link that leads back to itself"),
    errno.EACCES: ("PERMISSION", "may not be read"),
    errno.EPERM: ("PERMISSION", "may not be read"),
    errno.ENAMETOOLONG: ("PATH_TOO_LONG", "the path is longer than the system allows"),
}


def os_error(error: OSError) -> FileError:
    """The `FileError` for an error of the operating system."""
    return FileError(*_ERRNO.get(error.errno or 0, ("UNREADABLE", f"cannot be read ({error.strerror or error})")))

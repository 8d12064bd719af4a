import errno
from pathlib import Path

import pytest

from undiffuse.errors import DataError
from undiffuse.runtime.file_errors import FIXES, FileError, file_errors_at


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileError("SHAPE", "is flat"), f"error[SHAPE] a.npy: is flat. {FIXES['SHAPE']}."),
        (FileError("SHAPE", "is flat", "Reshape it"), "error[SHAPE] a.npy: is flat. Reshape it."),
        (OSError(errno.EACCES, "denied"), f"error[PERMISSION] a.npy: may not be read. {FIXES['PERMISSION']}."),
        (OSError(errno.EIO, "broken"), f"error[UNREADABLE] a.npy: cannot be read (broken). {FIXES['UNREADABLE']}."),
    ],
)
def test_errors_get_their_path(error, line):
    with pytest.raises(DataError) as caught, file_errors_at(Path("a.npy")):
        raise error
    assert str(caught.value) == line


def test_the_cause_is_kept_and_other_errors_pass():
    with pytest.raises(DataError) as caught, file_errors_at("a.npy"):
        raise FileError("SHAPE", "is flat") from ZeroDivisionError()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError), file_errors_at("a.npy"):
        raise ZeroDivisionError

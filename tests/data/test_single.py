"""`load_image`: one image file, and every way in which it is refused."""

import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from undiffuse.data import single
from undiffuse.data.single import load_image
from undiffuse.errors import DataError

PIXELS = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def path(tmp_path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_channels_and_levels(path, tmp_path):
    assert (load_image(path, 3).pixels == PIXELS.transpose(2, 0, 1)).all()
    assert load_image(path, 1).pixels.shape == (1, 4, 5)
    assert load_image(path, 1, (4, 5)).num_values == 256
    deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = load_image(tmp_path / "deep.png", 1, [4, 5])
    assert (image.num_values, image.pixels.max()) == (65536, 57000)


def test_refused_files(path, tmp_path, monkeypatch):
    def check(code: str, text: str, file: Path = path, size=None) -> None:
        with pytest.raises(DataError, match=text) as error:
            load_image(file, 1, size)
        assert "delete" not in error.value.fix
        assert (error.value.code, error.value.where) == (code, str(file))

    check("NO_FILE", "no such file", tmp_path / "b.png")
    check("NO_FILE", "it is a folder", tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    check("NO_FILE", "it is a pipe, a socket or a device", tmp_path / "pipe.png")
    check("SIZE", "it has 5 x 4 pixels instead of 4 x 5", size=(5, 4))
    (tmp_path / "text.png").write_text("not an image")
    check("NOT_AN_IMAGE", "its first bytes are not those of an image", tmp_path / "text.png")
    (tmp_path / "torn.png").write_bytes(path.read_bytes()[:-20])
    check("TRUNCATED", "bytes are missing", tmp_path / "torn.png")
    monkeypatch.setattr(single, "MAX_FILE_BYTES", 10)
    check("TOO_LARGE", "it has more than 10 bytes")
    monkeypatch.setattr(single, "MAX_FILE_BYTES", path.stat().st_size)
    assert load_image(path, 1).num_values == 256
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
    check("PERMISSION", "may not be read")

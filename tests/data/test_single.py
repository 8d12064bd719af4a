"""One image by name: what comes of it, and every way in which it is refused."""

from pathlib import Path

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
    assert load_image(path, 1, (4, 5)).levels == 256
    deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    picture = load_image(tmp_path / "deep.png", 1, [4, 5])
    assert (picture.levels, picture.pixels.max()) == (65536, 57000)


def test_what_is_refused(path, tmp_path, monkeypatch):
    def refused(code: str, said: str, where: Path = path, size=None) -> None:
        with pytest.raises(DataError, match=said) as error:
            load_image(where, 1, size)
        assert (error.value.code, error.value.where) == (code, str(where))

    refused("NO_FILE", "there is no such file", tmp_path / "b.png")
    refused("NO_FILE", "there is no such file", tmp_path)
    refused("SIZE", "it has 5 x 4 pixels, and 4 x 5 are needed", size=(5, 4))
    (tmp_path / "text.png").write_text("not an image")
    refused("NOT_AN_IMAGE", "no image format begins like this", tmp_path / "text.png")
    monkeypatch.setattr(single, "MAX_BYTES", 10)
    refused("TOO_LARGE", "it is larger than 10 bytes")
    monkeypatch.setattr(single, "MAX_BYTES", path.stat().st_size)
    assert load_image(path, 1).levels == 256

    def broken(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", broken)
    refused("PERMISSION", "may not be read")

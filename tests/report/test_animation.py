"""Animations are read back frame by frame; a program in the place of ffmpeg keeps its input."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.report.animation import animate, check_animation_path
from undiffuse.report.figures import image_grid

FRAMES = np.random.default_rng(0).integers(17, size=(5, 4, 1, 3, 3)).astype(np.uint8)


def encoder(folder, monkeypatch, body):
    """Puts a program ``ffmpeg`` that runs ``body`` on the path, alone."""
    program = folder / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(folder))


def test_a_gif_shows_every_frame_and_the_last_longer(tmp_path):
    path = tmp_path / "new" / "a.gif"
    animate(path, iter(FRAMES), 17)
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.info["loop"]) == (5, 0)
        for i, frame in enumerate(FRAMES):
            picture.seek(i)
            assert picture.info["duration"] == (1600 if i == 4 else 80)
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(image_grid(frame, 17)))


def test_ffmpeg_gets_every_frame_of_an_mp4(tmp_path, monkeypatch):
    encoder(tmp_path, monkeypatch, "open(sys.argv[-1][5:], 'wb').write(sys.stdin.buffer.read())")
    animate(tmp_path / "a.mp4", FRAMES, 17)
    shown = [np.asarray(image_grid(frame, 17).convert("RGB")) for frame in [*FRAMES, *[FRAMES[-1]] * 19]]
    assert (tmp_path / "a.mp4").read_bytes() == b"".join(frame.tobytes() for frame in shown)
    encoder(tmp_path, monkeypatch, "open('arguments', 'w').write(json.dumps(sys.argv[1:]))")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"a.mp4: this file exists"):  # an MP4 has no mark
        animate(tmp_path / "a.mp4", FRAMES, 17)
    animate(tmp_path / "b.mp4", FRAMES, 17)
    height, width = shown[0].shape[:2]
    arguments = (tmp_path / "arguments").read_text()
    assert f'"-s", "{width}x{height}", "-r", "12.5"' in arguments


def test_refused_paths_and_failures(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"a.png: not an animation format. Give a name that ends in .gif"):
        check_animation_path(tmp_path / "a.png")
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ConfigError, match=r"MP4 needs ffmpeg, which is not installed. Give a .gif name"):
        animate(tmp_path / "a.mp4", FRAMES, 17)
    check_animation_path(tmp_path / "a.gif")
    with pytest.raises(DataError):
        animate(tmp_path / "a.gif", np.zeros((2, 3)), None)
    encoder(tmp_path, monkeypatch, "sys.exit('no such codec')")
    with pytest.raises(ResourceError, match=r"ffmpeg failed \(no such codec\)"):
        animate(tmp_path / "a.mp4", FRAMES, 17)

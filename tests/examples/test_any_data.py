"""The examples of series, tables, volumes and transparent images, from data to picture, on runs of two steps."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from undiffuse.checkpoint import save
from undiffuse.config import Config, ModelConfig, TrainConfig
from undiffuse.data import load
from undiffuse.train.watch import Watch

FOLDER = Path(__file__).parents[2] / "examples"
TRAIN = TrainConfig(batch=8, steps=2, warmup=1, precision="float32", previews=0)
UNET = Config(ModelConfig(network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}, steps=5), TRAIN)
MLP = Config(ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5), TRAIN)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs without their last look."""
    monkeypatch.setattr(Watch, "finish", lambda watch: save(watch.smooth, watch.run.model))


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_series(tmp_path, capsys):
    pytest.importorskip("statsmodels", reason="its measurements are the data; the extra `examples` has it")
    series = example("series")
    seen = series.windows()
    assert seen.item_shape == (1, 104)
    np.testing.assert_allclose(seen.values.mean(-1), 0, atol=1e-3)
    early, late = seen.values[seen.test_from - 1], seen.values[seen.test_from]
    shifts = [np.abs(early[0, k:] - late[0, : 104 - k] - early[0, k] + late[0, 0]).max() for k in range(50)]
    assert min(shifts) > 0.3  # no week of the early windows is in the late ones
    picture = series.main(tmp_path, UNET)
    assert size(picture)[0] > 300
    said = capsys.readouterr().out
    assert all(word in said for word in ("learned from", "years after", "drawn", "weekly jump"))
    rise = np.arange(104.0) / 52
    told = series.told(np.stack([rise, rise + 5])[:, None])
    assert told == pytest.approx({"swing": 103 / 52, "a year's rise": 1, "its spread": 0, "weekly jump": 0}, abs=1e-12)


def test_tables(tmp_path, capsys):
    picture = example("tables").main(tmp_path, MLP)
    assert size(picture)[0] > 1000
    real, drawn = load(tmp_path / "wine.csv"), load(tmp_path / "drawn.csv")
    assert (real.columns, real.classes) == (drawn.columns, drawn.classes)
    assert real.values.shape == drawn.values.shape == (178, 13)
    assert np.array_equal(real.labels, drawn.labels)
    said = capsys.readouterr().out
    assert all(column in said for column in real.columns)
    assert "13.74 ± 0.46" in said  # alcohol of the first grower's


def test_volumes(tmp_path, capsys):
    volumes = example("volumes")
    balls = volumes.balls(20)
    assert (balls.shape, balls.dtype, balls.min(), balls.max()) == ((20, 1, 16, 16, 16), np.uint8, 0, 255)
    told = volumes.told(balls)
    assert told["out of round"] < 0.08
    assert 3.5 < told["radius"] < 5.5
    assert volumes.told(np.concatenate([balls[:1], balls[:1].transpose(0, 1, 4, 2, 3)]))["its spread"] < 1e-9
    assert volumes.told(np.full((1, 1, 16, 16, 16), 255))["out of round"] > 0.3  # a cube is no ball
    assert size(volumes.main(tmp_path, UNET, n=40))[0] > 300
    assert "drawn" in capsys.readouterr().out


def test_transparent(tmp_path):
    transparent = example("transparent")
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (24, 24, 4)).astype(np.uint8)
        pixels[:12, :, 3] = 0
        pixels[12:, :, :3] = (200, 100, i)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    picture = transparent.main(tmp_path, tmp_path / "out", UNET, n=9)
    assert size(picture) == (4 * 8 * 18, 4 * 2 * 18)
    assert len(list((tmp_path / "out" / "drawn").glob("*.png"))) == 9
    with Image.open(tmp_path / "out" / "drawn" / "000.png") as drawn:
        assert (drawn.mode, drawn.size) == ("RGBA", (16, 16))

"""The examples of series, tables, volumes and transparent images, from data to picture, with two training steps."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from undiffuse import Config, ModelConfig, TrainConfig, load_data
from undiffuse.training.monitor import Monitor

FOLDER = Path(__file__).parents[2] / "examples"
TRAIN = TrainConfig(batch=8, max_steps=2, warmup=1, precision="float32", previews=0)
UNET = {"kind": "unet", "widths": (8, 8), "blocks": 1, "attention": ()}
UNET_RECIPE = Config(ModelConfig(network=UNET, chain_length=3), TRAIN)
MLP_RECIPE = Config(ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=3), TRAIN)


@pytest.fixture(autouse=True)
def no_previews(monkeypatch):
    """Training without pictures of samples, which take most of its time here."""
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image_size(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_series(tmp_path, capsys):
    pytest.importorskip("statsmodels", reason="needs the extra `examples`")
    series = load_example("series")
    data = series.windows()
    assert data.item_shape == (1, 104)
    np.testing.assert_allclose(data.values.mean(-1), 0, atol=1e-3)
    early, late = data.values[data.test_from - 1], data.values[data.test_from]
    shifts = [np.abs(early[0, k:] - late[0, : 104 - k] - early[0, k] + late[0, 0]).max() for k in range(50)]
    assert min(shifts) > 0.3  # no week is in both parts
    assert image_size(series.main(tmp_path, UNET_RECIPE))[0] > 300
    output = capsys.readouterr().out
    assert all(word in output for word in ("training", "test", "generated", "weekly std"))
    years = np.arange(104.0) / 52
    statistics = series.statistics(np.stack([years, years + 5])[:, None])
    expected = {"range": 103 / 52, "rise": 1, "rise std": 0, "weekly std": 0}
    assert statistics == pytest.approx(expected, abs=1e-12)


def test_tables(tmp_path, capsys):
    assert image_size(load_example("tables").main(tmp_path, MLP_RECIPE))[0] > 1000
    data, generated = load_data(tmp_path / "wine.csv"), load_data(tmp_path / "generated.csv")
    assert (data.columns, data.classes) == (generated.columns, generated.classes)
    assert data.values.shape == generated.values.shape == (178, 13)
    assert np.array_equal(data.labels, generated.labels)
    output = capsys.readouterr().out
    assert all(column in output for column in data.columns)
    assert "13.74 ± 0.46" in output  # alcohol of the first class


def test_volumes(tmp_path, capsys):
    volumes = load_example("volumes")
    balls = volumes.balls(20)
    assert (balls.shape, balls.dtype, balls.min(), balls.max()) == ((20, 1, 16, 16, 16), np.uint8, 0, 255)
    statistics = volumes.statistics(balls)
    assert statistics["not round"] < 0.08
    assert 3.5 < statistics["radius"] < 5.5
    turned = np.concatenate([balls[:1], balls[:1].transpose(0, 1, 4, 2, 3)])
    assert volumes.statistics(turned)["filled std"] < 1e-9
    cube = np.full((1, 1, 16, 16, 16), 255)
    assert volumes.statistics(cube)["not round"] > 0.3
    assert image_size(volumes.main(tmp_path, UNET_RECIPE, n=40, n_samples=4))[0] > 150
    assert "generated" in capsys.readouterr().out


def test_transparent(tmp_path):
    random = np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 256, (24, 24, 4)).astype(np.uint8)
        pixels[:12, :, 3] = 0
        pixels[12:, :, :3] = (200, 100, i)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    picture = load_example("transparent").main(tmp_path, tmp_path / "out", UNET_RECIPE, n=9)
    assert image_size(picture) == (4 * 8 * 18, 4 * 2 * 18)
    assert len(list((tmp_path / "out" / "generated").glob("*.png"))) == 9
    with Image.open(tmp_path / "out" / "generated" / "000.png") as image:
        assert (image.mode, image.size) == ("RGBA", (16, 16))

"""The example that fills in half of an image, on a run of two steps."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_any_data import load_example

from undiffuse.data.sources import array_files
from undiffuse.model.checkpoint import save
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.training.diffusion_task import fit_diffusion as fit
from undiffuse.training.monitor import Monitor

CONFIG = Config(
    ModelConfig(network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}, chain_length=5),
    TrainConfig(batch=8, max_steps=2, warmup=1, precision="float32", held_out=0.2, previews=0),
)


@pytest.fixture(scope="module")
def example():
    return load_example("inpaint")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an array file and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("inpaint")
    for name, seed in (("data.npy", 0), ("other.npy", 1)):
        values = np.random.default_rng(seed).integers(256, size=(40, 64, 16)).astype(np.uint8)
        np.save(folder / name, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "finish", lambda watch: save(watch.ema_model, watch.run.model))  # without its last look
        fit(CONFIG, array_files.load(folder / "data.npy"), folder / "run", device="cpu", quiet=True)
    return folder


def test_known_pixels_stay_and_the_others_are_new(example, place):
    model = example.load(place / "run")
    values = torch.from_numpy(array_files.load(place / "data.npy").values[[0, 1]])
    mask = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    one, other, again = (example.inpaint(model, values, mask, seed, steps=3, repeats=2) for seed in (0, 1, 0))
    assert one.dtype == torch.uint8
    for found in (one, other):
        assert torch.equal(found[..., mask], values[..., mask])
    assert torch.equal(one, again)
    assert float((one != other)[..., ~mask].float().mean()) > 0.9


def test_the_picture_has_a_row_an_image(example, place):
    path = example.main(str(place / "run"), str(place / "data.npy"), images=2, steps=2, repeats=1)
    assert path == place / "run" / "pictures" / "inpainted.png"
    data = array_files.load(place / "data.npy")
    values = data.values[data.split(0.2).test[:2]]
    with Image.open(path) as picture:
        shown = np.asarray(picture.convert("L"))
    height, width = shown.shape
    assert (height - 2) % 2 == (width - 2) % 5 == 0  # tiles with gaps of two pixels between
    for row in range(2):
        tiles = [shown[2 + row * 66 :, 2 + column * 18 :][:64, :16] for column in range(5)]
        np.testing.assert_array_equal(tiles[0], values[row, 0])
        for tile in tiles[1:]:
            np.testing.assert_array_equal(tile[:, 8:], values[row, 0, :, 8:])
        assert len(np.unique(tiles[1][:, :8])) == 1
        assert not np.array_equal(tiles[2], tiles[3])


def test_other_data_are_refused(example, place):
    with pytest.raises(SystemExit, match="is not what this model was trained on"):
        example.main(str(place / "run"), str(place / "other.npy"))

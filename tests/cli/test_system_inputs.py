"""Bad captions and damaged models in the commands of every system: text, latents, cascade, fine-tuning, few calls."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_run import save_only

from undiffuse.cli import main
from undiffuse.training.monitor import Monitor

RECIPE = """[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
schedule = {name = "linear_log_snr", high = 6.0}
chain_length = 5
output = "values"
[train]
batch = 8
warmup = 1
precision = "float32"
previews = 0
snapshots = 0
"""
AUTOENCODER = """[model]
network = {kind = "kl", widths = [8, 8], latent_channels = 2, blocks = 1}
[train]
batch = 8
previews = 0
"""
STEPS = ("--steps", "1", "--device", "cpu", "--out")
WITH_CAPTIONS = {
    "text": "train DATA --captions --config RECIPE",
    "latents": "train DATA --captions --autoencoder autoencoder --config RECIPE",
    "enlarging": "train DATA --captions --from 4 --config RECIPE",
    "fine-tuning": "train DATA --captions --init text",
    "few calls": "distill text",
    "flow map": "distill text --method lagrangian",
}
OF_A_MODEL = {
    "latents": ("autoencoder", "train DATA --autoencoder autoencoder --config RECIPE"),
    "fine-tuning": ("text", "train DATA --captions --init text"),
    "few calls": ("text", "distill text"),
    "flow map": ("text", "distill text --method lagrangian"),
    "cascade": ("enlarging", "sample text --then enlarging --n 1"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, recipes, and runs of one step: an autoencoder, a model with captions, one that enlarges."""
    folder, random = tmp_path_factory.mktemp("systems"), np.random.default_rng(0)
    (folder / "data").mkdir()
    rows = [{"file_name": f"{i}.png", "text": ["a", "b"][i % 2] + " square"} for i in range(24)]
    for row in rows:
        Image.fromarray(random.integers(256, size=(8, 8)).astype(np.uint8)).save(folder / "data" / row["file_name"])
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "autoencoder.toml").write_text(AUTOENCODER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate_now", save_only)
        run(folder, "train-autoencoder DATA --config autoencoder.toml", "autoencoder")
        run(folder, WITH_CAPTIONS["text"], "text")
        run(folder, "train DATA --from 4 --config RECIPE", "enlarging")
    return folder


def run(folder, command, out):
    assert main(arguments(folder, command, folder / out)) == 0


def arguments(folder, command, out):
    names = {"DATA": "data", "RECIPE": "recipe.toml"}
    words = [names.get(word, word) for word in command.split()]
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    return [*words, *(STEPS[-1:] if words[0] == "sample" else STEPS), str(out)]


@pytest.mark.parametrize("command", WITH_CAPTIONS.values(), ids=WITH_CAPTIONS)
def test_a_bad_caption_is_one_line_and_nothing_is_written(command, place, call, tmp_path):
    table = place / "data" / "metadata.jsonl"
    good = table.read_text()
    rows = [json.loads(line) for line in good.splitlines()]
    rows[7]["text"] = " "
    try:
        table.write_text("\n".join(map(json.dumps, rows)))
        said = call(*arguments(place, command, tmp_path / "out"))
    finally:
        table.write_text(good)
    assert (said.code, said.err.count("\n")) == (3, 1), said.err
    assert "error[CAPTIONS]" in said.err
    assert "7.png" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "command"), OF_A_MODEL.values(), ids=OF_A_MODEL)
def test_a_damaged_model_is_one_line_and_nothing_is_written(name, command, place, call, tmp_path):
    """A flipped bit in the weights of the model that the command starts from."""
    file = place / name / "model.safetensors"
    shutil.copy(file, tmp_path / "good")
    damaged = bytearray(file.read_bytes())
    damaged[-40] ^= 4
    try:
        file.write_bytes(damaged)
        said = call(*arguments(place, command, tmp_path / "out"))
    finally:
        shutil.copy(tmp_path / "good", file)
    assert (said.code, said.err.count("\n")) == (4, 1), said.err
    assert "error[DAMAGED]" in said.err
    assert str(file) in said.err
    assert not (tmp_path / "out").exists()

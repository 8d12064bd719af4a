"""Checkpoints of training: complete or absent, and damage is found."""

import json
import random
import shutil

import pytest
import torch
from tiny_run import Trained, equal_states
from torch import nn

from undiffuse.errors import CheckpointError, NonFiniteError, ResourceError
from undiffuse.training import train_state as state
from undiffuse.training.progress import Progress


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 2 and 4, and what is in them."""
    folder = tmp_path / "checkpoints"
    first = Trained().train(2)
    first.write(folder)
    second = Trained().train(4)
    second.write(folder)
    return folder, first, second


def test_a_checkpoint_restores_training(two):
    folder, _, second = two
    again = Trained(seed=1)
    assert again.read(folder) == []
    assert equal_states(again, second)
    assert again.progress == Progress(4, 1.0, None, None)
    assert equal_states(again.train(3), Trained().train(7))  # as without the stop
    assert sorted(f.name for f in (folder / "step-00000004").iterdir()) == [
        "average.safetensors",
        "manifest.json",
        "network.safetensors",
        "optimizer.safetensors",
        "progress.json",
    ]
    again.progress.decay_from, again.progress.last_step = 3, 9
    again.write(folder)
    last = Trained(seed=2)
    last.read(folder)
    assert last.progress == Progress(7, 1.75, 3, 9)


def test_an_absent_folder_is_a_fresh_start(tmp_path):
    fresh = Trained()
    assert fresh.read(tmp_path / "none") == []
    assert fresh.progress == Progress()
    assert equal_states(fresh, Trained())
    before_the_first_step = Trained()
    before_the_first_step.write(tmp_path)
    assert fresh.read(tmp_path) == []


def test_only_the_newest_checkpoints_are_kept(tmp_path, monkeypatch):
    trained = Trained()
    for _ in range(5):
        trained.train().write(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    monkeypatch.setattr(state, "KEPT_CHECKPOINTS", 1)
    trained.train().write(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000006"]
    monkeypatch.setattr(state, "KEPT_CHECKPOINTS", 4)
    trained.train().write(tmp_path)
    trained.write(tmp_path)  # the same step again
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]


def test_an_infinite_weight_is_not_written(tmp_path):
    trained = Trained().train()
    with torch.no_grad():
        trained.network[0].bias[0] = torch.inf
    for status in ("there is no checkpoint yet", "the last checkpoint is good"):
        with pytest.raises(NonFiniteError, match=f"'0.bias' of its network is not finite.* Lower train.lr; {status}"):
            trained.write(tmp_path)
        Trained().train(2).write(tmp_path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def other(path):
    shutil.copy(path.parent.parent / "step-00000002" / path.name, path)


FILES = ["network.safetensors", "average.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"]


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove, other])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_reported_and_the_older_one_used(two, damage, name):
    folder, first, _ = two
    damage(folder / "step-00000004" / name)
    again = Trained(seed=1)
    (line,) = again.read(folder)
    assert line.startswith(f"error[DAMAGED] {folder / 'step-00000004'}")
    assert line.endswith("An older checkpoint is used.")
    assert "\n" not in line
    assert equal_states(again, first)
    assert again.progress.step == 2


def test_flipped_bits_are_detected(two):
    folder, first, _ = two
    g = random.Random(0)
    for _ in range(60):
        path = folder / "step-00000004" / g.choice(FILES)
        original = path.read_bytes()
        changed = bytearray(original)
        changed[g.randrange(len(original))] ^= 1 << g.randrange(8)
        path.write_bytes(changed)
        again = Trained(seed=1)
        assert len(again.read(folder)) == 1, path
        assert equal_states(again, first)
        path.write_bytes(original)


def test_without_an_intact_checkpoint_loading_fails(two):
    folder, _, _ = two
    for step in folder.iterdir():
        flip(step / "network.safetensors")
    with pytest.raises(CheckpointError, match=r"^error\[DAMAGED\] .*none of its 2 checkpoints is intact") as caught:
        Trained().read(folder)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_does_not_displace_intact_ones(two):
    """After resuming from step 2 because step 4 is damaged, steps 2 and 3 are kept."""
    folder, _, _ = two
    flip(folder / "step-00000004" / "network.safetensors")
    again = Trained(seed=1)
    again.read(folder)
    again.train().write(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_another_network_is_refused(two):
    folder, _, _ = two
    wider = Trained()
    wider.network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(CheckpointError, match="has the shape"):
        wider.read(folder)


def test_an_incomplete_write_is_ignored_and_removed(two):
    folder, _, second = two
    for name in ("partial-00000009", "trash-step-00000001"):
        shutil.copytree(folder / "step-00000002", folder / name)
    (folder / "partial-00000009" / "progress.json").write_text("{")
    state.finish_interrupted_writes(folder)
    again = Trained(seed=1)
    assert again.read(folder) == []
    assert equal_states(again, second)
    assert sorted(f.name for f in folder.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_write_that_lacks_only_the_rename_is_finished(two):
    """An older checkpoint of the same step has already been removed at that point."""
    folder, _, second = two
    (folder / "step-00000004").rename(folder / "partial-00000004")
    state.finish_interrupted_writes(folder)
    again = Trained(seed=1)
    assert again.read(folder) == []
    assert equal_states(again, second)
    shutil.copytree(folder / "step-00000002", folder / "partial-00000004")  # of another step; step 4 exists
    state.finish_interrupted_writes(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["step-00000002", "step-00000004"]
    assert again.read(folder) == []


@pytest.mark.parametrize(
    ("name", "call"), [("write_tensors", 2), ("write_atomic", 2), ("fsync_folder", 1), ("_discard", 1)]
)
def test_a_full_disk_leaves_the_old_checkpoints(two, monkeypatch, name, call):
    folder, _, second = two
    real, calls = getattr(state, name), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(state, name, fails)
    later = Trained().train(6)
    with pytest.raises(ResourceError, match="No space") as caught:
        later.write(folder)
    assert caught.value.exit_code == 6
    assert str(folder / "step-00000006") in str(caught.value)
    assert f"{sum(t.nbytes for t in later.tensors().values()):,} bytes" in str(caught.value)
    assert not list(folder.glob("partial-*"))  # it takes no space
    monkeypatch.undo()
    again = Trained(seed=1)
    assert again.read(folder) == []
    arrived = again.progress.step == 6
    assert equal_states(again, later if arrived else second)
    assert arrived == (name == "fsync_folder")  # it fails after the rename


def test_the_manifest_lists_every_file(two):
    folder, _, _ = two
    manifest = json.loads((folder / "step-00000004" / "manifest.json").read_text())
    assert sorted(manifest) == sorted(set(FILES) - {"manifest.json"})


def test_checkpoints_of_another_run_are_not_loaded(tmp_path):
    """Same shapes, other run: the older checkpoint of the own run is used, with a message."""
    mine, other = Trained(), Trained(seed=1)
    for trained, name in ((mine, "mine"), (other, "other")):
        trained.progress.run = name
        for _ in range(2):
            trained.train().write(tmp_path / name)
    (tmp_path / "mine" / "step-00000002").rename(tmp_path / "away")
    (tmp_path / "other" / "step-00000002").rename(tmp_path / "mine" / "step-00000002")
    again = Trained()
    progress, lines = state.load_latest(tmp_path / "mine", again.parts, run_id="mine")
    assert (progress.step, len(lines), "it is a checkpoint of another run" in lines[0]) == (1, 1, True)


def test_folders_of_other_names_are_left_alone(tmp_path):
    """A copy that the user made is neither loaded nor removed, and its name may be anything."""
    others = ["step-best", "step-00000001-good", "partial-", "trash-of-mine", "step-"]
    for name in others:
        (tmp_path / name).mkdir()
    trained = Trained()
    for _ in range(5):
        trained.train().write(tmp_path)
    state.finish_interrupted_writes(tmp_path)
    assert state.drop_checkpoints_after(tmp_path, 4, 0) == 4
    assert state.resume_step_for_extension(tmp_path) == 4
    assert {f.name for f in tmp_path.iterdir()} == {*others, "step-00000004"}
    assert Trained().read(tmp_path) == []

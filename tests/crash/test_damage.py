"""Damage to any file of the newest checkpoint is detected and named, and the previous checkpoint is used."""

import random
import shutil

import pytest
from tiny_run import Trained, data, equal_states, quick_looks, recipe, save_only, stopping_at, train

from undiffuse.errors import CheckpointError
from undiffuse.training import train_state as state
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

PAGE = 4096


def flip(g, path, _):
    content = bytearray(path.read_bytes())
    content[g.randrange(len(content))] ^= 1 << g.randrange(8)
    path.write_bytes(content)


def truncate(g, path, _):
    path.write_bytes(path.read_bytes()[: g.randrange(path.stat().st_size)])


def zero(g, path, _):
    content = bytearray(path.read_bytes())
    start = PAGE * g.randrange(-(-len(content) // PAGE))
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


def lengthen(g, path, _):
    with open(path, "ab") as file:
        file.write(g.randbytes(g.randrange(1, 9)))


def delete(g, path, _):
    path.unlink()


def swap(g, path, _):
    other = g.choice([p for p in sorted(path.parent.iterdir()) if p != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def older(g, path, before):
    """Replace it by the same file of the previous checkpoint."""
    shutil.copy(before / path.name, path)


KINDS = [flip, flip, flip, truncate, zero, lengthen, delete, swap, older]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 2 and 4, with files of several pages."""
    folder = tmp_path_factory.mktemp("damage")
    for step in (2, 4):
        Trained(width=400).train(step).write(folder)
    return folder


def undetected(two, cases, seed=0):
    """(kind, file, messages) of each damage that is not detected, not named, or after which step 2 is not loaded."""
    first, again, missed, g = Trained(width=400).train(2), Trained(width=400), [], random.Random(seed)
    newest, before = two / "step-00000004", two / "step-00000002"
    originals = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for _ in range(cases):
        damage, path = g.choice(KINDS), g.choice(sorted(originals))
        damage(g, path, before)
        changed = {p.name for p, content in originals.items() if not p.exists() or p.read_bytes() != content}
        lines = again.read(two)
        if changed:
            names = changed | ({"the manifest"} if "manifest.json" in changed else set())
            named = len(lines) == 1 and str(newest) in lines[0] and any(name in lines[0] for name in names)
            if not (named and again.progress.step == 2 and equal_states(again, first)):
                missed.append((damage.__name__, path.name, lines))
        for p, content in originals.items():
            p.write_bytes(content)
    assert again.read(two) == []  # restored
    return missed


def test_damage_is_detected(two):
    assert undetected(two, 200) == []


@pytest.mark.release
def test_damage_is_detected_in_ten_thousand_cases(two):
    missed = undetected(two, 10_000, seed=1)
    print(f"A3: 10,000 damages of a checkpoint's files, {len(missed)} not detected")
    assert missed == []


def test_a_checkpoint_of_another_step_is_refused(two, tmp_path):
    """Each of its files is valid, but not the step in its name."""
    shutil.copytree(two / "step-00000002", tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match=r"progress\.json: .*that of step 2"):
        Trained(width=400).read(tmp_path)


def test_an_incomplete_manifest_is_refused(two, tmp_path):
    shutil.copytree(two / "step-00000002", tmp_path / "step-00000002")
    for text in (b"{}", b"[]", b"7", state._manifest_text({"network.safetensors": "0"})):
        (tmp_path / "step-00000002" / "manifest.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json: not as the manifest says"):
            Trained(width=400).read(tmp_path)


def test_a_record_with_a_flipped_bit_is_refused(tmp_path):
    items, g = data(), random.Random(0)
    Run(tmp_path).open(recipe(), items)
    path = tmp_path / "run.json"
    original, record = path.read_bytes(), Run(tmp_path).record
    for _ in range(200):
        content = bytearray(original)
        content[g.randrange(len(original))] ^= 1 << g.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="or damaged"):
            _ = Run(tmp_path).record
    path.write_bytes(original)
    assert Run(tmp_path).record == record


def test_a_run_continues_from_the_previous_checkpoint_with_a_message(tmp_path, monkeypatch):
    items, lines = data(), []
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    with quick_looks():
        with stopping_at(25):  # after the evaluation at step 20
            train(recipe(), tmp_path, items)
        path = tmp_path / "checkpoints" / "step-00000025" / "optimizer.safetensors"
        flip(random.Random(0), path, None)
        train(recipe(), tmp_path, items)
        assert [line for line in lines if str(path) in line]
        for step in (tmp_path / "checkpoints").iterdir():
            delete(None, step / "average.safetensors", None)
        with pytest.raises(CheckpointError, match=r"none of its \d checkpoints is intact") as caught:
            train(recipe(), tmp_path, items)
    assert caught.value.exit_code == 4


def test_damaged_metrics_cost_their_lines_and_not_the_run(tmp_path, monkeypatch):
    """One flipped bit once ended every later resume, although all checkpoints were whole."""
    items, lines = data(), []
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    with quick_looks():
        with stopping_at(2):
            train(recipe(4), tmp_path, items)
        run = Run(tmp_path)
        run.write_metrics([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
        content = bytearray(run.metrics.read_bytes())
        content[3] ^= 0x80  # "s" of "step" in the first line
        run.metrics.write_bytes(content)
        train(recipe(4), tmp_path, items)
    assert f"{run.metrics}: 1 damaged line is left out" in lines
    assert [record["step"] for record in run.read_metrics()] == [2, 4]
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_a_run_ends_without_a_record_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", save_only)
    with stopping_at(4):
        train(recipe(4), tmp_path, data())
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff")
    train(recipe(4), tmp_path, data())
    assert Run(tmp_path).finished

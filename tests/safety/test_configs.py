"""Configuration is data: hostile recipes end in one line that names the key, with exit code 2, in no time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse import presets
from undiffuse.cli import main
from undiffuse.codec import Pixels
from undiffuse.config import ModelConfig, TrainConfig, from_dict, read
from undiffuse.data import memory
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.networks import build
from undiffuse.train.room import activations, require_room

UNKNOWN = ("_target_", "__class__", "target_", "bacth", "../x", "a.b", "", "é", "_import_", "python/object", "exec")
WRONG = {
    int: ("true", "1.5", '"1"', "[1]", "{}", "1e999", '"../../etc/passwd"', "-1e400"),
    float: ("true", '"1"', "[1]", "{}", "1e999", "-1e999", "NaN", '"nan"', "1" + "0" * 400),
    bool: ("1", "0", '"true"', "[]", "{}", "1.0"),
    str: ("1", "true", "[]", "{}", '"../../x"', '"_target_"', '"os.system"'),
    dict: (
        *("1", '"unet"', "[]", "true", '{"kind": 1, "name": 1}', '{"name": "os.system", "kind": "os.system"}'),
        *('{"_target_": "os.system"}', '{"name": "../x", "kind": "../x"}', '{"x": NaN}', '{"x": 1e999}'),
    ),
}
HUGE = {
    "model": [
        ("steps", str(10**9)),
        ("schedule", '{"name": "linear", "T": 1000000000}'),
        ("schedule", '{"name": "linear", "T": true}'),
        ("schedule", '{"name": "tabulated", "beta": [2.0]}'),
        ("schedule", '{"name": "linear_log_snr", "high": "x"}'),
        *(("network", json.dumps({"kind": "unet", "attention": [], **more})) for more in (
            {"widths": [10**6]}, {"widths": [10**5, 10**5]}, {"widths": [10**12]}, {"blocks": 10**9}, {"heads": 10**9},
            {"widths": [8] * 500}, {"classes": 10**10}, {"time_width": 10**9}, {"dims": 4}, {"patch": 10**9},
            {"widths": 8}, {"widths": "8"}, {"widths": [True]}, {"widths": [-8]}, {"widths": []}, {"dropout": 2},
            {"norm": "os"}, {"_target_": "os.system"}, {"channels": 10**9}, {"vector": 10**9}, {"tokens": 10**9},
        )),
        ("network", '{"kind": "mlp", "depth": 1000000000}'),
    ],
    "train": [("batch", str(10**12)), ("accumulate", "7"), ("seed", str(2**64)), ("batch", "-1"), ("lr", "-1")],
}  # fmt: skip


def hostile() -> list[tuple[str, bytes, str]]:
    """(file name, contents, a part of the line that it must get), some hundreds."""
    found = []
    plain = {"int": int, "float": float, "bool": bool, "str": str, "Settings": dict}
    for section, kind in (("model", ModelConfig), ("train", TrainConfig)):
        for key in UNKNOWN:
            text = json.dumps({section: {key: 1}})
            found.append(("a.json", text.encode(), section))
            found.append(("a.toml", f"[{section}]\n{json.dumps(key)} = 1\n".encode(), section))
        for field in dataclasses.fields(kind):
            of = plain.get(str(field.type).split(" | ")[0])
            for value in WRONG.get(of, ("1", '"x"', "[1]", "[1, 2, 3]", "[true, true]", '["a", "b"]', "[0.5, NaN]")):
                found.append(("a.json", f'{{"{section}": {{"{field.name}": {value}}}}}'.encode(), field.name))
                if value in ("true", "1.5", '"1"', "[1]", "{}", '"../../x"') and (of, value) != (bool, "true"):
                    found.append(("a.toml", f"[{section}]\n{field.name} = {value}\n".encode(), field.name))
        for key, value in HUGE[section]:
            found.append(("a.json", f'{{"{section}": {{"{key}": {value}}}}}'.encode(), key))
    for open_, close, n in itertools.product("[{", "]}", (100, 10_000, 200_000)):
        nest = ('{"a":' if open_ == "{" else "[") * n
        found.append(("a.json", f'{{"train": {{"batch": {nest}'.encode(), "a.json"))
        found.append(("a.toml", f"batch = {nest}{close * n}".encode(), "a.toml"))
        found.append(("a.json", f'{{"model": {{"network": {nest}1{close * n}}}}}'.encode(), "a.json"))
    for key in UNKNOWN:
        found.append(("a.json", json.dumps({key: {}}).encode(), "a.json"))
    found.append(("a.json", b'{"train": {"precision": "' + b"x" * (50 << 20) + b'"}}', "longer than"))
    found.append(("a.toml", b'[train]\nprecision = "' + b"x" * (50 << 20) + b'"', "longer than"))
    found.append(("a.json", b'{"train": {"precision": "' + b"x" * 500_000 + b'"}}', "precision"))
    found.append(("a.json", b'{"train": {"batch": ' + b"1" * 4_000 + b"}}", "batch"))
    found.append(("a.json", b'{"train": {"' + b"b" * 4_000 + b'": 1}}', "bbbb"))
    found.append(("a.json", b'{"train": {"batch": ' + b"1" * 500_000 + b"}}", "a.json"))
    found.append(("a.json", b'{"train": {"batch": 1, "batch": 2}}', "'batch' occurs twice"))
    found.append(("a.toml", b"[train]\nbatch = 1\nbatch = 2\n", "a.toml"))
    found += [("a.toml", b"\0" * 100, "a.toml"), ("a.json", b"\xff\xfe", "a.json"), ("a.json", b"", "a.json")]
    found += [
        (name, b, name) for name in ("a.toml", "a.json") for b in (b"!!python/object:os.system", b"<x/>", b"\x80\4.")
    ]
    return found


def refused(path: Path) -> str:
    """What reading the recipe and building its model says."""
    try:
        recipe = read(path, presets.get("digits"))
        require_room(Diffusion(recipe.model, (1, 8, 8), Pixels(256)), recipe.train)
    except ConfigError as error:
        return str(error)
    pytest.fail("this recipe would have been trained")


def tried(path: Path, content: bytes, words: str, by: Callable[[Path], str]) -> None:
    path.write_bytes(content)
    began = time.process_time()
    try:
        line = by(path)
    except pytest.fail.Exception as error:
        raise AssertionError(f"{content[:200]!r} was taken") from error
    seconds = time.process_time() - began
    about = f"{path.name} {content[:200]!r}: {line[:500]}"
    assert line.startswith("error["), about
    assert line.isprintable(), about
    assert words.lower() in line.lower(), about
    assert len(line) < 1000, about
    assert seconds < 1, f"{seconds} s, {about}"


def test_hostile_recipes(tmp_path):
    cases = hostile()
    assert len(cases) >= 500
    for name, content, words in cases:
        tried(tmp_path / name, content, words, refused)


@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.release)])
def test_hostile_recipes_by_command(tmp_path, capsys, monkeypatch, step):
    def trains(*_):
        pytest.fail("this recipe would have been trained")

    def command(path: Path) -> str:
        assert main([*arguments, "--config", str(path)]) == 2
        assert not (tmp_path / "run" / "model.safetensors").exists()
        return capsys.readouterr().err.removesuffix("\n")

    monkeypatch.setattr("undiffuse.train.loop.plan", trains)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(256, size=(40, 8, 8)).astype(np.uint8))
    arguments = ["train", str(tmp_path / "data.npy"), "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    for name, content, words in hostile()[::step]:
        tried(tmp_path / name, content, words, command)


def test_networks_that_no_memory_holds(monkeypatch):
    before = torch.random.get_rng_state()
    network = build("unet", channels=1, widths=[8], blocks=1, attention=[])
    torch.random.set_rng_state(before)
    again = build("unet", channels=1, widths=[8], blocks=1, attention=[])
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    need = 8 * sum(p.numel() for p in network.parameters())
    for share, holds in ((1.0, True), (0.99, False)):
        monkeypatch.setattr("undiffuse.networks.available", lambda s=share: s * need)
        if holds:
            build("unet", channels=1, widths=[8], blocks=1, attention=[])
        else:
            with pytest.raises(ConfigError, match=r"network.widths: its weights alone need"):
                build("unet", channels=1, widths=[8], blocks=1, attention=[])


def test_trainings_that_no_memory_holds(monkeypatch):
    model = Diffusion(from_dict(ModelConfig, {"network": {"kind": "mlp", "width": 64, "depth": 1}}), (3,), Pixels(5))
    weights, each = 28 * sum(p.numel() for p in model.parameters()), activations(model)

    def asks(settings, processes=1, share=1.0):
        items = settings.batch // settings.accumulate // processes
        need = weights + 16 * 3 * settings.batch + each * items
        monkeypatch.setattr("undiffuse.train.room.available", lambda: share * need)
        require_room(model, settings, processes)

    for settings in (TrainConfig(batch=1), TrainConfig(batch=10**6), TrainConfig(batch=600, accumulate=3)):
        for processes in (1, 2) if settings.batch > 1 else (1,):
            asks(settings, processes)
            with pytest.raises(ConfigError, match=r"may be used here\. Give a smaller") as caught:
                asks(settings, processes, share=0.99)
            assert caught.value.where == (
                "model.network" if settings.batch == 1 else f"train.batch = {settings.batch:,}"
            )
    monkeypatch.setattr("undiffuse.train.room.available", lambda: weights + 48 + each - 1)  # one item is too many
    with pytest.raises(ConfigError, match="may be used here"):
        require_room(model, TrainConfig(batch=1))


def test_memory_of_the_machine_and_of_its_container(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 100}.get)
    monkeypatch.setattr(memory, "LIMIT", tmp_path / "memory.max")
    assert memory.available() == pytest.approx(800)
    for text, expected in (("max\n", 800), ("500\n", 400), ("5000\n", 800)):
        memory.LIMIT.write_text(text)
        assert memory.available() == pytest.approx(expected)

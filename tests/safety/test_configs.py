"""Hostile recipes end in one line that names the key, with exit code 2, within a second."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from undiffuse.cli import main
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model import presets
from undiffuse.model.config import ModelConfig, TrainConfig, read
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.registry import build
from undiffuse.runtime import machine
from undiffuse.training.memory_estimate import check_memory

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
        ("chain_length", str(10**9)),
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
    """(file name, contents, a part of the expected error line) of some hundred recipes."""
    recipes = []
    plain = {"int": int, "float": float, "bool": bool, "str": str, "Settings": dict}
    for section, kind in (("model", ModelConfig), ("train", TrainConfig)):
        for key in UNKNOWN:
            text = json.dumps({section: {key: 1}})
            recipes.append(("a.json", text.encode(), section))
            recipes.append(("a.toml", f"[{section}]\n{json.dumps(key)} = 1\n".encode(), section))
        for field in dataclasses.fields(kind):
            of = plain.get(str(field.type).split(" | ")[0])
            for value in WRONG.get(of, ("1", '"x"', "[1]", "[1, 2, 3]", "[true, true]", '["a", "b"]', "[0.5, NaN]")):
                recipes.append(("a.json", f'{{"{section}": {{"{field.name}": {value}}}}}'.encode(), field.name))
                if value in ("true", "1.5", '"1"', "[1]", "{}", '"../../x"') and (of, value) != (bool, "true"):
                    recipes.append(("a.toml", f"[{section}]\n{field.name} = {value}\n".encode(), field.name))
        for key, value in HUGE[section]:
            recipes.append(("a.json", f'{{"{section}": {{"{key}": {value}}}}}'.encode(), key))
    for open_, close, n in itertools.product("[{", "]}", (100, 10_000, 200_000)):
        nest = ('{"a":' if open_ == "{" else "[") * n
        recipes.append(("a.json", f'{{"train": {{"batch": {nest}'.encode(), "a.json"))
        recipes.append(("a.toml", f"batch = {nest}{close * n}".encode(), "a.toml"))
        recipes.append(("a.json", f'{{"model": {{"network": {nest}1{close * n}}}}}'.encode(), "a.json"))
    for key in UNKNOWN:
        recipes.append(("a.json", json.dumps({key: {}}).encode(), "a.json"))
    recipes.append(("a.json", b'{"train": {"precision": "' + b"x" * (50 << 20) + b'"}}', "longer than"))
    recipes.append(("a.toml", b'[train]\nprecision = "' + b"x" * (50 << 20) + b'"', "longer than"))
    recipes.append(("a.json", b'{"train": {"precision": "' + b"x" * 500_000 + b'"}}', "precision"))
    recipes.append(("a.json", b'{"train": {"batch": ' + b"1" * 4_000 + b"}}", "batch"))
    recipes.append(("a.json", b'{"train": {"' + b"b" * 4_000 + b'": 1}}', "bbbb"))
    recipes.append(("a.json", b'{"train": {"batch": ' + b"1" * 500_000 + b"}}", "a.json"))
    recipes.append(("a.json", b'{"train": {"batch": 1, "batch": 2}}', "'batch' occurs twice"))
    recipes.append(("a.toml", b"[train]\nbatch = 1\nbatch = 2\n", "a.toml"))
    recipes += [("a.toml", b"\0" * 100, "a.toml"), ("a.json", b"\xff\xfe", "a.json"), ("a.json", b"", "a.json")]
    recipes += [
        (name, b, name) for name in ("a.toml", "a.json") for b in (b"!!python/object:os.system", b"<x/>", b"\x80\4.")
    ]
    return recipes


def error_of(path: Path) -> str:
    """The error of reading the recipe and building its model."""
    try:
        recipe = read(path, presets.get("digits"))
        model, x = Diffusion(recipe.model, (1, 8, 8), IntegerLevels(256)), torch.zeros(3, 1, 8, 8)
        check_memory(model, lambda m, n: m.loss(x[:n].byte(), torch.full((n,), 0.5), x[:n], x[:n]), recipe.train)
    except ConfigError as error:
        return str(error)
    pytest.fail("this recipe would have been trained")


def check(path: Path, content: bytes, words: str, error_of: Callable[[Path], str]) -> None:
    path.write_bytes(content)
    seconds = math.inf
    for _ in range(2):  # what is slow twice is slow; once, it can be the machine
        began = time.process_time()
        try:
            line = error_of(path)
        except pytest.fail.Exception as error:
            raise AssertionError(f"{content[:200]!r} was accepted") from error
        seconds = min(seconds, time.process_time() - began)
        if seconds < 1:
            break
    case = f"{path.name} {content[:200]!r}: {line[:500]}"
    assert line.startswith("error["), case
    assert line.isprintable(), case
    assert words.lower() in line.lower(), case
    assert len(line) < 1000, case
    assert seconds < 1, f"{seconds} s, {case}"


def test_hostile_recipes(tmp_path):
    cases = hostile()
    assert len(cases) >= 500
    for name, content, words in cases:
        check(tmp_path / name, content, words, error_of)


@pytest.mark.parametrize("step", [25, pytest.param(1, marks=pytest.mark.release)])
def test_hostile_recipes_by_command(tmp_path, capsys, monkeypatch, step):
    def trains(*_):
        pytest.fail("this recipe would have been trained")

    def command(path: Path) -> str:
        assert main([*arguments, "--config", str(path)]) == 2
        assert not (tmp_path / "run" / "model.safetensors").exists()
        return capsys.readouterr().err.removesuffix("\n")

    monkeypatch.setattr("undiffuse.training.fit.plan_lr_decay", trains)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(256, size=(40, 8, 8)).astype(np.uint8))
    arguments = ["train", str(tmp_path / "data.npy"), "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu"]
    for name, content, words in hostile()[::step]:
        check(tmp_path / name, content, words, command)


def test_networks_too_large_for_the_memory(monkeypatch):
    before = torch.random.get_rng_state()
    network = build("unet", channels=1, widths=[8], blocks=1, attention=[])
    torch.random.set_rng_state(before)
    again = build("unet", channels=1, widths=[8], blocks=1, attention=[])
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    need = 8 * sum(p.numel() for p in network.parameters())
    for fraction, fits in ((1.0, True), (0.99, False)):
        monkeypatch.setattr("undiffuse.networks.registry.available_memory", lambda f=fraction: f * need)
        if fits:
            build("unet", channels=1, widths=[8], blocks=1, attention=[])
        else:
            with pytest.raises(ConfigError, match=r"network.widths: its weights alone need"):
                build("unet", channels=1, widths=[8], blocks=1, attention=[])


def test_memory_of_the_machine_and_of_its_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    monkeypatch.setattr(machine, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert machine.available_memory() == pytest.approx(800)
    for text, expected in (("max\n", 800), ("500\n", 400), ("5000\n", 800)):
        machine.CGROUP_LIMIT.write_text(text)
        assert machine.available_memory() == pytest.approx(expected)

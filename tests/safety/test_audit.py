"""Loading a file never runs code: hostile files of every format, as data and as models, under an audit hook."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from children import in_child

from undiffuse.data.single import load_image
from undiffuse.data.sources.array_files import load_conditions
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import UndiffuseError
from undiffuse.model import checkpoint, config
from undiffuse.model.config import Config, ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.training.train_state import load_latest

WATCHED = ("exec", "compile", "pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "os.fork")
FAMILIES = ("subprocess.", "socket.", "ctypes.", "urllib.", "ftplib.", "smtplib.")
SUFFIXES = (".pt", ".pth", ".ckpt", ".npy", ".npz", ".zip", ".safetensors", ".png", ".jpg", ".csv", ".toml", ".json")


class Canary:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.place!r})",)


def payloads(canary: Path) -> list[bytes]:
    """Contents that run code in a loader that trusts them, and close variants."""
    hostile = Canary(canary)
    pickles = [pickle.dumps(hostile, protocol) for protocol in range(6)]
    contents = [*pickles, b"\x80\x02" + pickles[0], *(p[:-1] for p in pickles[:2])]
    for new in (True, False):
        stream = io.BytesIO()
        torch.save({"weight": hostile}, stream, _use_new_zipfile_serialization=new)
        contents.append(stream.getvalue())
    objects = io.BytesIO()
    np.save(objects, np.array([hostile], dtype=object), allow_pickle=True)
    contents.append(objects.getvalue())
    code = f"__import__('os').mkdir({str(canary)!r})"
    for descr in (f"'|u1' if {code} else '|u1'", "'|O'", "[('a', '|O')]", f"'|u1', 'x': {code}"):
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
        contents.append(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickles[2])
    for name in ("x.npy", "archive/data.pkl", "data.pkl", "../x.npy", "x"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, objects.getvalue() if name.endswith("npy") else pickles[2])
        contents.append(stream.getvalue())
    for metadata in ({"model": code}, {"undiffuse": "2", "model": code, "sha256": "0"}, {"undiffuse": code}):
        header = json.dumps(
            {"__metadata__": metadata, "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        ).encode()
        contents.append(struct.pack("<Q", len(header)) + header + b"\0")
    contents += [code.encode(), b"!!python/object/apply:os.mkdir [" + str(canary).encode() + b"]"]
    contents.append(f"a,b\n={code},{code}\n".encode())
    contents.append(f'[model]\nnetwork = {{kind = "os", _target_ = "{canary}"}}\n'.encode())
    return contents


def good(place: Path) -> None:
    """One readable file of each kind, so that lazy imports happen before the audit."""
    values = np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4)
    np.save(place / "a.npy", values)
    np.savez(place / "a.npz", x=values)
    (place / "a.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    (place / "a.toml").write_text("[train]\nbatch = 3\n")
    (place / "a.json").write_text('{"train": {"batch": 3}}')
    network = {"kind": "mlp", "width": 4, "depth": 1}
    checkpoint.save(
        Diffusion(ModelConfig(network=network, chain_length=4), (2,), IntegerLevels(5)), place / "a.safetensors"
    )


def try_all(path: Path) -> int:
    """The number of readers that accept the file."""
    accepted = 0
    for read in (
        load,
        load_conditions,
        checkpoint.load,
        checkpoint.read_tensors,
        lambda p: load_image(p, 3),
        lambda p: config.read(p, Config()),
    ):
        try:
            read(path)
            accepted += 1
        except UndiffuseError:
            pass
    return accepted


def watched(place: Path) -> dict:
    canary = place / "canary"
    events: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple) -> None:
        parses = event == "compile" and arguments[1] == "<unknown>"  # ast.literal_eval: nothing is compiled to code
        if watching and not parses and (event in WATCHED or event.startswith(FAMILIES)):
            events.append(f"{event} {str(arguments)[-200:]}")

    (place / "good").mkdir()
    good(place / "good")
    for path in sorted((place / "good").iterdir()):
        assert try_all(path), path
        try_all(path.rename(path.with_suffix(".bin")))
    for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):  # JSON may be in any of them
        codecs.lookup(name)
    sys.addaudithook(hook)
    files = 0
    for content in payloads(canary):
        for suffix in SUFFIXES:
            folder = place / "run"
            (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
            path = folder / f"model{suffix}"
            names = [path, folder / "manifest.json", folder / "checkpoints" / "step-00000001" / "manifest.json"]
            for name in names:
                name.write_bytes(content)
            watching = True
            try_all(path)
            for read in (load, checkpoint.load, lambda f: load_latest(f / "checkpoints", None)):
                with contextlib.suppress(UndiffuseError):
                    read(folder)
            watching = False
            files += 1
            shutil.rmtree(folder)
    ran, caused = canary.exists(), list(events)
    watching = True
    pickle.loads(payloads(canary)[2])  # control: this one runs, and the hook notices
    watching = False
    noticed = sorted({event.split()[0] for event in events[len(caused) :]})
    return {"files": files, "ran": ran, "events": caused, "noticed": noticed, "control": canary.exists()}


def test_no_code_is_run(tmp_path):
    result = in_child(lambda: watched(tmp_path), seconds=300)
    assert result["files"] >= 300
    assert not result["ran"]
    assert result["control"]
    assert {"compile", "exec", "pickle.find_class"} <= set(result["noticed"])
    assert result["events"] == [], sorted({e[:160] for e in result["events"]})[:20]

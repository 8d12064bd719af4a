"""Loading any file runs nothing: hostile files of every format, as data and as models, under an audit."""

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

from undiffuse import checkpoint, config
from undiffuse.codec import Pixels
from undiffuse.config import Config, ModelConfig
from undiffuse.data import load, load_conditions
from undiffuse.data.single import load_image
from undiffuse.diffusion import Diffusion
from undiffuse.errors import UndiffuseError
from undiffuse.train.state import read_latest

WATCHED = ("exec", "compile", "pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "os.fork")
FAMILIES = ("subprocess.", "socket.", "ctypes.", "urllib.", "ftplib.", "smtplib.")
SUFFIXES = (".pt", ".pth", ".ckpt", ".npy", ".npz", ".zip", ".safetensors", ".png", ".jpg", ".csv", ".toml", ".json")


class Canary:
    """What leaves a folder where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.place!r})",)


def payloads(canary: Path) -> list[bytes]:
    """Contents that run something in a loader that trusts them, and near misses of them."""
    bird = Canary(canary)
    pickles = [pickle.dumps(bird, protocol) for protocol in range(6)]
    found = [*pickles, b"\x80\x02" + pickles[0], *(p[:-1] for p in pickles[:2])]
    for new in (True, False):
        stream = io.BytesIO()
        torch.save({"weight": bird}, stream, _use_new_zipfile_serialization=new)
        found.append(stream.getvalue())
    objects = io.BytesIO()
    np.save(objects, np.array([bird], dtype=object), allow_pickle=True)
    found.append(objects.getvalue())
    code = f"__import__('os').mkdir({str(canary)!r})"
    for descr in (f"'|u1' if {code} else '|u1'", "'|O'", "[('a', '|O')]", f"'|u1', 'x': {code}"):
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
        found.append(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickles[2])
    for name in ("x.npy", "archive/data.pkl", "data.pkl", "../x.npy", "x"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(name, objects.getvalue() if name.endswith("npy") else pickles[2])
        found.append(stream.getvalue())
    for about in ({"model": code}, {"undiffuse": "2", "model": code, "sha256": "0"}, {"undiffuse": code}):
        header = json.dumps(
            {"__metadata__": about, "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
        ).encode()
        found.append(struct.pack("<Q", len(header)) + header + b"\0")
    found += [code.encode(), b"!!python/object/apply:os.mkdir [" + str(canary).encode() + b"]"]
    found.append(f"a,b\n={code},{code}\n".encode())
    found.append(f'[model]\nnetwork = {{kind = "os", _target_ = "{canary}"}}\n'.encode())
    return found


def good(place: Path) -> None:
    """One readable file of each kind, so that what is imported when first needed has been."""
    values = np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4)
    np.save(place / "a.npy", values)
    np.savez(place / "a.npz", x=values)
    (place / "a.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    (place / "a.toml").write_text("[train]\nbatch = 3\n")
    (place / "a.json").write_text('{"train": {"batch": 3}}')
    network = {"kind": "mlp", "width": 4, "depth": 1}
    checkpoint.save(Diffusion(ModelConfig(network=network, steps=4), (2,), Pixels(5)), place / "a.safetensors")


def try_all(path: Path) -> int:
    """Everything that reads a file, tried on one; how many took it."""
    taken = 0
    for reads in (
        load,
        load_conditions,
        checkpoint.load,
        checkpoint.read_tensors,
        lambda p: load_image(p, 3),
        lambda p: config.read(p, Config()),
    ):
        try:
            reads(path)
            taken += 1
        except UndiffuseError:
            pass
    return taken


def watched(place: Path) -> dict:
    canary = place / "canary"
    events: list[str] = []
    watching = False

    def hook(event: str, arguments: tuple) -> None:
        if watching and (event in WATCHED or event.startswith(FAMILIES)):
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
            for whole in (load, checkpoint.load, lambda f: read_latest(f / "checkpoints", None, None, None)):
                with contextlib.suppress(UndiffuseError):
                    whole(folder)
            watching = False
            files += 1
            shutil.rmtree(folder)
    sung, caused = canary.exists(), list(events)
    watching = True
    pickle.loads(payloads(canary)[2])  # the canary sings where it is let, and is heard
    watching = False
    heard = sorted({event.split()[0] for event in events[len(caused) :]})
    return {"files": files, "sung": sung, "events": caused, "heard": heard, "sings": canary.exists()}


def test_nothing_is_run(tmp_path):
    found = in_child(lambda: watched(tmp_path), seconds=300)
    assert found["files"] >= 300
    assert not found["sung"]
    assert found["sings"]
    assert {"compile", "exec", "pickle.find_class"} <= set(found["heard"])
    assert found["events"] == [], sorted({e[:160] for e in found["events"]})[:20]

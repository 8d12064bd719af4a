"""`make studio`: what it says without Node.js, and that it copies nothing twice; the lock file pins what it copies."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copied(tmp_path):
    """A copy of what the script needs, and a folder of programs without npm."""
    for name in ("scripts/studio", "studio-web/package.json", "studio-web/package-lock.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "sha256sum", "shasum", "cmp"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    return tmp_path


def script(folder):
    command = [shutil.which("bash"), str(folder / "scripts/studio")]
    return subprocess.run(command, env={"PATH": str(folder / "bin")}, capture_output=True, text=True, check=False)


def test_without_npm_one_line_says_what_to_do(copied):
    done = script(copied)
    assert (done.returncode, done.stdout) == (6, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error[NODE] npm: not found. Install Node.js 18 or newer with npm")


def test_nothing_is_copied_twice(copied):
    vendor = copied / "src/undiffuse/studio/static/vendor"
    vendor.mkdir(parents=True)
    lock = copied / "studio-web/package-lock.json"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    (vendor / ".stamp").write_text(f"{digest}  studio-web/package-lock.json\n")
    done = script(copied)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lock.write_text("{}")
    assert script(copied).returncode == 6


def test_every_library_is_pinned_by_version_and_digest():
    asked = json.loads((ROOT / "studio-web/package.json").read_text())
    locked = json.loads((ROOT / "studio-web/package-lock.json").read_text())["packages"]
    versions = asked["dependencies"] | asked["devDependencies"]
    assert {name.removeprefix("node_modules/") for name in locked} == {"", *versions}
    for name, version in versions.items():
        package = locked[f"node_modules/{name}"]
        assert package["version"] == version
        assert package["integrity"].startswith("sha512-")
        assert not package.get("hasInstallScript")

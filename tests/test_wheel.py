"""The wheel and the source archive, built as `make dist` builds them but with the packages that are installed here."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = """
import setuptools.build_meta as backend, sys
out = sys.argv[1]  # both calls replace sys.argv
print(backend.build_wheel(out), backend.build_sdist(out), sep="\\n")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source archive), built from a copy of the files, since building writes beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "src", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for folder in source.rglob("*.egg-info"):
        shutil.rmtree(folder)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(out / name for name in done.stdout.splitlines()[-2:])


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(next(name for name in names if name.endswith("/METADATA"))))
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    page = (ROOT / "src/undiffuse/studio/static").rglob("[!.]*.*")  # with the libraries that `make studio` copies
    files = {str(path.relative_to(ROOT / "src")) for path in page if path.is_file()}
    assert "undiffuse/studio/static/index.html" in files
    assert {name for name in names if ".dist-info/" not in name} == {*modules, *files, "undiffuse/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (metadata["Name"], metadata["Version"]) == ("undiffuse", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()


def test_the_source_archive_has_no_tests(built):
    with tarfile.open(built[1]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "pyproject.toml" in names
    assert "src/undiffuse/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_installed_wheel_trains_and_samples(built, tmp_path):
    """From another folder, in a process that does not see the source."""
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "installed")
    (tmp_path / "tiny.toml").write_text(
        '[model]\nchain_length = 5\nnetwork = {kind = "unet", widths = [8], blocks = 1, attention = []}\n'
        "[train]\nbatch = 8\nwarmup = 1\nprecision = 'float32'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "undiffuse", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import undiffuse, sys; sys.stdout.write(undiffuse.__file__)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", where], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(tmp_path))
    assert "done: run/model.safetensors" in run(
        "train", "digits", "--steps", "2", "--config", "tiny.toml", "--out", "run"
    )
    assert "4 samples by" in run("sample", "run", "--n", "4")


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == PROJECT["version"]
    assert re.search(r"^license: (.*)$", citation, re.M)[1] == PROJECT["license"]

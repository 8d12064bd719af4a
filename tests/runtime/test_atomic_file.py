"""An atomic file replaces the old one completely or leaves it unchanged, and is durable."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from undiffuse.errors import ResourceError
from undiffuse.runtime.atomic_file import (
    atomic_file,
    atomic_folder,
    file_digest,
    json_digest,
    write_atomic,
    write_csv,
)


def by_stream(path, content):
    with atomic_file(path) as file:
        file.write(content)


WRITERS = [write_atomic, by_stream]


@pytest.mark.parametrize("write", WRITERS)
def test_the_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch, write):
    calls, fsync, replace = [], os.fsync, os.replace

    def traced_fsync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def traced_replace(source, path):
        calls.append("replace")
        replace(source, path)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    path = tmp_path / "a"
    path.write_bytes(b"old")
    write(path, b"new")
    assert calls == [str(tmp_path / "a.partial"), "replace", str(tmp_path)]
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a", b"new")]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_reports_path_and_bytes(tmp_path, monkeypatch, write, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError) as error:
        write(path, bytes(1234))
    assert str(error.value).startswith(
        f"error[DISK] {path}: its 1,234 bytes could not be written (No space left on device). "
    )
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a", b"old")]


def test_an_error_of_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_that_does_not_exist_is_a_resource_error(tmp_path):
    with pytest.raises(ResourceError, match=r"its 3 bytes could not be written \(No such file or directory\)"):
        write_atomic(tmp_path / "no" / "a", b"new")


def test_the_working_folder_gets_the_files_and_stays_the_same_folder(tmp_path, monkeypatch):
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    number = place.stat().st_ino
    with atomic_folder(Path()) as partial:
        (partial / "a").write_bytes(b"new")
    assert (place / "a").read_bytes() == b"new"
    assert (place.stat().st_ino, os.listdir(tmp_path)) == (number, ["empty"])


def test_csv(tmp_path):
    write_csv(tmp_path / "a.csv", iter([["ü", "b"], [1, "x,y"]]))
    assert (tmp_path / "a.csv").read_bytes() == 'ü,b\r\n1,"x,y"\r\n'.encode()


def test_digests(tmp_path):
    assert json_digest({"b": [1, None], "a": "é"}) == hashlib.sha256(b'{"a": "\\u00e9", "b": [1, null]}').hexdigest()
    assert json_digest({"a": "é", "b": [1, None]}) == json_digest({"b": [1, None], "a": "é"})
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()

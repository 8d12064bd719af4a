"""Captions beside images, in Arrow tables and in shards: every form that is read, and every bad one."""

import io
import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from undiffuse import load_data
from undiffuse.cli.check import data_facts, describe_facts
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.captions import check_captions, parse_text
from undiffuse.data.sources.packed_array import pack_writer
from undiffuse.errors import ConfigError, DataError
from undiffuse.runtime.file_errors import BadFilesError, FileError

LONG = "x" * 1025


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(4, 4)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def folder(path, names=("a", "b", "c"), **files: str | bytes):
    """Images called ``names``, and files by name, in which __ stands for a dot and ___ for a slash."""
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.png").write_bytes(png(i))
    for name, content in files.items():
        target = path / name.replace("___", "/").replace("__", ".")
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


THREE = (("a red disc",), ("a box", "two boxes"), ("café, noir",))
TABS = "file_name\ttext\na.png\ta red disc\nb.png\ta box\nb.png\ttwo boxes\nc.png\tcafé, noir\n"
FORMS = {
    "csv": {"metadata__csv": 'file_name,text\na.png,a red disc\nb.png,a box\nb.png, two boxes \nc.png,"café, noir"\n'},
    "semicolons": {
        "metadata__csv": "﻿file;id;Caption\nb.png;1;a box\nb.png;2;two boxes\na.png;3;a red disc\nc.png;4;café, noir\n"
    },
    "utf-16": {"metadata__csv": TABS.encode("utf-16")},
    "jsonl": {
        "metadata__jsonl": jsonl(
            {"file_name": "a.png", "text": "a red disc"},
            {"file_name": "./b.png", "text": ["a box", "two boxes", "a box"]},
            {"file_name": "c.png", "text": "cafe\u0301, noir", "id": 3},
        )
    },
    "texts": {"a__txt": "a red disc\n", "b__txt": "a box\n\n  two boxes\n", "c__txt": "﻿café, noir"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form, tmp_path):
    data = load_data(folder(tmp_path, **FORMS[form]), captions=True)
    assert data.captions == THREE
    assert data.condition_sizes == {"text": 64}
    tables = sorted(path.name for path in tmp_path.rglob("metadata.*"))
    assert f"4 captions for 3 items from {' and '.join(tables) or 'files beside the images'}" in data.notes
    assert not any("ignored" in note for note in data.notes)


def test_tables_of_nested_folders_name_images_relative_to_themselves(tmp_path):
    root = folder(
        tmp_path,
        ("a", "x/b", "x/y/c"),
        metadata__csv="file_name,text\na.png,one\nx/b.png,two\n",
        x___metadata__jsonl=jsonl({"file_name": "b.png", "text": "deux"}, {"file_name": "y\\c.png", "text": "trois"}),
    )
    assert load_data(root, captions=True).captions == (("one",), ("two", "deux"), ("trois",))
    plain = load_data(root)
    assert not plain.captions
    assert any("metadata.csv and metadata.jsonl ignored" in note for note in plain.notes)


def test_tables_of_several_folders_name_images_below_themselves(tmp_path):
    """Images of one name, and folders of which one's name begins with the other's."""
    table = "file_name,text\na.png,{0}\nz/a.png,{0} z\n"
    root = folder(
        tmp_path,
        ("x/a", "x/z/a", "xy/a", "xy/z/a"),
        x___metadata__csv=table.format("x"),
        xy___metadata__csv=table.format("xy"),
    )
    assert load_data(root, captions=True).captions == (("x",), ("x z",), ("xy",), ("xy z",))


def test_files_of_captions_are_not_counted_as_ignored(tmp_path):
    """A name that is there several times counts as often as it is read."""
    root = folder(tmp_path, ("x/a", "y/a", "z/b"), x___a__txt="one", y___a__txt="two", z___b__txt="three")
    (root / "z" / "a.txt").write_text("no image")
    data = load_data(root, captions=True)
    assert data.captions == (("one",), ("two",), ("three",))
    assert data.report.ignored == 1
    assert "1 file ignored (no image file extension): a.txt" in data.notes


ROWS = "file_name,text\na.png,one\n"
BAD = {
    "missing row": ({"metadata__csv": ROWS}, "b.png", "no row of metadata.csv names it", 1),
    "null bytes": ({"metadata__csv": "file_name,text\na.png,\0\n"}, "b.png", "no row of metadata.csv names it", 1),
    "missing file": ({"a__txt": "one"}, "b.png", "no b.txt beside it, and no metadata.csv", 1),
    "empty text": ({"metadata__csv": ROWS + "b.png,\nc.png,three\n"}, "b.png", r"empty \(metadata.csv, line 3\)", 2),
    "empty file": ({"a__txt": "one", "b__txt": "\n \n", "c__txt": "three"}, "b.png", "its caption is empty", 2),
    "no list": (
        {
            "metadata__jsonl": jsonl(
                *({"file_name": f"{n}.png", "text": t} for n, t in (("a", "x"), ("b", 3), ("c", "y")))
            )
        },
        "b.png",
        "neither text nor a list",
        2,
    ),
    "empty list": (
        {
            "metadata__jsonl": jsonl(
                *({"file_name": f"{n}.png", "text": t} for n, t in (("a", "x"), ("b", []), ("c", "y")))
            )
        },
        "b.png",
        "it has no caption",
        2,
    ),
    "not UTF-8": (
        {"a__txt": "one", "b__txt": b"caf\xe9", "c__txt": "three"},
        "b.png",
        r"not text in UTF-8 \(byte 3\)",
        2,
    ),
    "too long": ({"metadata__csv": f"{ROWS}b.png,{LONG}\nc.png,x\n"}, "b.png", "has 1,025 bytes, more than 1,024", 2),
    "no image": (
        {"metadata__csv": ROWS + "b.png,x\nc.png,y\nd.png,z\n"},
        "metadata.csv",
        "line 5 names no image: d.png",
        3,
    ),
    "both": ({"metadata__csv": ROWS + "b.png,x\nc.png,y\n", "b__txt": "z"}, "b.png", "both metadata.csv and b.txt", 2),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_caption_is_one_line_or_skipped(case, tmp_path):
    files, place, message, kept = BAD[case]
    root = folder(tmp_path, **files)
    with pytest.raises(BadFilesError, match=message) as error:
        load_data(root, captions=True)
    assert (error.value.code, error.value.where) == ("CAPTIONS", str(root / place))
    assert len(str(error.value).splitlines()) == 1
    assert "on_bad=skip" in error.value.fix
    data = load_data(root, captions=True, on_bad="skip")
    assert len(data) == len(data.captions) == kept
    assert any(p.path == root / place and p.code == "CAPTIONS" for p in data.report.skipped)


TABLES = {
    "no columns": ({"metadata__csv": "name,words\na.png,one\n"}, "does not name the columns file_name and text"),
    "cells": ({"metadata__csv": ROWS + "b.png,one,two\n"}, "line 3 has 3 cells, and there are 2 columns"),
    "open quote": (
        {"metadata__csv": ROWS + 'b.png,"a\nb"\n"c.png,one\nd.png,two\n'},
        "the row of lines 5 to 6 has 1 cell, and there are 2 columns. Quote a cell",
    ),
    "long cell": (
        {"metadata__csv": ROWS + '"b.png,' + "x\n" * 70_000},
        r"row that begins in line 3 cannot be read \(field larger .*\). Close each quote",
    ),
    "long column": ({"metadata__csv": "x" * 140_000 + ",text\n"}, r"cannot be read as a table \(field larger .*\)"),
    "no UTF-8": ({"metadata__csv": b"file_name,text\na.png,caf\xe9\n"}, "not text in UTF-8"),
    "no JSON": ({"metadata__jsonl": "{}\n{"}, "line 1 has no file_name and text"),
    "half JSON": ({"metadata__jsonl": jsonl({"file_name": "a.png", "text": "x"}) + "{"}, "line 2 is not JSON"),
    "empty": ({"metadata__csv": ""}, "does not name the columns file_name and text"),
    "no rows": ({"metadata__csv": "file_name,text\n"}, "no row of metadata.csv names it"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_read_is_an_error_that_no_skipping_avoids(case, tmp_path):
    files, message = TABLES[case]
    with pytest.raises(DataError, match=message) as error:
        load_data(folder(tmp_path, **files), captions=True, on_bad="skip")
    assert error.value.code == "CAPTIONS"
    assert "on_bad" not in str(error.value)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "b.txt"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    root = folder(tmp_path, **(FORMS["texts"] if name == "b.txt" else {}))
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(DataError, match="is a folder, a pipe, a socket or a device") as error:
        load_data(root, captions=True)
    assert error.value.where == str(root / ("b.png" if name == "b.txt" else name))


def test_texts_of_other_types_are_refused():
    for texts in (3, {"a": 1}, ["a", 3], None, [], [""], "\ud800", ["x"] * 1001):
        with pytest.raises(FileError):
            check_captions(texts)
    assert check_captions([" a ", "b", "a"]) == ("a", "b")
    assert parse_text(b"\xef\xbb\xbfa\r\nb\r\n") == ("a", "b")


def test_captions_of_shards(tmp_path):
    members = {"0.png": png(0), "0.txt": b"one\ntwo\n", "0.cls": b"x", "1.png": png(1), "1.cls": b"y"}
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(BadFilesError, match=r"no member of its key ends in \.txt"):
        load_data(tmp_path / "s.tar", captions=True)
    data = load_data(tmp_path / "s.tar", captions=True, on_bad="skip")
    assert (data.captions, data.labels) == ((("one", "two"),), None)
    assert load_data(tmp_path / "s.tar").classes == ("x", "y")


@pytest.mark.parametrize("lists", [False, True])
def test_captions_of_arrow_tables(lists, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    texts = [["one", "uno"], ["two"], [""]] if lists else ["one", "two", None]
    features = datasets.Features({"image": datasets.Image(), "id": datasets.Value("int64")})
    features["Caption"] = datasets.Sequence(datasets.Value("string")) if lists else datasets.Value("string")
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "id": [0, 1, 2], "Caption": texts}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(BadFilesError, match="row 2: its caption is empty"):
        load_data(tmp_path / "t", captions=True)
    data = load_data(tmp_path / "t", captions=True, on_bad="skip")
    assert data.captions == ((("one", "uno") if lists else ("one",)), ("two",))


def test_labels_are_left_out_with_a_note_or_kept(tmp_path):
    """Those of sub-folders, of labels.csv, of shards and of a ClassLabel column."""
    texts = {"x___a__txt": "one", "x___b__txt": "two", "y___c__txt": "three"}
    folders = folder(tmp_path / "d", ("x/a", "x/b", "y/c"), **texts)
    tables = folder(tmp_path / "t", labels__csv="file,label\na.png,x\nb.png,x\nc.png,y\n", **FORMS["texts"])
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "s.tar", "w") as archive:
        for i in range(3):
            for name, content in {f"{i}.png": png(i), f"{i}.txt": b"one", f"{i}.cls": b"xxy"[i : i + 1]}.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for source, what in ((folders, "labels of 2 sub-folders"), (tables, "labels.csv"), (tmp_path / "s", "labels")):
        data = load_data(source, captions=True)
        assert (data.labels, list(data.condition_sizes)) == (None, ["text"])
        assert f"{what} left out: captions take their place, and with_labels=True keeps both" in data.notes
        both = load_data(source, captions=True, with_labels=True)
        assert (both.labels.tolist(), both.classes, both.captions) == ([0, 0, 1], ("x", "y"), data.captions)
        assert not any("left out" in note for note in both.notes)
        assert both.report.options["with_labels"] is True
    assert not any(
        "left out" in note for note in load_data(folder(tmp_path / "n", **FORMS["texts"]), captions=True).notes
    )
    with pytest.raises(ConfigError, match="it keeps labels beside captions"):
        load_data(folders, with_labels=True)


def test_captions_are_part_of_fingerprint_pack_and_check(tmp_path):
    root = folder(tmp_path / "d", **FORMS["csv"])
    data, plain = load_data(root, captions=True), load_data(root)
    changed = replace(data, captions=(("a red disk",), *data.captions[1:]))
    assert len({data.fingerprint, plain.fingerprint, changed.fingerprint}) == 3
    with pack_writer(tmp_path / "p.npy") as writer:
        writer.write(data, tmp_path / "p.npy")
    packed = load_data(tmp_path / "p.npy", captions=True)
    assert (packed.captions, packed.fingerprint) == (data.captions, data.fingerprint)
    with pack_writer(tmp_path / "q.npy") as writer:
        writer.write(plain, tmp_path / "q.npy")
    with pytest.raises(DataError, match=r"\[CAPTIONS\].*was packed without captions"):
        load_data(tmp_path / "q.npy", captions=True)
    facts = data_facts(data)
    assert facts["captions"]["longest"] == len("café, noir".encode())
    text = "4, 4 distinct, of up to 11 bytes, for the encoder bytes: 'a red disc', 'a box', 'café, noir'"
    assert describe_facts(facts)["captions"] == text
    assert "captions" not in describe_facts(data_facts(plain))


def test_an_item_has_the_caption_at_a_fraction():
    data = replace(
        from_array(np.zeros((3, 2)) + np.arange(3)[:, None]), captions=(("a",), ("b", "cc"), ("d", "e", "f"))
    )
    first = data.condition(np.array([2, 1])).text
    assert first.tolist() == [[101, 0], [99, 0]]
    chosen = data.condition(np.array([1, 1, 2, 2]), np.array([0.49, 0.5, 0.34, 0.999])).text
    assert chosen.tolist() == [[99, 0], [100, 100], [102, 0], [103, 0]]
    with pytest.raises(ValueError, match="captions of 1 items"):
        replace(data, captions=(("a",),))
    with pytest.raises(ValueError, match="some of them empty"):
        replace(data, captions=(("a",), (), ("b",)))


def test_an_encoder_needs_captions(tmp_path):
    with pytest.raises(ConfigError, match="it embeds captions, and these are not read"):
        load_data(folder(tmp_path, **FORMS["csv"]), text_encoder="minilm")

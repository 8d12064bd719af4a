"""Side files: what is damaged is left out, and the rest is used."""

import json
import random

import pytest

from undiffuse.runtime.side_files import check_info, parse_metrics, read_record, write_record

RECORD = {"step": 50, "seconds": 10.5, "loss": 1.0, "lr": 0.5, "overfit": False, "gap": -0.25}


def test_a_record_is_read_as_it_was_written(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "é", "nan": float("inf")}, "t": (1, 2)}
    write_record(tmp_path / "r.json", content)
    assert read_record(tmp_path / "r.json") == {**content, "t": [1, 2]}
    assert read_record(tmp_path / "none.json") is None
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "r.json" / "below") is None


def test_any_flipped_bit_of_a_record_is_found(tmp_path):
    path, g = tmp_path / "r.json", random.Random(0)
    write_record(path, {"files": {"000000.png": "ab12"}, "n": 3})
    whole = path.read_bytes()
    for _ in range(500):
        content = bytearray(whole)
        content[g.randrange(len(content))] ^= 1 << g.randrange(8)
        path.write_bytes(content)
        assert read_record(path) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"3", b'"x"', b"null", b"[" * 10**5, b"\xff", b'{"sha256": 3}'])
def test_what_is_no_record(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    assert read_record(tmp_path / "r.json") is None


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"loss": 1.0}',
        b'{"step": "50"}',
        b'{"step": 5.0}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1e999}',
        b'{"step": 5, "loss": "low"}',
        b'{"step": 5, "loss": null}',
        b'{"step": 5, "loss": [1]}',
        b'{"step": 5, "loss": 1e300}',
        b'{"step": 5, "seconds": NaN}',
        b'{"step": 5, "seconds": 1e50}',
        b'{"step": 5, "seconds": -1}',
        b'{"step": 1' + b"0" * 400 + b"}",
        b'{"step": 5, "loss": 1' + b"0" * 5000 + b"}",
    ],
)
def test_an_odd_line_of_metrics_costs_the_line(line):
    own = json.dumps(RECORD).encode()
    assert parse_metrics(own + b"\n" + line + b"\n\n" + own + b"\n") == ([RECORD, RECORD], 1)


def test_values_that_training_records():
    line = b'{"step": 5, "loss": NaN, "gradient_norm": Infinity, "skipped": 1}\r\n'
    (record,), damaged = parse_metrics(line)
    assert (damaged, record["step"], record["gradient_norm"]) == (0, 5, float("inf"))
    assert parse_metrics(b"") == ([], 0)


def test_facts_of_another_form_are_left_out():
    facts = {
        "name": "digits",
        "items": 9,
        "item_shape": [1, 8, 8],
        "num_values": None,
        "classes": ["a"],
        "held_out": 0.1,
    }
    facts |= {"columns": [], "notes": ["n"], "steps": 4, "seconds": 1.5, "ema": 0.05, "own": {"anything": [None]}}
    facts["accuracy"] = [{"log_snr": 1.0, "items": 5, "accuracy": 0.5, "stderr": 0.1}]
    facts |= {"distilled": {"guidance": 2.0, "method": "map"}, "imported": {"from": "edm", "scheduler": {}}}
    assert check_info(facts) == facts
    assert check_info({"imported": "TAESD"}) == {"imported": "TAESD"}
    odd = {
        "name": 3,
        "items": "9",
        "item_shape": 8,
        "num_values": "17",
        "classes": "ab",
        "held_out": "0.1",
        "columns": 7,
    }
    odd |= {"notes": [3], "steps": -1, "seconds": "1", "ema": None, "accuracy": [{"accuracy": "high"}]}
    odd |= {"distilled": True, "imported": 3}
    assert check_info({**facts, **odd}) == {"own": facts["own"]}
    for info in (None, [], "x", 3):
        assert check_info(info) == {}

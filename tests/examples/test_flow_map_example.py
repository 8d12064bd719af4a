"""The example of a flow map, with two steps of training: what it prints and writes."""

import math

from test_any_data import load_example

from undiffuse.model.checkpoint import load, save
from undiffuse.training.monitor import Monitor


def test_the_example_prints_errors_and_draws_samples(tmp_path, capsys, monkeypatch):
    example = load_example("flow_map")
    monkeypatch.setattr(Monitor, "finish", lambda monitor: save(monitor.ema_model, monitor.run.model))
    found = example.main(str(tmp_path), steps=2, points=8)
    assert list(found) == [1, 2, 4]
    assert all(math.isfinite(number) for row in found.values() for number in row)
    assert "4 calls: samples off by" in capsys.readouterr().out
    assert (tmp_path / "flow-map.png").is_file()
    assert load(tmp_path / "flow-map").config.network["two_times"]

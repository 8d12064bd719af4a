"""The example of guidance, with two steps of training each and two of sampling."""

from PIL import Image
from test_any_data import load_example

from undiffuse.training.monitor import Monitor


def test_the_example_draws_a_row_for_each_kind_of_guidance(tmp_path, monkeypatch, capsys):
    example = load_example("guidance")
    monkeypatch.setattr(Monitor, "finish", lambda monitor: monitor.task.save(monitor.ema_model, monitor.run.model))
    path = example.main("digits", str(tmp_path), each=1, steps=2, max_steps=2, batch=8, previews=0)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    assert rows == [
        "row 1: without a label",
        "row 2: label",
        "row 3: classifier-free",
        "row 4: classifier in the score",
        "row 5: classifier in the mean",
    ]
    with Image.open(path) as picture:
        assert picture.size[0] > 10 * 8
        assert picture.size[1] > 5 * 8

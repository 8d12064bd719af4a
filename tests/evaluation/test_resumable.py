"""The plan of an evaluation on disk: which one is resumed, and which one starts over."""

import pytest

from undiffuse.evaluation import resumable


def test_the_same_request_is_resumed(tmp_path):
    messages = []
    request = {"seed": 0, "items": (1, 2)}
    _, store = resumable.open_plan(tmp_path, request, lambda: {"a": 1}, messages.append)
    plan, again = resumable.open_plan(tmp_path, request, lambda: {"a": 2}, messages.append)
    assert (plan, again.key) == ({"a": 1}, store.key)
    assert messages == [f"resuming an interrupted evaluation; batches in {tmp_path}: 0"]


def test_another_request_starts_over(tmp_path):
    messages = []
    _, first = resumable.open_plan(tmp_path, {"seed": 0, "items": 2}, lambda: {"a": 1}, messages.append)
    plan, second = resumable.open_plan(tmp_path, {"seed": 1, "items": 2}, lambda: {"a": 1}, messages.append)
    assert messages == [f"starting over: the evaluation in {tmp_path} differs in seed"]
    assert (plan, second.key != first.key) == ({"a": 1}, True)


@pytest.mark.parametrize("damage", ["{", "[]", '{"sha256": 1}', '{"request": {}, "plan": {}, "sha256": "0"}'])
def test_a_damaged_plan_is_removed_with_its_batches(tmp_path, damage):
    messages = []
    resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 1}, messages.append)
    (tmp_path / "discrete-00000000.safetensors").touch()
    (tmp_path / "plan.json").write_text(damage)
    assert resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 2}, messages.append)[0] == {"a": 2}
    assert messages == [f"starting over: the plan in {tmp_path} is damaged"]
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]

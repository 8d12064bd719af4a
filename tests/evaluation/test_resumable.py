"""The plan of an evaluation on disk: which one is resumed, and which one starts over."""

from types import SimpleNamespace

import pytest
import torch

from undiffuse.errors import CheckpointError, ResourceError
from undiffuse.evaluation import resumable
from undiffuse.evaluation.summary import differences
from undiffuse.likelihood.nll import make_nll


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


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"sha256": 1}', '{"request": {}, "plan": {}, "sha256": "0"}', "[" * 10**5]
)
def test_a_damaged_plan_is_renamed(tmp_path, damage):
    """It may be the user's file; nothing is lost, and the batches of the plan that it was are not used."""
    messages = []
    _, first = resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 1}, messages.append)
    (tmp_path / "plan.json").write_text(damage)
    plan, second = resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 2}, messages.append)
    assert (plan, second.key != first.key) == ({"a": 2}, True)
    assert messages == [f"starting over: the plan in {tmp_path} is damaged or not ours, and is plan.json.damaged now"]
    assert (tmp_path / "plan.json.damaged").read_text() == damage
    (tmp_path / "plan.json").write_text("another")
    resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 2}, messages.append)
    assert messages[1].endswith("is plan.json.damaged-2 now")
    assert [(tmp_path / f"plan.json.{name}").read_text() for name in ("damaged", "damaged-2")] == [damage, "another"]


def test_removal_leaves_other_files(tmp_path):
    resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 1}, print)
    batches, others = (
        ["discrete-00000000.safetensors", "ode-00000016.safetensors.partial"],
        ["model.safetensors", "a.txt"],
    )
    for name in batches + others:
        (tmp_path / name).touch()
    resumable.remove(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(others)
    (tmp_path / "plan.json").write_text("{}")
    resumable.remove(tmp_path)
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_one_evaluation_in_a_folder(tmp_path):
    with resumable.locked(tmp_path / "new"):
        with pytest.raises(ResourceError, match=r"\[BUSY\].*is evaluating into"), resumable.locked(tmp_path / "new"):
            raise AssertionError("two evaluations")
        assert (tmp_path / "new" / "lock").exists()
    assert not (tmp_path / "new").exists()


def test_the_plan_is_that_of_the_batches(tmp_path):
    _, first = resumable.open_plan(tmp_path, {"seed": 0}, lambda: {"a": 1}, print)
    resumable.check_plan(tmp_path, first.key)
    resumable.open_plan(tmp_path, {"seed": 1}, lambda: {"a": 1}, print)
    with pytest.raises(CheckpointError, match="another evaluation has written into this folder"):
        resumable.check_plan(tmp_path, first.key)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(CheckpointError, match="OTHER_JOB"):
        resumable.check_plan(tmp_path, first.key)


def test_the_parts_of_a_latent_model_keep_their_names_and_order(tmp_path):
    nats = torch.arange(3, dtype=torch.float64)
    extra = {"reconstruction": nats + 5, "posterior": nats - 1}
    computed = make_nll(nats, 2 * nats, 3 * nats, 4, nats[:, None] + 1, extra)
    store = resumable.batch_store(tmp_path, "key")
    resumable.write(store, "discrete-00000000", computed, 1.0)
    resumable.write(store, "flow_map-00000000", computed, 1.0)
    assert store.names() == ["discrete-00000000", "flow_map-00000000"]
    found, _ = resumable.read(store, "discrete-00000000", print)
    assert list(found.extra) == list(computed.extra) == ["posterior", "reconstruction"]
    assert torch.equal(found.total, computed.total)
    for some, others in ((found, computed), (computed, found)):
        paired = differences(SimpleNamespace(dims=2), {"discrete": some, "continuous": others})["continuous"]
        assert set(paired) == {"prior", "diffusion", "decoder", "posterior", "reconstruction", "total"}
        assert all(difference == [0.0, 0.0] for difference in paired.values())

"""NaN and infinity in the batch, the loss, a gradient or a weight reach no checkpoint, average or moment."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_run import checkpoint_hashes, data, quick_looks, recipe, stopping_at, train

from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training import fit as loop
from undiffuse.training import train_state as state
from undiffuse.training.batches import Batch, batch_items
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.nonfinite import UnreadSteps

ITEMS, STEPS = data(), 8
PLACE = tuple(map(torch.tensor, (3, 0, 1, 2)))
"""Item 3, channel 0, row 1, column 2 of the noise."""
PLACES = ("batch", "loss", "gradient", "weight")


def poison(patch, place, bad, at):
    """Put ``bad`` into step ``at``, counted from 1."""
    real = loop.compute_gradient

    def compute_gradient(accelerator, state, network, batch, progress):
        weight = next(state.model.network.parameters())
        with pytest.MonkeyPatch.context() as only:
            hook = None
            if progress.step + 1 == at and place == "batch":
                noise = Batch.eps.func
                only.setattr(Batch, "eps", property(lambda part: noise(part).index_put(PLACE, torch.tensor(bad))))
            elif progress.step + 1 == at and place == "loss":
                loss = state.model.loss_of_x
                only.setattr(state.model, "loss_of_x", lambda *a, **k: loss(*a, **k) * torch.tensor([1.0] * 11 + [bad]))
            elif progress.step + 1 == at and place == "gradient":
                hook = weight.register_hook(lambda g: torch.full_like(g, bad))
            elif progress.step + 1 == at and place == "weight":
                weight.data.view(-1)[0] = bad
            try:
                return real(accelerator, state, network, batch, progress)
            finally:
                if hook is not None:
                    hook.remove()

    patch.setattr(loop, "compute_gradient", compute_gradient)


def poison_losses(patch, bad_items):
    """Make the losses of the first ``bad_items(step)`` items NaN, with steps counted from 0."""
    real = loop.compute_gradient

    def compute_gradient(*arguments):
        losses, norms = real(*arguments)
        losses[: bad_items(arguments[-1].step)] = math.nan
        return losses, norms

    patch.setattr(loop, "compute_gradient", compute_gradient)


def all_tensors(folder):
    """The tensors of all checkpoints and of the snapshots of averages."""
    for part in folder.rglob("*.safetensors"):
        yield from read_tensors(part)[0].values()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with quick_looks():
        return checkpoint_hashes(train(recipe(STEPS), tmp_path_factory.mktemp("straight"), ITEMS), STEPS)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("at", [1, 2, STEPS])
@pytest.mark.parametrize("place", PLACES)
def test_the_run_stops_and_its_checkpoint_is_finite(place, at, bad, tmp_path, straight):
    config = recipe(STEPS, previews=STEPS, snapshots=STEPS)
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, place, bad, at)
        with pytest.raises(NonFiniteError) as caught:
            train(config, tmp_path, ITEMS)
    assert (caught.value.code, caught.value.exit_code) == ("NON_FINITE", 5)
    part = "gradient" if place == "gradient" else "loss"
    if (place, bad) == ("weight", math.inf):  # tanh hides it from the loss
        assert caught.value.where == str(tmp_path)
        assert caught.value.cause == f"weights are not finite after step {at}: network.first.weight"
    else:
        assert str(caught.value).startswith(
            f"error[NON_FINITE] {tmp_path}: the {part} of step {at} is not finite, for "
        )
        items = caught.value.cause.rsplit(": ", 1)[1].split(", ")
        assert len(items) == (1 if place in ("batch", "loss") else 5)  # and 7 more
        assert all(int(item.split()[0]) in ITEMS.split(0.2).train for item in items)
    assert caught.value.fix.endswith("there is no checkpoint yet" if at == 1 else "the last checkpoint is good")
    assert all(bool(torch.isfinite(t).all()) for t in all_tensors(tmp_path))
    with quick_looks():
        assert checkpoint_hashes(train(config, tmp_path, ITEMS), STEPS) == straight


@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("at", [2, 5, STEPS])
@pytest.mark.parametrize("place", PLACES[:3])
def test_a_skipped_step_changes_nothing(place, at, bad, tmp_path):
    config = recipe(STEPS, previews=STEPS, on_nonfinite="skip")
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, place, bad, at)
        with stopping_at(at):
            train(config, tmp_path, ITEMS)
        assert checkpoint_hashes(tmp_path, at) == checkpoint_hashes(tmp_path, at - 1)
        assert state.verify_checkpoint(tmp_path / "checkpoints" / f"step-{at:08d}").skipped_in_a_row == 1
        train(config, tmp_path, ITEMS)
    assert state.verify_checkpoint(tmp_path / "checkpoints" / f"step-{STEPS:08d}").skipped_in_a_row == (at == STEPS)
    assert '"skipped": 1' in (tmp_path / "metrics.jsonl").read_text()
    assert all(bool(torch.isfinite(t).all()) for t in all_tensors(tmp_path))


@pytest.mark.parametrize("at", [1, 2, STEPS])
def test_a_nan_weight_is_skipped_five_times_at_most(at, tmp_path):
    """It stops the run then, and is not written at the end of a shorter run either."""
    config = recipe(STEPS, previews=0, on_nonfinite="skip")
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, "weight", math.nan, at)
        with pytest.raises(NonFiniteError, match=f"step {at + 5} is not" if at < 3 else "is not written") as caught:
            train(config, tmp_path, ITEMS)
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert all(bool(torch.isfinite(t).all()) for t in all_tensors(tmp_path))


def test_skipped_steps_in_a_row_are_counted_over_a_resume(tmp_path):
    config = recipe(STEPS, previews=0, on_nonfinite="skip")
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison_losses(patch, lambda step: 12)
        with stopping_at(3):
            train(config, tmp_path, ITEMS)
        with pytest.raises(NonFiniteError, match="the loss of step 6 is not finite"):
            train(config, tmp_path, ITEMS)


def test_items_are_named_by_their_files(tmp_path, capsys):
    names = tuple(f"cats/{i}\n.png" for i in range(len(ITEMS)))
    items, config = replace(ITEMS, names=names), recipe(STEPS, previews=0, on_nonfinite="skip")

    def listed(step, count):
        return ", ".join(f"cats/{i}\\n.png" for i in batch_items(ITEMS.split(0.2).train, config.train, step)[:count])

    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison_losses(patch, lambda step: (0, 4)[step] if step < 2 else 12)
        with pytest.raises(NonFiniteError) as caught:
            fit_diffusion(config, items, tmp_path, device="cpu")
    output = capsys.readouterr().out
    assert f"step skipped: the loss of step 2 is not finite, for 4 of its 12 items: {listed(1, 4)}\n" in output
    assert "step 1 is" not in output
    last = f"the loss of step 7 is not finite, for 12 of its 12 items: {listed(6, 5)} and 7 more. Look"
    assert last in str(caught.value)


def test_the_policy_is_stop_or_skip():
    with pytest.raises(ConfigError, match="must be stop or skip"):
        recipe(on_nonfinite="ignore")


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_weights_that_overflow_are_not_averaged(choice, tmp_path):
    """A learning rate so large that weights overflow: neither checkpoints nor snapshots hold them."""
    config = recipe(STEPS, previews=STEPS, snapshots=STEPS, lr=1e39, warmup=0, clip=1.0, on_nonfinite=choice)
    with quick_looks(), pytest.raises(NonFiniteError, match=r"weights are not finite after step 1: network\."):
        train(config, tmp_path, ITEMS)
    assert list(all_tensors(tmp_path)) == []
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_finite_weights_whose_norm_overflows_are_said_to_be_so(tmp_path):
    network = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(network.weight, 1e38)
    task = SimpleNamespace(config=recipe(), extra_state=lambda model: {})
    steps = UnreadSteps(task, network, tmp_path, waits=False)
    with pytest.raises(NonFiniteError, match="not finite after step 3: their norm overflows"):
        steps.add(2, torch.zeros(4), [torch.zeros(())])

"""NaN and Inf in the batch, the loss, a gradient or a weight: none reaches a checkpoint, an average or a moment."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_run import data, held, quick_looks, recipe, stopping_at, train

from undiffuse.checkpoint import read_tensors
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.train import fit, loop, state
from undiffuse.train.batch import batch_items

ITEMS, STEPS = data(), 8
PLACES = ("batch", "loss", "gradient", "weight")


def poison(patch, place, bad, at):
    """Puts ``bad`` into the step ``at``, counted from 1."""
    real = loop.gradient

    def gradient(accelerator, diffusion, parallel, optimiser, batch, settings, step):
        ask, first = batch, next(diffusion.network.parameters())
        with pytest.MonkeyPatch.context() as only:
            hook = None
            if step + 1 == at and place == "batch":

                def ask(step):
                    values, u, eps, z, cond = batch(step)
                    eps[3, 0, 1, 2] = bad
                    return values, u, eps, z, cond

                ask.waited = 0.0
            elif step + 1 == at and place == "loss":
                loss = diffusion.loss
                only.setattr(diffusion, "loss", lambda *a, **k: loss(*a, **k) * torch.tensor([1.0] * 11 + [bad]))
            elif step + 1 == at and place == "gradient":
                hook = first.register_hook(lambda g: torch.full_like(g, bad))
            elif step + 1 == at and place == "weight":
                first.data.view(-1)[0] = bad
            try:
                return real(accelerator, diffusion, parallel, optimiser, ask, settings, step)
            finally:
                if hook is not None:
                    hook.remove()

    patch.setattr(loop, "gradient", gradient)


def every(folder):
    """All tensors of all checkpoints and of the snapshots of averages."""
    for part in folder.rglob("*.safetensors"):
        yield from read_tensors(part)[0].values()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with quick_looks():
        return held(train(recipe(STEPS), tmp_path_factory.mktemp("straight"), ITEMS), STEPS)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("at", [1, 2, STEPS])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_stops_and_its_checkpoint_is_good(place, at, bad, tmp_path, straight):
    config = recipe(STEPS, previews=STEPS, snapshots=STEPS)
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, place, bad, at)
        with pytest.raises(NonFiniteError) as caught:
            train(config, tmp_path, ITEMS)
    assert (caught.value.code, caught.value.exit_code) == ("NON_FINITE", 5)
    part = "gradient" if place == "gradient" else "loss"
    if (place, bad) == ("weight", math.inf):  # which a tanh hides from the loss, but not from the checkpoint
        assert caught.value.where == str(tmp_path)
        assert caught.value.cause == f"weights are not finite after step {at}: network.first.weight"
    else:
        assert str(caught.value).startswith(
            f"error[NON_FINITE] {tmp_path}: the {part} of step {at} is not finite, for "
        )
        named = caught.value.cause.rsplit(": ", 1)[1].split(", ")
        assert len(named) == (1 if place in ("batch", "loss") else 5)  # and 7 more
        assert all(int(item.split()[0]) in ITEMS.split(0.2).train for item in named)
    assert caught.value.fix.endswith("there is no checkpoint yet" if at == 1 else "the last checkpoint is good")
    assert all(bool(torch.isfinite(t).all()) for t in every(tmp_path))
    with quick_looks():
        assert held(train(config, tmp_path, ITEMS), STEPS) == straight


@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("at", [2, 5, STEPS])
@pytest.mark.parametrize("place", PLACES[:3])
def test_a_step_that_is_left_out_moves_nothing(place, at, bad, tmp_path):
    config = recipe(STEPS, previews=STEPS, on_nonfinite="skip")
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, place, bad, at)
        with stopping_at(at):
            train(config, tmp_path, ITEMS)
        assert held(tmp_path, at) == held(tmp_path, at - 1)
        assert state._verify(tmp_path / "checkpoints" / f"step-{at:08d}").left_out == 1
        train(config, tmp_path, ITEMS)
    assert state._verify(tmp_path / "checkpoints" / f"step-{STEPS:08d}").left_out == (at == STEPS)
    assert '"left_out": 1' in (tmp_path / "metrics.jsonl").read_text()
    assert all(bool(torch.isfinite(t).all()) for t in every(tmp_path))


@pytest.mark.parametrize("at", [1, 2, STEPS])
def test_a_weight_that_is_no_number_is_not_left_out_for_ever(at, tmp_path):
    """Five steps in a row at most, over a stop too; nor is it written at the end of a run."""
    config = recipe(STEPS, previews=0, on_nonfinite="skip")
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        poison(patch, "weight", math.nan, at)
        with pytest.raises(NonFiniteError, match=f"step {at + 5} is not" if at < 3 else "is not written") as caught:
            train(config, tmp_path, ITEMS)
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert all(bool(torch.isfinite(t).all()) for t in every(tmp_path))


def test_the_row_is_counted_over_a_stop(tmp_path):
    config = recipe(STEPS, previews=0, on_nonfinite="skip")

    def all_bad(*arguments):
        u, losses, norms = real(*arguments)
        return u, losses * math.nan, norms

    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        real = loop.gradient
        patch.setattr(loop, "gradient", all_bad)
        with stopping_at(3):
            train(config, tmp_path, ITEMS)
        with pytest.raises(NonFiniteError, match="the loss of step 6 is not finite"):
            train(config, tmp_path, ITEMS)


def test_items_are_called_what_their_files_are(tmp_path, capsys):
    names = tuple(f"cats/{i}\n.png" for i in range(len(ITEMS)))
    items, config = replace(ITEMS, names=names), recipe(STEPS, previews=0, on_nonfinite="skip")
    third = batch_items(ITEMS.split(0.2).train, config.train, 1)
    called = [f"cats/{i}\\n.png" for i in third]

    def all_bad(*arguments):
        u, losses, norms = real(*arguments)
        bad = torch.zeros(12).index_fill(0, torch.arange(4 if arguments[-1] == 1 else 0), math.nan)
        return u, losses + (bad if arguments[-1] < 2 else math.nan), norms

    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        real = loop.gradient
        patch.setattr(loop, "gradient", all_bad)
        with pytest.raises(NonFiniteError) as caught:
            fit(config, items, tmp_path, device="cpu")
    said = capsys.readouterr().out
    assert f"left out: the loss of step 2 is not finite, for 4 of its 12 items: {', '.join(called[:4])}\n" in said
    last = batch_items(ITEMS.split(0.2).train, config.train, 6)[:5]
    named = ", ".join(f"cats/{i}\\n.png" for i in last)
    assert f"the loss of step 7 is not finite, for 12 of its 12 items: {named} and 7 more. Look" in str(caught.value)
    assert "step 1 is" not in said


def test_what_may_be_asked_for():
    with pytest.raises(ConfigError, match="is neither stop nor skip"):
        recipe(on_nonfinite="ignore")


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_weights_that_fly_away_reach_nothing(choice, tmp_path):
    """A step so long that no number is: neither the averages nor their snapshots have it."""
    config = recipe(STEPS, previews=STEPS, snapshots=STEPS, lr=1e39, warmup=0, clip=1.0, on_nonfinite=choice)
    with quick_looks(), pytest.raises(NonFiniteError, match=r"weights are not finite after step 1: network\."):
        train(config, tmp_path, ITEMS)
    assert list(every(tmp_path)) == []
    assert not list((tmp_path / "checkpoints").glob("step-*"))
